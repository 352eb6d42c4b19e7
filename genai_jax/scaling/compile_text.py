"""The report of a compile check as text."""

from __future__ import annotations

from genai_jax.scaling.whole_run import as_lines

GIB = 2**30


def as_text(name: str, report: dict) -> str:
    """The report as text for the terminal, or for a file next to the flagfile."""
    parts = [_head(name, report)]
    if "memory" in report:
        parts += [_memory(report), _work(report), _collectives(report)]
    if "predicted" in report:
        parts.append(_predicted(report))
    if "run" in report:
        convention = "" if "memory" in report else report["convention"]
        parts.append("\n".join(as_lines(report["run"], convention)))
    if "fits" in report:
        parts.append(_verdict(report))
    return "\n\n".join(parts)


def _head(name: str, report: dict) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "1"
    slices = f", {report['slices']} slices" if report["slices"] > 1 else ""
    tokens = report["tokens_per_step"]
    batch = f"{report['batch_size']:,} examples" + (f", {tokens:,} tokens" if tokens else "")
    versions = ", ".join(f"{n} {v}" for n, v in report["versions"].items())
    return (
        f"{name}\n"
        f"{report['topology']}{slices}: {report['devices']:,} devices as {mesh} ({versions})\n"
        f"{report['parameters']:,} parameters, {batch} per step"
    )


def _memory(report: dict) -> str:
    memory, capacity = report["memory"], report["capacity"]
    rows = [f"memory per device in GiB (of {capacity / GIB:.2f})"]
    rows += [f"  {name:12} {size / GIB:8.2f}" for name, size in memory.items() if size]
    return "\n".join(rows)


def _work(report: dict) -> str:
    devices = report["devices"]
    rows = [
        ("model FLOPs", f"{report['flops_per_step'] / devices:.4g}", report["convention"]),
        ("program FLOPs", f"{report['program_flops']:.4g}", "as compiled, all loop iterations"),
    ]
    if report["compiler_flops"]:
        note = "the compiler's own count, loop bodies counted once"
        rows.append(("compiler FLOPs", f"{report['compiler_flops']:.4g}", note))
    rows.append(("HBM bytes", f"{report['hbm_bytes']:.4g}", "read and written"))
    return "work per device and step\n" + "\n".join(f"  {n:14} {v:>10}  {c}" for n, v, c in rows)


def _collectives(report: dict) -> str:
    lines = [
        "collectives per device and step",
        f"  {'kind':18} {'axes':12} {'':8} times       sent  on the links",
    ]
    for c in report["collectives"]:
        lines.append(
            f"  {c['kind']:18} {c['axes']:12} {c['overlap']:8} {c['times']:5} "
            f"{c['bytes_sent'] / 1e9:7.3f} GB  {c['seconds'] * 1e3:8.2f} ms"
        )
    return "\n".join(lines if len(lines) > 2 else ["no collectives"])


def _predicted(report: dict) -> str:
    p = report["predicted"]
    bounds = ", ".join(f"{name} {s:.3f} s" for name, s in p["bounds_seconds"].items())
    return (
        f"predicted step time {p['step_seconds']:.3f} s (compute {p['compute_seconds']:.3f}, "
        f"exposed communication {p['exposed_seconds']:.3f}), MFU {p['mfu']:.1%}\n"
        f"lower bounds: {bounds}; the largest allows an MFU of {p['roofline_mfu']:.1%}\n"
        "assumptions\n" + "\n".join(f"  - {line}" for line in report["assumptions"])
    )


def _verdict(report: dict) -> str:
    if report["fits"]:
        total, capacity = report["memory"]["total"], report["capacity"]
        return f"fits: {total / GIB:.2f} of {capacity / GIB:.2f} GiB"
    return (
        "does not fit: "
        + report["largest"][0]
        + "\n"
        + "\n".join(f"  {line}" for line in report["largest"][1:])
    )


def side_by_side(one: dict, other: dict) -> str:
    """Two reports side by side, with the ratio of the second to the first."""
    rows = [f"{'':24} {'first':>12} {'second':>12} {'ratio':>8}"]
    firsts, seconds = _numbers(one), _numbers(other)
    for name in firsts | seconds:
        pair = firsts.get(name), seconds.get(name)
        cells = ["-" if value is None else f"{value:.4g}" for value in pair]
        ratio = f"{pair[1] / pair[0]:8.3f}" if all(pair) else ""
        rows.append(f"{name:24} {cells[0]:>12} {cells[1]:>12} {ratio}".rstrip())
    return "\n".join(rows)


def _numbers(report: dict) -> dict[str, float]:
    """The numbers by which two runs are compared."""
    numbers = {"parameters": report["parameters"], "batch_size": report["batch_size"]}
    numbers["model FLOPs per device"] = report["flops_per_step"] / report["devices"]
    if "memory" in report:
        numbers["memory GiB"] = report["memory"]["total"] / GIB
        numbers["program FLOPs"] = report["program_flops"]
        numbers["HBM bytes"] = report["hbm_bytes"]
        for c in report["collectives"]:
            name = f"sent by {c['kind']}"
            numbers[name] = numbers.get(name, 0) + c["bytes_sent"]
    if "predicted" in report:
        numbers["step s"] = report["predicted"]["step_seconds"]
        numbers["MFU"] = report["predicted"]["mfu"]
    if "run" in report:
        run = report["run"]
        numbers["FLOPs of the run"] = run["flops"]
        for kind in ("predicted", "assumed"):
            if kind in run:
                numbers[f"chip-hours, {kind}"] = run[kind]["chip_hours"]
    return numbers
