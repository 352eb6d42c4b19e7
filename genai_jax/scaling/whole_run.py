"""What a whole run costs: its FLOPs, and the time and chip-hours for them.

Costs are of the training steps alone: evaluation, checkpoints, restarts, and waiting for data come
on top.
"""

from __future__ import annotations

from collections.abc import Mapping

from genai_jax.scaling.chips import Topology


def whole_run(
    report: Mapping, steps: int, dtype: str, topology: Topology, assumed_mfu: float
) -> dict:
    """The part of a report of `compile_check` that is about all steps together.

    Args:
      report: with ``batch_size``, ``tokens_per_step``, and ``flops_per_step``; if the step was
        compiled for a known chip, with ``predicted``.
      steps: ``--train.steps``.
      dtype: of the matmuls.
      topology: the devices.
      assumed_mfu: model FLOPs utilization of a run without a predicted step time.

    Returns:
      ``steps``, ``examples``, ``tokens`` (None if the task has none), ``flops`` (by the report's
      ``convention``), and for a known chip ``chips``, ``dtype``, ``peak`` (FLOP/s of a chip), and
      costs, each a dictionary of ``seconds`` and ``chip_hours``: ``at_peak``, which nothing can
      beat, and ``predicted``, or else ``assumed``, which has its ``mfu`` as well.
    """
    tokens = report["tokens_per_step"]
    run = {
        "steps": steps,
        "examples": steps * report["batch_size"],
        "tokens": steps * tokens if tokens else None,
        "flops": steps * report["flops_per_step"],
    }
    chip = topology.chip
    if chip is None:
        return run
    peak = chip.peak(dtype) * chip.devices
    fastest = run["flops"] / (peak * topology.num_chips)
    run |= {"chips": topology.num_chips, "dtype": dtype, "peak": peak}
    run["at_peak"] = _cost(fastest, topology)
    if "predicted" in report:
        run["predicted"] = _cost(steps * report["predicted"]["step_seconds"], topology)
    else:
        run["assumed"] = {"mfu": assumed_mfu, **_cost(fastest / assumed_mfu, topology)}
    return run


def _cost(seconds: float, topology: Topology) -> dict[str, float]:
    return {"seconds": seconds, "chip_hours": seconds / 3600 * topology.num_chips}


def as_lines(run: Mapping, convention: str) -> list[str]:
    """The whole run as text; `convention`, unless empty, is that of its FLOPs."""
    tokens = f", {run['tokens']:,} tokens" if run["tokens"] else ""
    lines = [
        f"whole run: {run['steps']:,} steps, {run['examples']:,} examples{tokens}, "
        f"{run['flops']:.4g} model FLOPs"
    ]
    lines += [f"  FLOPs: {convention}"] if convention else []
    if "peak" not in run:
        return lines
    if "predicted" in run:
        lines.append(f"  predicted   {_shown(run['predicted'], run['chips'])}")
    if "assumed" in run:
        mfu = f"if the MFU is {run['assumed']['mfu']:.0%}, which is an assumption"
        lines.append(f"  assumed     {_shown(run['assumed'], run['chips'])}; {mfu}")
    rate = f"{run['peak'] / 1e12:,.0f} TFLOP/s of a chip in {run['dtype']}"
    lines.append(f"  at least    {_shown(run['at_peak'], run['chips'])}; at the peak of {rate}")
    lines.append("  evaluation, checkpoints, restarts, and waiting for data come on top")
    return lines


def _shown(cost: Mapping[str, float], chips: int) -> str:
    return (
        f"{time_text(cost['seconds'])} on {chips:,} chip{'s' * (chips > 1)}, "
        f"{hours_text(cost['chip_hours'])} chip-hours"
    )


def hours_text(hours: float) -> str:
    """Chip-hours with at least three digits, whole above 100."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def time_text(seconds: float) -> str:
    """A time in its largest fitting unit, with three digits."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{seconds:.3g} seconds"
