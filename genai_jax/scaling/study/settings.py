"""The ``--study.*`` flags that all analyses share, set in study.flags; and parsing of lists."""

import dataclasses
import fnmatch
import math
from collections.abc import Sequence

from genai_jax.config import ConfigError, field


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    analysis: str = field("", "Kind of analysis.")
    metric: str = field(
        "eval/loss", "Metric that scores a run by its value at the last step; lower is better."
    )
    may_diverge: bool = field(
        False, "Whether a run whose loss becomes non-finite counts as a result, with an infinite "
        "loss, instead of a failure.",
    )  # fmt: skip


def names(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(flag: str, text: str) -> list[float]:
    """The positive numbers of a comma-separated list, in increasing order.

    Raises:
      ConfigError: the list, the value of `flag`, contains anything else.
    """
    try:
        values = [float(part) for part in names(text)]
    except ValueError:
        raise ConfigError(f"--{flag}={text} is not a list of numbers") from None
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ConfigError(f"--{flag}={text}: the numbers must be positive and finite")
    return sorted(set(values))


def chosen(
    flag: str, text: str, known: Sequence[str], *, missing_ok: bool = False, what: str = "run"
) -> list[str]:
    """The names in `known` that match a list of names or patterns with * and ?.

    Raises:
      ConfigError: a pattern that matches none, unless `missing_ok`.
    """
    matching: set[str] = set()
    for pattern in names(text):
        matches = fnmatch.filter(known, pattern)
        if not matches and not missing_ok:
            listed = ", ".join(known)
            raise ConfigError(
                f"--{flag}={pattern} matches no {what} of the study; {what}s are {listed}"
            )
        matching.update(matches)
    return [name for name in known if name in matching]
