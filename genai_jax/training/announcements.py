"""What a run says at its beginning and at its end."""

import datetime
import shlex
from collections.abc import Mapping
from typing import Any

from genai_jax.config import Config
from genai_jax.errors import printable
from genai_jax.outside import is_outside

MOST = 5  # scores in a line


def beginning(config: Config, record: Mapping[str, Any], examples: int, tokens: int | None) -> str:
    """What is trained, on what, and how much work that is.

    Args:
      config: of the run.
      record: the contents of ``run.json``.
      examples: rows of a batch, of all members of a population.
      tokens: tokens of a batch; None if the task does not count them.
    """
    counts, data, flops = record["parameters"], record["data"], record["flops_per_step"]
    active = f" ({counts['active']:,} active)" if counts["active"] < counts["total"] else ""
    batch = f"{examples:,} examples" if tokens is None else f"{tokens:,} tokens"
    members = f"{config.population.size} models of " if config.population.size > 1 else ""
    mesh = ", ".join(f"{axis}={size}" for axis, size in record["mesh"].items())
    devices = f"{record['devices']} {record['device_kind']} device(s)"
    work = f"{flops:.3g} FLOPs per step"
    if peak := record["peak"]:
        seconds = config.train.steps * flops / peak["flops_per_second"]
        work += (
            f": at least {_duration(seconds)} at {peak['flops_per_second']:.3g} FLOP/s, the peak"
        )
    name = printable(str(data.get("train") or data.get("dataset") or ""))
    return (
        f"{config.run.task}: {members}{counts['total']:,} parameters{active}; "
        f"{name}{'; ' if name else ''}{config.train.steps:,} steps of {batch}\n"
        f"{devices}{', mesh ' if mesh else ''}{mesh}; {work}"
    )


def ending(config: Config, step: int, scores: Mapping[str, float], samples: bool) -> str:
    """What came out, where it is, and the command that samples from it.

    Args:
      config: of the run.
      step: the last one.
      scores: held-out metrics; empty if there were none.
      samples: whether one can sample from the run.
    """
    average, raw = f"the average {config.ema.use}", scores.get("loss")
    part = "ema/" if "ema/loss" in scores else ""  # what is sampled
    own = {n.removeprefix(part): v for n, v in scores.items() if n.startswith(part)}
    own = {n: v for n, v in own.items() if isinstance(v, float) and "/" not in n}
    named = [f"{n} {own[n]:.4g}" for n in sorted(own, key=lambda n: n != "loss")]
    held_out = f"; held-out {', '.join(named[:MOST])}" if named else ""
    if part:
        held_out += f" of {average}"
        if raw < own["loss"]:
            held_out += f", which is behind: {raw:.4g} with --ema=none"
    shown = printable(config.run.workdir)
    line = f"{shown}: step {step}{held_out}; curves in {shown}/plots"
    if not samples:
        return line
    flags = [f"--workdir={shlex.quote(shown)}"]
    flags += [f"--task={config.run.task}"] if is_outside(config.run.task) else []
    flags += [f"--code={','.join(config.outside())}"] if config.outside() else []
    return f"{line}\npython -m genai_jax.sample {' '.join(flags)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return str(datetime.timedelta(seconds=round(seconds)))
