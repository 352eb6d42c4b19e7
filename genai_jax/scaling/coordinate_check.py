"""The coordinate check of Yang et al. 2022 ("Tensor Programs V", appendix D.1).

Trains the same language model at several widths, in both parametrizations, and measures how far
its activations move from their initial values.
"""

import csv
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from genai_jax.config import Config, ConfigError
from genai_jax.networks.sequence.config import PARAMETRIZATIONS
from genai_jax.training.step import init_state, make_step


class Change(NamedTuple):
    """How far an activation of one model has moved from its initial value, on one batch."""

    parametrization: str
    width: int
    step: int
    activation: str  # path of the module whose output it is, or "logits"; all blocks averaged
    mean_absolute_change: float
    mean_absolute_size: float


def check(
    config: Config,
    widths: Sequence[int],
    steps: int,
    make_task: Callable[[Config], Any],
    seeds: int = 1,
) -> list[Change]:
    """The changes of all activations, at all widths and steps, averaged over seeds.

    Args:
      config: a run of the language model; its base width, or else the smallest of `widths`, is
        the base width of the maximal-update models.
      widths: increasing.
      steps: training steps.
      make_task: configuration -> language-model task.
      seeds: number of seeds, counted up from that of `config`.

    Raises:
      ConfigError: another task than the language model; a width at which the model cannot keep the
        proportions of `config`.
    """
    if config.run.task != "language_model":
        raise ConfigError(
            f"--task={config.run.task}: the coordinate check works for --task=language_model only"
        )
    base = config.transformer.base_width or widths[0]
    changes = []
    for parametrization in PARAMETRIZATIONS:
        for width in widths:
            model = at_width(config, width, parametrization, base)
            by_seed = [
                list(changes_of(model.replace("run", seed=config.run.seed + i), steps, make_task))
                for i in range(seeds)
            ]
            for same in zip(*by_seed, strict=True):
                change, size = (sum(c[i] for c in same) / seeds for i in (2, 3))
                changes.append(Change(parametrization, width, *same[0][:2], change, size))
    return changes


def at_width(config: Config, width: int, parametrization: str, base: int) -> Config:
    """The run with its model scaled to `width` and a constant learning rate."""
    shape, ratio = config.transformer, width / config.transformer.embed_dim
    wider_heads = shape.base_head_dim is not None

    def scaled(name: str, size: int | None) -> int | None:
        if size is not None and size * ratio % 1:
            raise ConfigError(
                f"--widths: {width} is not in proportion to --transformer.embed_dim="
                f"{shape.embed_dim}: --{name}={size} would be {size * ratio:g}"
            )
        return None if size is None else int(size * ratio)

    maximal = parametrization == "maximal_update"
    changes = dict(
        embed_dim=width,
        mlp_dim=scaled("transformer.mlp_dim", shape.mlp_dim),
        head_dim=shape.head_width,
        parametrization=parametrization,
        base_width=base if maximal else None,
        base_head_dim=shape.base_head_dim if maximal else None,
    )
    if wider_heads:
        changes["head_dim"] = scaled("transformer.head_dim", shape.head_width)
    else:
        for name in ("num_heads", "num_kv_heads"):
            changes[name] = scaled(f"transformer.{name}", getattr(shape, name))
    expert_dim = scaled("moe.expert_dim", config.moe.expert_dim)
    try:
        config = config.replace("transformer", **changes).replace("moe", expert_dim=expert_dim)
    except ValueError as error:
        raise ConfigError(f"--widths: at {width}: {error}") from None
    return config.replace("optimizer", schedule="constant", warmup_steps=0)


def changes_of(
    config: Config, steps: int, make_task: Callable[[Config], Any]
) -> Iterator[tuple[int, str, float, float]]:
    """Trains one model; yields (step, activation, mean absolute change, mean absolute size).

    The activations are always those on the first batch.
    """
    task = make_task(config)
    batches = task.data.train()
    try:
        data = [next(batches) for _ in range(steps)]
    finally:
        batches.close()
    state = jax.jit(lambda rng: init_state(task, rng, {}))(jax.random.key(config.run.seed))
    step = jax.jit(make_step(task.phases(state.params)))

    observe = jax.jit(lambda p: activations(task.model, p["model"], data[0]["tokens"]))
    size = lambda x: float(np.mean(np.abs(x)))
    initial = jax.device_get(observe(state.params))
    for number, batch in enumerate(data, 1):
        state, _ = step(state, batch)
        for name, now in jax.device_get(observe(state.params)).items():
            yield number, name, size(now - initial[name]), size(now)


def activations(model, params, tokens) -> dict:
    """Module path -> its output in float32 for tokens [batch, length]; all blocks in one array.

    Attention and MLP as a whole are left out: their outputs are those of their last dense layers.
    """
    logits, written = model.apply(
        {"params": params}, tokens, method="init_all",
        capture_intermediates=True, mutable=["intermediates"],
    )  # fmt: skip
    outputs = {}
    for path, value in jax.tree_util.tree_flatten_with_path(written["intermediates"])[0]:
        *names, last = (part.key for part in path if hasattr(part, "key"))
        # A module may return several things, of which the first is its activation. The head
        # returns its kernel.
        if last == "__call__" and names and names[0] != "head":
            outputs.setdefault("/".join(names), value)
    outputs["logits"] = logits
    duplicates = ("dropout", "layers/Dropout_0", "layers/attention", "layers/mlp")
    return {name: x.astype(jnp.float32) for name, x in outputs.items() if name not in duplicates}


def slopes(changes: Sequence[Change]) -> dict[tuple[str, str], float]:
    """(parametrization, activation) -> the power of the width with which it changes.

    The power is fitted to the changes after the last step.
    """
    last = max(change.step for change in changes)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for c in changes:
        if c.step == last:
            point = c.width, c.mean_absolute_change
            points.setdefault((c.parametrization, c.activation), []).append(point)
    return {key: float(np.polyfit(*np.log(np.transpose(p)), 1)[0]) for key, p in points.items()}


def write(changes: Sequence[Change], folder: pathlib.Path):
    """Writes ``coordinate_check.csv`` and ``.png``, and ``slopes.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "coordinate_check.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Change._fields, *changes])
    with open(folder / "slopes.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(*key, slope) for key, slope in slopes(changes).items()]
        csv.writer(file).writerows([("parametrization", "activation", "power_of_width"), *rows])
    figure(changes).savefig(folder / "coordinate_check.png", dpi=150)


def figure(changes: Sequence[Change]) -> Figure:
    """Change after the last step against width: panels are parametrizations, lines activations."""
    last = max(change.step for change in changes)
    kinds = list(dict.fromkeys(change.activation for change in changes))
    fig = Figure(figsize=(11, 5), layout="constrained")
    panels = fig.subplots(1, len(PARAMETRIZATIONS), sharey=True)
    for axes, parametrization in zip(panels, PARAMETRIZATIONS, strict=True):
        for i, kind in enumerate(kinds):
            points = [
                (c.width, c.mean_absolute_change)
                for c in changes
                if (c.parametrization, c.activation, c.step) == (parametrization, kind, last)
            ]
            axes.plot(
                *zip(*points, strict=True), color=colormaps["tab20"](i % 20), label=kind, lw=1.4,
                marker="osd^v"[i // 20 % 5], markersize=4,
            )  # fmt: skip
        widths = sorted({c.width for c in changes})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set(xlabel="width (embed_dim)", title=parametrization.replace("_", " "))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"mean absolute change of activations after {last} step(s)")
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    return fig
