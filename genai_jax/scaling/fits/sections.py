"""Sections of the report on a scaling law: text, tables, figures and numbers of each."""

from __future__ import annotations

import numpy as np

from genai_jax.scaling.fits import plots
from genai_jax.scaling.fits.all_laws import Fits
from genai_jax.scaling.fits.envelope import Envelope
from genai_jax.scaling.fits.fit import Fit
from genai_jax.scaling.fits.isoflop import SAME_BUDGET, IsoFlop
from genai_jax.scaling.fits.optimum import Estimate, Optimum
from genai_jax.scaling.fits.points import Curve, Points
from genai_jax.scaling.fits.power_law import KAPLAN, PowerLaw
from genai_jax.scaling.report_types import Section, Table

LOOSE = 30  # high end of an interval over its low end, from which a coefficient is not fixed
INTERVAL = ("value", "95 % low", "95 % high")


def joint(fits: Fits, hidden: Points, unit: str) -> Section:
    parametric, projected, joint = fits.parametric, fits.projected, fits.joint
    intervals, others = parametric.intervals(), projected.intervals()
    rows = [
        (name, value, *intervals[name], projected.values[i], *others[name])
        for i, (name, value) in enumerate(parametric.values.items())
    ]
    joint_intervals = joint.intervals()
    errors = {"parametric": parametric, "joint": joint}
    rms = {name: _rms(law.loss(fits.points.parameters, fits.points.tokens), fits.points.loss)
           for name, law in errors.items()}  # fmt: skip
    return Section(
        "Loss by size and tokens",
        [
            f"{parametric.law.title}: {_law_text(parametric.values)}. Sum of the Huber losses of "
            f"log loss over {len(fits.points.loss)} runs: {parametric.objective:.4g}; of "
            f"{parametric.starts[0]} starts {parametric.starts[1]} came to within 0.1 % of it. "
            f"Relative error, root mean square: {100 * rms['parametric']:.3g} %. "
            + _trust(parametric),
            "Beside it the same law by variable projection, which minimizes squares of relative "
            f"errors (root mean square {100 * projected.error:.3g} %). Intervals are percentiles "
            f"of {len(parametric.samples)} resamples of the runs, beginning at the best fit.",
            f"{joint.law.title}: relative error, root mean square: {100 * rms['joint']:.3g} %. It "
            "has no irreducible loss. " + _trust(joint),
        ],
        [
            Table("parametric_law", ("coefficient", *INTERVAL, "variable projection",
                                     "95 % low ", "95 % high "), rows),
            Table("joint_law", ("coefficient", *INTERVAL),
                  [(name, value, *joint_intervals[name]) for name, value in joint.values.items()]),
        ],
        {
            "law": plots.law(fits.points, hidden, parametric, fits.cost, unit),
            "residuals": plots.residuals(fits.points, hidden, parametric, unit),
        },
        {
            **{f"parametric/{name}": value for name, value in parametric.values.items()},
            **_bounds("parametric", intervals),
            "parametric/rms_relative_error": rms["parametric"],
            **{f"variable_projection/{row[0]}": float(row[4]) for row in rows},
            **{f"kaplan_joint/{name}": value for name, value in joint.values.items()},
            **_bounds("kaplan_joint", joint_intervals),
            "kaplan_joint/rms_relative_error": rms["joint"],
        },
    )  # fmt: skip


def _trust(law: Fit) -> str:
    """What keeps its coefficients from being taken at face value."""
    spans = {
        name: high / low if low > 0 else np.inf for name, (low, high) in law.intervals().items()
    }
    loose = [name for name, span in spans.items() if span > LOOSE and len(law.samples)]
    said = [] if law.converged else ["Not every fit converged."]
    if loose:
        said.append(
            f"These runs hardly fix {', '.join(loose)}, whose intervals span a factor of more than "
            f"{LOOSE}: the law may be used between the runs, its coefficients not."
        )
    return " ".join(said)


def _law_text(values: dict[str, float]) -> str:
    return (
        f"L = {values['E']:.4g} + {values['A']:.4g} / N^{values['alpha']:.4g} + "
        f"{values['B']:.4g} / D^{values['beta']:.4g}"
    )


def _bounds(prefix: str, intervals: dict) -> dict[str, float]:
    return {
        f"{prefix}/{name}/{end}": float(value)
        for name, pair in intervals.items()
        for end, value in zip(("low", "high"), pair, strict=True)
    }


def _rms(predicted: np.ndarray, actual: np.ndarray) -> float:
    return float(np.sqrt(np.mean((predicted / actual - 1) ** 2)))


