"""What a study's numbers should be: ``expected.json`` in its folder, and how far they may be off.

    {"name of a number": {"value": 3.21, "tolerance": 0.02},
     "another": {"value": 0.5, "tolerance": "2%"}}

A tolerance that is a number is absolute, one in per cent is relative to the value.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping

from genai_jax.config import ConfigError


def read_expected(folder: pathlib.Path) -> dict[str, tuple[float, float]]:
    """Name -> (value, absolute tolerance).

    Raises:
      ConfigError: no such file, or an entry of another form, which is named.
    """
    path = folder / "expected.json"
    try:
        entries = json.loads(path.read_text())
    except OSError:
        raise ConfigError(f"--check: {path} is not there") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{path} names no number")
    return {name: _entry(path, name, entry) for name, entry in entries.items()}


def _entry(path: pathlib.Path, name: str, entry: object) -> tuple[float, float]:
    try:
        value, tolerance = entry["value"], entry["tolerance"]
        if isinstance(tolerance, str) and tolerance.endswith("%"):
            tolerance = abs(value) * float(tolerance[:-1]) / 100
        found = float(value), float(tolerance)
    except (TypeError, KeyError, ValueError):
        found = math.nan, math.nan
    if not all(map(math.isfinite, found)) or found[1] < 0:
        raise ConfigError(
            f"{path}: {name} is {json.dumps(entry)}; allowed is "
            '{"value": 3.21, "tolerance": 0.02}, or "2%" for a relative one'
        )
    return found


def off(numbers: Mapping[str, float], expected: Mapping[str, tuple[float, float]]) -> list[str]:
    """A line for each number that is not there, or off by more than its tolerance."""
    found = []
    for name, (value, tolerance) in expected.items():
        if name not in numbers:
            found.append(f"{name} is not among the results; expected is {value:g}")
        elif not abs(numbers[name] - value) <= tolerance:
            found.append(
                f"{name} is {numbers[name]:.6g}; expected is {value:g} within {tolerance:.3g}"
            )
    return found
