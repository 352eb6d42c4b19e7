"""Which of the flags that tests give to every family a family takes."""

import dataclasses
from collections.abc import Sequence

from genai_jax.components import components_of

LOOP = {"train.log_every", "train.accumulate", "eval.every", "checkpoint.every"}  # of many steps


def taken(cls: type, flags: Sequence[str]) -> list[str]:
    """Those of the flags that mean something to a task, whose class is `cls`."""
    known = {
        f.name if component == "run" else f"{component}.{f.name}"
        for component, part in components_of(cls).items()
        for f in dataclasses.fields(part)
    }
    known -= LOOP if hasattr(cls, "fit") else set()
    known -= set() if cls.is_scored else {"eval.batches"}
    return [flag for flag in flags if flag.removeprefix("--").partition("=")[0] in known]
