"""Samples from a run: python -m genai_jax.sample --workdir=D [--prompt=TEXT --num_samples=N ...]"""

import pathlib
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import make_task, parse_request, request_help, tells_how_to_move
from genai_jax.config import ConfigError, asks_for_help
from genai_jax.files import writing_to
from genai_jax.requests import Files, distinguishing, prepare_output


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(request_help(argv, "sample_request", __doc__))
        return 0
    flags, config = parse_request(argv, "sample_request")
    request = flags.run
    prepare_output(request.output)
    from genai_jax.training.distributed import is_main, join_processes
    from genai_jax.training.restore import restore_model
    from genai_jax.training.sharding import mesh_context

    with join_processes(flags.distributed), tells_how_to_move(config):
        task = make_task(config)
        _check_output(task, request.output)
        model = restore_model(
            task, config, step=request.checkpoint_step, ema=request.ema, member=request.member
        )
        with mesh_context(model.mesh):
            params = task.materialize(model.params)
            sampled = task.sample(params, model.mutables, request)
        if is_main():
            folder = pathlib.Path(request.workdir) / "samples"
            if isinstance(sampled, Files):
                sampled = sampled._replace(settings=distinguishing(request, model.step))
            with writing_to(f"--output={request.output}" if request.output else folder):
                lines = sampled.write(request.output, folder)
            for line in lines:
                print(line)
    return 0


def _check_output(task, output: str):
    """Raises `ConfigError` for a name that does not fit what is written."""
    suffix = getattr(task.data, "suffix", None)
    if output and suffix and pathlib.Path(output).suffix.lower() != suffix:
        raise ConfigError(f"--output={output} must end in {suffix}, as what is written")


if __name__ == "__main__":
    run(main)
