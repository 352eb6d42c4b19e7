"""The curves of a run as pictures in ``plots/``."""

import os
import pathlib
import sys

from genai_jax.files import reason_of
from genai_jax.tasks.protocol import Task
from genai_jax.training.metrics_log import parse_rows, read_lines, thinned

POINTS = 2000  # of a curve at least, where there are more rows: twice what the picture can show
WIDE = 50  # ratio of values from which an axis is logarithmic


def plot_metrics(workdir: pathlib.Path, task: Task):
    """Plots the losses over steps into ``loss.png``, and what the task names in `curves`.

    A plot that fails is a warning, since a run does not need it.
    """
    unit = f" ({task.loss_unit})" * (task.loss_unit not in ("", "loss"))
    curves = {"loss": (("loss",), f"loss{unit}"), **task.curves}
    try:
        path = workdir / "metrics.jsonl"
        rows = list(parse_rows(thinned(read_lines(path), POINTS), path))
        for plot, (suffixes, label) in curves.items():
            _plot(workdir, plot, rows, suffixes, label)
    except Exception as error:  # of the fonts, of the characters of a path, of a full disk
        print(f"warning: no plot in {workdir}: {reason_of(error)}", file=sys.stderr)


def curve_name(metric: str, suffixes: tuple[str, ...]) -> str:
    """What the legend calls a metric: "training", "held out, average", "training, critic".

    What all curves of the plot are, its only suffix, is left out: the axis says it.
    """
    split, _, rest = metric.partition("/")
    parts = [{"train": "training", "eval": "held out"}.get(split, split)]
    if rest.startswith("ema/"):
        parts, rest = [*parts, "average"], rest.removeprefix("ema/")
    if len(suffixes) == 1:
        common = suffixes[0].strip("/")
        rest = "" if rest == common else rest.removesuffix(f"/{common}")
    return ", ".join([*parts, *filter(None, [rest.replace("/", " ").replace("_", " ")])])


def _plot(workdir: pathlib.Path, plot: str, rows: list[dict], suffixes: tuple[str, ...], unit):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # pyplot would change the figures of a notebook

    names = sorted({name for row in rows for name in row if name.endswith(suffixes)}, reverse=True)
    if not names:
        return
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        marker = "o" if name.startswith("eval/") else None
        width = 1.0 if name.startswith("train/") else 1.8
        label = curve_name(name, suffixes)
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, lw=width)
    axes.set(xlabel="step", ylabel=unit)
    title = os.fsencode(workdir.name).decode(errors="backslashreplace")
    axes.set_title(title, parse_math=False)  # "$" is a character of it, not TeX
    values = [row[name] for row in rows for name in names if name in row]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")  # else the last values could not be told from 0
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    (workdir / "plots").mkdir(exist_ok=True)
    figure.savefig(workdir / "plots" / f"{plot}.png", dpi=150)
