"""What `evaluate` says of data that are not those of the run."""

import sys

from genai_jax.components import make_task
from genai_jax.config import Config, ConfigError
from genai_jax.errors import printable
from genai_jax.tasks.protocol import Task
from genai_jax.training.workdir import read_record, recorded_flags


def refuse_own_data(config: Config):
    """Raises `ConfigError` if another part of the run's own data is to be scored.

    Documents would be among them that the run was trained on.
    """
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


def other_data(task: Task, config: Config) -> dict:
    """Says so if the held-out data, which a flag named, are not those of the run.

    Returns:
      For the result: what the run was trained on, if it is something else.
    """
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
