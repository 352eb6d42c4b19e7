"""Scores a run on its held-out data: python -m genai_jax.evaluate --workdir=D; prints JSON"""

import json
import math
import sys
import time
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import make_task, parse_request, request_help, tells_how_to_move
from genai_jax.config import ConfigError, asks_for_help
from genai_jax.errors import NothingHeldOut, printable


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(request_help(argv, "evaluate_request", __doc__))
        return 0
    flags, config = parse_request(argv, "evaluate_request")
    if flags.run.batches == 0:
        raise ConfigError("--batches=0 leaves nothing to evaluate on; -1 takes all batches")
    from genai_jax.training.distributed import is_main, join_processes

    moved = vars(flags.data) if "data" in flags.components else {}
    moved = {name for name, value in moved.items() if value is not None}
    with join_processes(flags.distributed), tells_how_to_move(config):
        task = make_task(config)
        if "validation_percent" in moved:
            _refuse_own_data(config)
        try:
            result = scores(task, config, flags.run)
        except NothingHeldOut as error:
            if "dataset" not in moved:
                raise
            raise ConfigError(f"{error}; --data.validation_percent=100 scores all of it") from None
        if is_main():
            result |= _other_data(task, config) if moved else {}
            print(json.dumps(result))
    return 0


def _other_data(task, config) -> dict:
    """Says so if the held-out data, which a flag named, are not those of the run.

    Returns:
      For the result: what the run was trained on, if it is something else.
    """
    from genai_jax.training.workdir import read_record

    now, before = task.data.record(), read_record(config.run.workdir).get("data", {})
    if before.get("validation_sha256") == now.get("validation_sha256"):
        return {}
    trained_on = before.get("dataset")
    note = "note: the held-out data are not those of the run"
    note += f", which was trained on {printable(str(trained_on))}" if trained_on else ""
    scored, left_out = (now.get(f"{split}_documents") for split in ("validation", "train"))
    if scored and left_out:
        note += f"; these are {scored:,} of {scored + left_out:,} documents"
        if hasattr(config.data, "text_key"):
            note += ": --data.validation_percent=100 scores all of them"
    print(note, file=sys.stderr)
    return {"trained_on": trained_on} if trained_on else {}


def _refuse_own_data(config):
    """Raises `ConfigError` if another part of the run's own data is to be scored.

    Documents would be among them that the run was trained on.
    """
    from genai_jax.training.workdir import read_record, recorded_flags

    percent = config.data.validation_percent
    default = type(config.data)().validation_percent
    own = int(recorded_flags(config.run.workdir).get("data.validation_percent", default))
    before = read_record(config.run.workdir).get("data", {})
    now = make_task(config.replace("data", validation_percent=own)).data.record()
    if percent != own and now.get("train_sha256") == before.get("train_sha256"):
        raise ConfigError(
            f"--data.validation_percent={percent}: the run was trained on documents of "
            f"{printable(config.data.dataset)} that this would score; it scores those held out, "
            f"{own}%"
        )


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
    data = getattr(getattr(config, "data", None), "dataset", None)
    named = {} if data is None else {"dataset": data}
    unit = {"loss_unit": task.loss_unit} if "loss" in result else {}
    where = {"step": model.step, "ema": model.ema, **named, "split": "validation"}
    return {**where, **unit, **result}


if __name__ == "__main__":
    run(main)
