"""How far activations move in the first steps of training, width by width, both parametrizations.

python -m genai_jax.scaling.coordinate_check --flagfile=F --output=DIR [--widths=64,128,256,512]

The coordinate check of Yang et al. 2022 ("Tensor Programs V", appendix D.1): where the change of
every activation is of one size at all widths, a learning rate means the same at all of them. In the
standard parametrization changes grow with the width. The run's widths stay in proportion: heads are
added, or wider where --transformer.base_head_dim is set. The learning rate is held at its peak from
the first step on. Logits come to it last: a random head answers changes below it by what falls as
1 / sqrt(width), and what is learned has to outgrow that.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from genai_jax.command import run
from genai_jax.components import make_task, parse_run
from genai_jax.config import Config, ConfigError, field, flag_names, help_text, parse
from genai_jax.networks.sequence.config import PARAMETRIZATIONS


@dataclasses.dataclass(frozen=True)
class CoordinateRequest:
    output: str = field("", "folder for the plot and the table")
    widths: str = field("64,128,256,512", "embed_dim of the models, comma-separated")
    steps: int = field(5, "steps of training", minimum=1)
    seeds: int = field(1, "runs of each model, whose changes are averaged", minimum=1)


class Change(NamedTuple):
    """How an activation of one model differs from what it was before training, on one batch."""

    parametrization: str
    width: int
    step: int
    activation: str  # path of the module that makes it, or "logits"; blocks are averaged
    mean_absolute_change: float
    mean_absolute_size: float


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(help_text(__doc__, {"run": CoordinateRequest}))
        print("\nand every flag of the train command")
        return 0
    names = flag_names({"run": CoordinateRequest})
    own = [a for a in argv if a.lstrip("-").split("=")[0] in names]
    request = parse(own, {"run": CoordinateRequest})[0].run
    if not request.output:
        raise ConfigError("--output is not set: say where the plot and the table go")
    config = parse_run([a for a in argv if a not in own])
    changes = check(config, _widths(request.widths), request.steps, request.seeds)
    write(changes, pathlib.Path(request.output))
    for (parametrization, activation), slope in slopes(changes).items():
        print(f"{parametrization:15} {activation:35} width^{slope:+.2f}")
    return 0


def _widths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--widths={text} is not a list of widths such as 64,128,256")
    widths = sorted({int(part) for part in parts})
    if len(widths) < 2:
        raise ConfigError(f"--widths={text}: a slope needs at least two widths")
    return widths


def check(config: Config, widths: Sequence[int], steps: int, seeds: int = 1) -> list[Change]:
    """The changes of all activations, models and steps, averaged over seeds.

    The base width is that of `config`, or else the smallest one.

    Raises:
      ConfigError: no language model; a width that does not keep the proportions of `config`.
    """
    if config.run.task != "language_model":
        raise ConfigError(f"--task={config.run.task}: the check is of --task=language_model")
    base = config.transformer.base_width or widths[0]
    found = []
    for parametrization in PARAMETRIZATIONS:
        for width in widths:
            model = at_width(config, width, parametrization, base)
            by_seed = [
                list(changes_of(model.replace("run", seed=config.run.seed + i), steps))
                for i in range(seeds)
            ]
            for same in zip(*by_seed, strict=True):
                change, size = (sum(c[i] for c in same) / seeds for i in (2, 3))
                found.append(Change(parametrization, width, *same[0][:2], change, size))
    return found


def at_width(config: Config, width: int, parametrization: str, base: int) -> Config:
    """The run with its model made `width` wide, its learning rate constant."""
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


def changes_of(config: Config, steps: int) -> Iterator[tuple[int, str, float, float]]:
    """(step, activation, mean absolute change, mean absolute size) while one model is trained.

    Activations are those of the first batch.
    """
    import jax
    import numpy as np

    from genai_jax.training.step import init_state, make_step

    task = make_task(config)
    batches = task.data.train()
    try:
        data = [next(batches) for _ in range(steps)]
    finally:
        batches.close()
    state = jax.jit(lambda rng: init_state(task, rng, {}))(jax.random.key(config.run.seed))
    step = jax.jit(make_step(task.phases(state.params)))

    look = jax.jit(lambda p: activations(task.model, p["model"], data[0]["tokens"]))
    size = lambda x: float(np.mean(np.abs(x)))
    first = jax.device_get(look(state.params))
    for number, batch in enumerate(data, 1):
        state, _ = step(state, batch)
        for name, now in jax.device_get(look(state.params)).items():
            yield number, name, size(now - first[name]), size(now)


def activations(model, params, tokens) -> dict:
    """Path of a module -> what it makes of tokens [batch, length]; of all blocks in one array.

    Float32. What attention and MLP make is what their last dense layer does, and not there twice.
    """
    import jax
    import jax.numpy as jnp

    logits, written = model.apply(
        {"params": params}, tokens, method="init_all",
        capture_intermediates=True, mutable=["intermediates"],
    )  # fmt: skip
    found = {}
    for path, value in jax.tree_util.tree_flatten_with_path(written["intermediates"])[0]:
        *names, last = (part.key for part in path if hasattr(part, "key"))
        # A module may return several things; the first one is its activation. The head gives out
        # its kernel.
        if last == "__call__" and names and names[0] != "head":
            found.setdefault("/".join(names), value)
    found["logits"] = logits
    twice = ("dropout", "layers/Dropout_0", "layers/attention", "layers/mlp")
    return {name: x.astype(jnp.float32) for name, x in found.items() if name not in twice}


def slopes(changes: Sequence[Change]) -> dict[tuple[str, str], float]:
    """(parametrization, activation) -> power of the width that its change at the last step is."""
    import numpy as np

    last = max(change.step for change in changes)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for c in changes:
        if c.step == last:
            point = c.width, c.mean_absolute_change
            points.setdefault((c.parametrization, c.activation), []).append(point)
    return {key: float(np.polyfit(*np.log(np.transpose(p)), 1)[0]) for key, p in points.items()}


def write(changes: Sequence[Change], folder: pathlib.Path):
    """``coordinate_check.csv`` and ``.png``, and ``slopes.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "coordinate_check.csv", "w", newline="") as file:
        csv.writer(file).writerows([Change._fields, *changes])
    with open(folder / "slopes.csv", "w", newline="") as file:
        rows = [(*key, slope) for key, slope in slopes(changes).items()]
        csv.writer(file).writerows([("parametrization", "activation", "power_of_width"), *rows])
    figure(changes).savefig(folder / "coordinate_check.png", dpi=150)


def figure(changes: Sequence[Change]):
    """Change at the last step against width: a panel each parametrization, a line an activation."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    last = max(change.step for change in changes)
    kinds = list(dict.fromkeys(change.activation for change in changes))
    drawn = Figure(figsize=(11, 5), layout="constrained")
    panels = drawn.subplots(1, len(PARAMETRIZATIONS), sharey=True)
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
    panels[0].set_ylabel(f"mean absolute change of the activation after {last} step(s)")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    return drawn


if __name__ == "__main__":
    run(main)
