"""Scores a run on its held-out data: python -m genai_jax.evaluate --workdir=D; prints JSON"""

import json
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import all_requests, parse_request
from genai_jax.config import help_text
from genai_jax.tasks import TASKS
from genai_jax.training.distributed import refuse_several


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(help_text(__doc__, {"run": all_requests("evaluate_request")}))
        return 0
    request, config = parse_request(argv, "evaluate_request")
    refuse_several("evaluate")
    from genai_jax.training.batches import BatchPlacement
    from genai_jax.training.restore import restore_model
    from genai_jax.training.sharding import batch_shardings, mesh_context

    task = TASKS[config.run.task](config)
    model = restore_model(
        task, config, step=request.checkpoint_step, ema=request.ema, member=request.member
    )
    shapes = task.batch_shapes()
    placement = BatchPlacement(shapes, batch_shardings(shapes, task.batch_axes, model.mesh))

    def batches(count: int):
        return map(placement.to_devices, task.evaluation_batches(count, placement.rows))

    with mesh_context(model.mesh):
        scores = task.score(model.params, model.mutables, batches, request)
    result = {"step": model.step, "ema": model.ema, "split": "validation", **scores}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run(main)
