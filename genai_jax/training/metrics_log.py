"""Where metrics go: ``metrics.jsonl``, TensorBoard, and plots."""

import json
import os
import pathlib


class MetricsLog:
    """Appends one JSON object per logged step, and mirrors it to TensorBoard.

    Rows after `start_step` were written between the last checkpoint and a crash. They are dropped,
    since the resumed run writes them again.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(self.path) if row["step"] <= start_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115, lives as long as the run
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, row: dict):
        """Writes {"step": ..., name: number, ...}."""
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self):
        self._file.close()
        self._board.close()


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics file, without a last line that a crash cut short."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_curves(workdir: pathlib.Path, plot: str, ends: tuple[str, ...], label: str):
    """Plots metrics over steps into ``plots/<plot>.png``; does nothing if there are none.

    Args:
      workdir: folder of the run.
      plot: name of the file.
      ends: suffixes of the names of the metrics to plot.
      label: label of the vertical axis, with its unit.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(workdir / "metrics.jsonl")
    names = sorted({name for row in rows for name in row if name.endswith(ends)}, reverse=True)
    if not names:
        return
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        marker = "o" if name.startswith("eval/") else None
        width = 1.0 if name.startswith("train/") else 1.8
        axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4, lw=width)
    axes.set(xlabel="step", ylabel=label, title=workdir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    (workdir / "plots").mkdir(exist_ok=True)
    figure.savefig(workdir / "plots" / f"{plot}.png", dpi=150)
    plt.close(figure)
