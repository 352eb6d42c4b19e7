"""Scores a run on its held-out data: python -m genai_jax.evaluate --workdir=D; prints JSON"""

import json
import math
import sys
import time
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import make_task, parse_request, request_help, tells_how_to_move
from genai_jax.config import ConfigError, asks_for_help


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(request_help(argv, "evaluate_request", __doc__))
        return 0
    flags, config = parse_request(argv, "evaluate_request")
    if flags.run.batches == 0:
        raise ConfigError("--batches=0 leaves nothing to evaluate on; -1 takes all batches")
    from genai_jax.training.distributed import is_main, join_processes

    with join_processes(flags.distributed), tells_how_to_move(config):
        task = make_task(config)
        result = scores(task, config, flags.run)
        if is_main():
            if "data" in flags.components and any(vars(flags.data).values()):
                _say_if_other_data(task, config)
            print(json.dumps(result))
    return 0


def _say_if_other_data(task, config):
    """Says so if the held-out data, which a flag named, are not those of the run."""
    from genai_jax.training.workdir import read_record

    name = "validation_sha256"
    before = read_record(config.run.workdir).get("data", {})
    if before.get(name) != task.data.record().get(name):
        print("note: the held-out data are not those of the run", file=sys.stderr)


def scores(task, config, request) -> dict:
    """Returns the JSON object that the command prints."""
    from genai_jax.tasks.protocol import Reports
    from genai_jax.training.batches import BatchPlacement
    from genai_jax.training.evaluation import Evaluator
    from genai_jax.training.restore import restore_model
    from genai_jax.training.sharding import batch_shardings, mesh_context

    model = restore_model(
        task, config, step=request.checkpoint_step, ema=request.ema, member=request.member
    )
    placement = BatchPlacement(
        task.data.batch_spec, batch_shardings(task.data.batch_spec, model.mesh)
    )

    def batches(count: int):
        return map(placement.to_devices, task.data.held_out(count, placement.rows))

    trained, seed = (model.params, model.mutables), getattr(request, "seed", 0)
    with mesh_context(model.mesh):
        evaluator = Evaluator(task)
        if task.tokens_per_step():  # compiles, so that only scoring is timed
            evaluator(*trained, batches(1), seed)
        start = time.perf_counter()
        result = evaluator(*trained, batches(request.batches), seed)
        seconds = time.perf_counter() - start
        if isinstance(task, Reports):
            params = task.materialize(model.params)
            result |= task.report(params, model.mutables, batches, request)
    broken = [n for n, x in result.items() if isinstance(x, float) and not math.isfinite(x)]
    if broken:
        raise ConfigError(
            f"not finite in the run in --workdir={config.run.workdir}: {', '.join(broken)}"
        )
    if "tokens" in result:
        result["tokens_per_second"] = result["tokens"] / seconds
    unit = {"loss_unit": task.loss_unit} if "loss" in result else {}
    return {"step": model.step, "ema": model.ema, "split": "validation", **unit, **result}


if __name__ == "__main__":
    run(main)