def single(fits: Fits, unit: str) -> Section:
    rows, numbers = [], {}
    laws = {of: law for of, law in fits.single.items() if not isinstance(law, str)}
    reasons = [law for law in fits.single.values() if isinstance(law, str)]
    for of, law in laws.items():
        interval = law.alpha_interval()
        rows.append((KAPLAN[of][1], law.alpha, *interval, law.critical, len(law.x)))
        numbers |= {f"kaplan/alpha_{of}": law.alpha, f"kaplan/{of}_c": law.critical}
        numbers |= _bounds("kaplan", {f"alpha_{of}": interval})
    return Section(
        "Loss by one of size, tokens and compute",
        [
            "Lines through the frontier of the runs, those that no run with as little or less of "
            "the same thing beats. The law of N is of runs that more tokens would not help, and "
            "that of D of runs that a larger size would not: as far as these runs are not, their "
            "exponents are too small.",
            *(f"Not fitted: {reason}." for reason in reasons),
        ],
        [Table("one_variable", ("law", "exponent", *INTERVAL[1:], "critical value", "runs"), rows)],
        {"one_variable": plots.single(fits.points, laws, unit)} if laws else {},
        numbers,
    )


def isoflop(fits: Fits, unit: str) -> Section:
    title = "Best size by isoFLOP parabolas"
    if isinstance(fits.isoflop, str):
        return Section(title, [f"Not fitted: {fits.isoflop}."])
    iso = fits.isoflop
    rows = [
        (v.budget, len(v.runs), v.parameters, v.tokens, v.tokens / v.parameters, v.loss)
        if v.inside else (v.budget, len(v.runs), None, None, None, None) for v in iso.valleys
    ]  # fmt: skip
    laws = {"N": iso.parameters, "D": iso.tokens, "L": iso.loss}
    return Section(
        title,
        [
            "Hoffmann et al. 2022, approach 2: a parabola of loss in log N through the runs of "
            "each budget, and power laws of the budget through their minima. A row without a size "
            "has no minimum between its smallest and largest run, and is not used.",
        ],
        [
            Table("isoflop_minima", ("budget (FLOPs)", "runs", "best size N", "tokens D", "D / N",
                                     f"loss ({unit})"), rows),
            _power_table("isoflop_laws", laws),
        ],
        {"isoflop": plots.isoflop(fits.points, iso, unit)},
        {
            **_power_numbers("isoflop", laws),
            "isoflop/minima_inside": sum(v.inside for v in iso.valleys),
        },
    )  # fmt: skip


def envelope(fits: Fits, curves: list[Curve] | None, unit: str) -> Section:
    title = "Best size by the envelope of training curves"
    if isinstance(fits.envelope, str):
        return Section(title, [f"Not fitted: {fits.envelope}."])
    laws = {"N": fits.envelope.parameters_law, "D": fits.envelope.tokens_law}
    return Section(
        title,
        [
            "Hoffmann et al. 2022, approach 1: at each FLOP count along the way the best run, and "
            "power laws through their sizes and tokens. A run in the middle of its learning-rate "
            "schedule is worse than one that ends there.",
        ],
        [_power_table("envelope_laws", laws)],
        {"envelope": plots.envelope(curves, fits.envelope, unit)},
        _power_numbers("envelope", laws),
    )


def _power_table(name: str, laws: dict) -> Table:
    rows = [
        (f"{of} of the best run", float(law(1.0)[0]), law.power, *law.power_interval())
        for of, law in laws.items()
    ]
    return Table(name, ("law", "factor", "exponent of C", *INTERVAL[1:]), rows)


def _power_numbers(prefix: str, laws: dict) -> dict[str, float]:
    exponents = {f"{of}_exponent": law.power for of, law in laws.items()}
    found = {f"{prefix}/{name}": value for name, value in exponents.items()}
    intervals = {f"{of}_exponent": law.power_interval() for of, law in laws.items()}
    return found | _bounds(prefix, intervals)


