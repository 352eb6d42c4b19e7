"""The flags of sample and evaluate that stand for others of the run."""

import dataclasses
import re
from typing import Any

from genai_jax.config import field, plain_type


def flag_at_use(f: dataclasses.Field) -> tuple[Any, Any]:
    """Type and declaration of a flag that replaces a value for one use of a trained run."""
    limits = {n: f.metadata[n] for n in ("choices", "minimum", "maximum")}
    what = re.sub(r"; ([^;]* if unset|if unset, [^;]*)\.$", ".", f.metadata["help"])
    declared = field(
        None, f"For this use: {what[0].lower()}{what[1:]} If unset, the run's value is used.",
        **limits,
    )  # fmt: skip
    return plain_type(f.type) | None, declared


def moved_flag(f: dataclasses.Field, request: str) -> tuple[Any, Any]:
    """Type and declaration of the flag of a request that overrides a field."""
    kind, path = plain_type(f.type) | None, f.metadata["path"]
    if f.name == "dataset" and request == "evaluate_request":
        moved = field(None, "The run's data set, if it moved, or another one to score.", path=path)
    elif f.name == "validation_percent":
        moved = field(
            None,
            "Percentage of the documents of --data.dataset to score; 100 for all.",
            minimum=1,
            maximum=100,
        )
    else:
        moved = field(None, f"What to use instead of the run's --data.{f.name}.", path=path)
    return kind, moved
