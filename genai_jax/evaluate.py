"""Scores a run on its held-out data: python -m genai_jax.evaluate --workdir=D; prints JSON"""

import json
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import parse_request, request_help
from genai_jax.config import asks_for_help


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(request_help(argv, "evaluate_request", __doc__))
        return 0
    flags, config = parse_request(argv, "evaluate_request")
    from genai_jax.runs import Run, moved
    from genai_jax.training.distributed import is_main, join_processes

    with join_processes(flags.distributed):
        result = Run(config, flags.run, moved(flags)).scores(flags.run)
        if is_main():
            print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run(main)
