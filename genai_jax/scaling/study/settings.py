"""The flags of a study that all analyses have: ``--study.*``, in the folder's study.flags."""

import dataclasses
import fnmatch
import math
from collections.abc import Sequence

from genai_jax.config import ConfigError, field


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    analysis: str = field("", "what the report is about")
    metric: str = field("eval/loss", "score of a run, the lower the better: of its last step")
    may_diverge: bool = field(
        False, "a run whose loss is not finite is a result, a loss without bound, and no failure"
    )


def names(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(flag: str, text: str) -> list[float]:
    """The positive numbers of a comma-separated list, increasing.

    Raises:
      ConfigError: it holds something else; `flag` is named.
    """
    try:
        found = [float(part) for part in names(text)]
    except ValueError:
        raise ConfigError(f"--{flag}={text} is not a list of numbers") from None
    if not all(math.isfinite(value) and value > 0 for value in found):
        raise ConfigError(f"--{flag}={text}: allowed are positive numbers")
    return sorted(set(found))


def chosen(flag: str, text: str, known: Sequence[str], *, missing_ok: bool = False) -> list[str]:
    """Those of the `known` names that a list of names, or patterns with * and ?, chooses.

    Raises:
      ConfigError: a pattern that chooses none, unless `missing_ok`.
    """
    found: set[str] = set()
    for pattern in names(text):
        matched = fnmatch.filter(known, pattern)
        if not matched and not missing_ok:
            listed = ", ".join(known)
            raise ConfigError(f"--{flag}={pattern} is no run of the study; there are {listed}")
        found.update(matched)
    return [name for name in known if name in found]
