"""Scores a run on its held-out data: python -m genai_jax.evaluate --workdir=D; prints JSON"""

import json
import sys
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import parse_request, request_help
from genai_jax.config import asks_for_help


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(request_help(argv, "evaluate_request", __doc__))
        return 0
    flags, config = parse_request(argv, "evaluate_request")
    from genai_jax.runs import Run
    from genai_jax.training.distributed import is_main, join_processes

    with join_processes(flags.distributed):
        opened = Run(config, flags.run)
        result = opened.scores(flags.run)
        if is_main():
            if "data" in flags.components and any(vars(flags.data).values()):
                _say_if_other_data(opened)
            print(json.dumps(result))
    return 0


def _say_if_other_data(opened):
    """Says so if the held-out data, which a flag named, are not those of the run."""
    from genai_jax.training.workdir import read_record

    name = "validation_sha256"
    before = read_record(opened.workdir).get("data", {})
    if before.get(name) != opened.task.data.record().get(name):
        print("note: the held-out data are not those of the run", file=sys.stderr)


if __name__ == "__main__":
    run(main)
