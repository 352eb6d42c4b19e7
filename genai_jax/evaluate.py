"""Scores a run on its held-out data: python -m genai_jax.evaluate --workdir=D; prints JSON"""

import dataclasses
import json
import time
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import parse_run_of, read_config
from genai_jax.config import field, help_text
from genai_jax.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    workdir: str = field("", "folder of the run")
    checkpoint_step: int | None = field(None, "step to score; the newest if unset", minimum=0)
    ema: str | None = field(None, "average to score, named by its decay; none if unset")
    batches: int = field(-1, "held-out batches; -1: all", minimum=-1)


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(help_text(__doc__, {"run": EvaluateConfig}))
        return 0
    request = parse_run_of(argv, EvaluateConfig)
    config = read_config(request.workdir)
    from genai_jax.training.batches import to_devices
    from genai_jax.training.restore import restore_model
    from genai_jax.training.sharding import batch_shardings, mesh_context

    task = TASKS[config.run.task](config)
    model = restore_model(task, config, step=request.checkpoint_step, ema=request.ema)
    shardings = batch_shardings(task.batch_shapes(), task.batch_axes, model.mesh)

    def score(count: int) -> dict:
        batches = task.evaluation_batches(count)
        on_devices = (to_devices(batch, shardings) for batch in batches)
        return task.evaluate(model.params, model.mutables, on_devices)

    with mesh_context(model.mesh):
        score(1)  # compiles, so that the speed below is that of the scoring alone
        start = time.perf_counter()
        scores = score(request.batches)
        seconds = time.perf_counter() - start
    if "tokens" in scores:
        scores["tokens_per_second"] = scores["tokens"] / seconds
    result = {"step": model.step, "ema": request.ema, "split": "validation", **scores}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run(main)
