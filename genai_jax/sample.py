"""Draws from a run: python -m genai_jax.sample --workdir=D [--prompt=TEXT --num_samples=N ...]"""

import pathlib
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import all_requests, parse_request
from genai_jax.config import help_text
from genai_jax.tasks import TASKS
from genai_jax.training.distributed import refuse_several


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(help_text(__doc__, {"run": all_requests("sample_request")}))
        return 0
    request, config = parse_request(argv, "sample_request")
    refuse_several("sample")
    from genai_jax.training.restore import restore_model
    from genai_jax.training.sharding import mesh_context

    task = TASKS[config.run.task](config)
    model = restore_model(
        task, config, step=request.checkpoint_step, ema=request.ema, member=request.member
    )
    with mesh_context(model.mesh):
        drawn = task.sample(model.params, model.mutables, request)
    for line in drawn.write(request.output, pathlib.Path(request.workdir) / "samples"):
        print(line)
    return 0


if __name__ == "__main__":
    run(main)
