"""Ticks of logarithmic axes: at least three, also where less than a power of ten is shown."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    LogFormatterSciNotation,
    MaxNLocator,
    NullFormatter,
    ScalarFormatter,
)

FEWEST = 3
# Numbers of each power of ten that get a tick, from few to many.
STEPS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 2, 3, 5, 7),
    (1, 2, 3, 4, 5, 6, 7, 8, 9),
    tuple(np.arange(1, 10, 0.5).tolist()),
)


def log_axes(axes: Axes, *which: str):
    """Makes the axes "x" or "y" logarithmic. Call it once everything is plotted.

    Ranges below three powers of ten get ticks between them as well.
    """
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis, (low, high) = getattr(axes, f"{name}axis"), getattr(axes, f"get_{name}lim")()
        if low > 0 and high / low < 1000:
            axis.set_major_locator(FixedLocator(ticks(low, high)))
            every = LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(np.inf, np.inf))
            plain = low >= 1e-4 and high < 1e4
            axis.set_major_formatter(ScalarFormatter() if plain else every)
            axis.set_minor_formatter(NullFormatter())


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, at least `FEWEST`."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for steps in STEPS:
        every = np.outer(powers, steps).ravel()
        inside = every[(low <= every) & (every <= high)]
        if len(inside) >= FEWEST:
            return inside.tolist()
    every = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return every[(low <= every) & (every <= high)].tolist()