def optimum(
    fits: Fits, optima: list[Optimum], left_out: list[float], extrapolate: float
) -> Section:
    """left_out: budgets of the runs for which the parametric law has no answer among them."""
    power_laws = {"isoFLOP": _size_laws(fits.isoflop), "envelope": _size_laws(fits.envelope)}
    budgets = [best.budget for best in optima]
    approaches = {"parametric": optima} | {
        name: [_by_power_laws(b, *laws) for b in asked]
        for name, laws in power_laws.items()
        if laws and (asked := [b for b in budgets if _known(b, laws, extrapolate)])
    }
    rows = [
        (best.budget, name, *best.parameters, *best.tokens,
         best.tokens.value / best.parameters.value, *(best.loss or (None, None, None)))
        for name, found in approaches.items() for best in found
    ]  # fmt: skip
    heads = ("budget (FLOPs)", "by", "N", "N low", "N high", "D", "D low", "D high", "D / N",
             "loss", "loss low", "loss high")  # fmt: skip
    values = fits.parametric.values
    exponent = values["beta"] / (values["alpha"] + fits.cost.power * values["beta"])
    return Section(
        "Compute-optimal runs",
        [
            f"What a run costs, fitted to these runs: C = {fits.cost.factor:.4g} N^"
            f"{fits.cost.power:.4g} D FLOPs, to within {100 * fits.cost.error:.2g} % of each. With "
            f"it the parametric law is least at N = const C^{exponent:.4g}.",
            *(() if optima else ("No budget of these runs has its best size between theirs.",)),
            *(
                (
                    f"Not judged, as the best size or tokens would be outside of the runs: "
                    f"{', '.join(f'{b:.3g}' for b in left_out)} FLOPs.",
                )
                if left_out
                else ()
            ),
            "The isoFLOP and envelope laws are asked only between the budgets they were fitted to"
            + (f", or {extrapolate:g} times beyond." if extrapolate > 1 else "."),
        ],
        [Table("optimum", heads, rows)],
        {"optimum": plots.optima(approaches)} if optima else {},
        {"optimum/N_exponent": exponent},
    )


def _size_laws(found: IsoFlop | Envelope | str) -> tuple[PowerLaw, ...]:
    """The laws of N and of D, or nothing."""
    if isinstance(found, str):
        return ()
    if isinstance(found, IsoFlop):
        return found.parameters, found.tokens
    return found.parameters_law, found.tokens_law


def _known(budget: float, laws: tuple[PowerLaw, ...], extrapolate: float) -> bool:
    """Whether all of them were fitted to such budgets, or to ones hardly different."""
    margin = extrapolate * SAME_BUDGET
    return all(law.range[0] / margin <= budget <= law.range[1] * margin for law in laws)


def _by_power_laws(budget: float, *laws: PowerLaw) -> Optimum:
    """Without a loss, of which only the parametric law knows where it ends."""
    sizes = (Estimate.of(law(budget)[0], law.sampled(budget)[:, 0]) for law in laws)
    return Optimum(budget, *sizes, None)


def held_out(fits: Fits, hidden: Points, unit: str) -> Section:
    predicted = {
        "parametric": fits.parametric.loss(hidden.parameters, hidden.tokens),
        "variable_projection": fits.projected.loss(hidden.parameters, hidden.tokens),
        "kaplan_joint": fits.joint.loss(hidden.parameters, hidden.tokens),
    }
    if not isinstance(fits.single["C"], str):
        predicted["kaplan_C"] = fits.single["C"].line(hidden.flops)
    samples = fits.parametric.sampled_losses(hidden.parameters, hidden.tokens)
    spread = [Estimate.of(*pair) for pair in zip(predicted["parametric"], samples.T, strict=True)]
    errors = {name: loss / hidden.loss - 1 for name, loss in predicted.items()}
    rows = [
        (hidden.parameters[i], hidden.tokens[i], hidden.flops[i], hidden.loss[i], *spread[i],
         *(100 * error[i] for error in errors.values()))
        for i in np.argsort(hidden.flops)
    ]  # fmt: skip
    heads = ("N", "D", "FLOPs", f"loss ({unit})", "predicted (parametric)", *INTERVAL[1:],
             *(f"error of {name} (%)" for name in errors))  # fmt: skip
    beyond = hidden.flops.max() / fits.points.flops.max()
    worst = float(np.max(np.abs(errors["parametric"])))
    return Section(
        "Held-out runs",
        [
            f"{len(hidden.loss)} runs that no law was fitted to, up to {beyond:.3g} times the "
            "FLOPs of the largest that was. The parametric law is off by "
            f"{100 * worst:.3g} % of the loss at most. Its interval is that of the law, without "
            "what a run scatters about it; kaplan_C holds for runs on the frontier.",
        ],
        [Table("held_out", heads, rows)],
        {"held_out": plots.held_out(fits.points, hidden, fits.parametric, unit)},
        {
            f"held_out/{name}/max_relative_error": float(np.max(np.abs(error)))
            for name, error in errors.items()
        },
    )
