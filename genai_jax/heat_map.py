"""Pictures of weights between the tokens of two texts."""

import pathlib
from collections.abc import Sequence

import numpy as np


def write_heat_map(
    path: pathlib.Path, weights: np.ndarray, rows: Sequence[str], columns: Sequence[str]
):
    """Writes a PNG with a cell for each weight in [0, 1], dark where it is large.

    Args:
      path: of the file.
      weights: [rows, columns].
      rows, columns: texts beside each row and above each column.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # pyplot would change the figures of a notebook

    size = [min(max(0.18 * len(texts), 2), 40) + 0.8 for texts in (columns, rows)]
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontfamily="monospace", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontfamily="monospace", parse_math=False)
    axes.xaxis.tick_top()
    for label in axes.get_xticklabels():
        label.set_rotation(90 * (len(label.get_text()) > 1))
    axes.tick_params(length=0)
    figure.savefig(path, dpi=110, format="png")
