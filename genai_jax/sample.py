"""Samples from a run: python -m genai_jax.sample --workdir=D [--prompt=TEXT --num_samples=N ...]"""

from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import parse_request, request_help
from genai_jax.config import asks_for_help
from genai_jax.sampled import check_suffix, prepare_output


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(request_help(argv, "sample_request", __doc__))
        return 0
    flags, config = parse_request(argv, "sample_request")
    request = flags.run
    check_suffix(request.output, request.suffixes)
    prepare_output(request.output)
    from genai_jax.runs import Run, moved
    from genai_jax.training.distributed import join_processes

    with join_processes(flags.distributed):
        opened = Run(config, request, moved(flags))
        for line in opened.write(opened.answer(request), request.output):
            print(line)
    return 0


if __name__ == "__main__":
    run(main)
