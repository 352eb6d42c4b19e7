"""The expected numbers of a study and their tolerances, from ``expected.json`` in its folder.

    {"name of a number": {"value": 3.21, "tolerance": 0.02},
     "another": {"value": 0.5, "tolerance": "2%"}}

A numeric tolerance is absolute; one in percent is relative to the value.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping

from genai_jax.config import ConfigError
from genai_jax.files import read_json


def read_expected(folder: pathlib.Path) -> dict[str, tuple[float, float]]:
    """Name -> (value, absolute tolerance).

    Raises:
      ConfigError: a missing file, or a malformed entry.
    """
    path = folder / "expected.json"
    if not path.exists():
        raise ConfigError(f"--check: {path} does not exist")
    entries = read_json(path)
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{path} names no numbers")
    return {name: _entry(path, name, entry) for name, entry in entries.items()}


def _entry(path: pathlib.Path, name: str, entry: object) -> tuple[float, float]:
    try:
        value, tolerance = entry["value"], entry["tolerance"]
        if isinstance(tolerance, str) and tolerance.endswith("%"):
            tolerance = abs(value) * float(tolerance[:-1]) / 100
        parsed = float(value), float(tolerance)
    except (TypeError, KeyError, ValueError, OverflowError):
        parsed = math.nan, math.nan
    if not all(map(math.isfinite, parsed)) or parsed[1] < 0:
        raise ConfigError(
            f"{path}: {name} is {json.dumps(entry)}; write "
            '{"value": 3.21, "tolerance": 0.02}, or "2%" for a relative tolerance'
        )
    return parsed


def off(numbers: Mapping[str, float], expected: Mapping[str, tuple[float, float]]) -> list[str]:
    """A line for each number that is missing, or off by more than its tolerance."""
    lines = []
    for name, (value, tolerance) in expected.items():
        if name not in numbers:
            lines.append(f"{name} is not among the results; expected {value:g}")
        elif not abs(numbers[name] - value) <= tolerance:
            lines.append(
                f"{name} is {numbers[name]:.6g}; expected {value:g} within {tolerance:.3g}"
            )
    return lines
