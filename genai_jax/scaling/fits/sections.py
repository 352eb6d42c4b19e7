"""The sections of a scaling-law report, each with text, tables, figures and numbers."""

from __future__ import annotations

import numpy as np

from genai_jax.scaling.edges import sentences
from genai_jax.scaling.fits import plots
from genai_jax.scaling.fits.all_laws import Fits
from genai_jax.scaling.fits.envelope import Envelope
from genai_jax.scaling.fits.fit import Fit
from genai_jax.scaling.fits.isoflop import SAME_BUDGET, IsoFlop, valleys_of
from genai_jax.scaling.fits.optimum import Estimate, Optimum
from genai_jax.scaling.fits.points import Curve, Points
from genai_jax.scaling.fits.power_law import KAPLAN, PowerLaw
from genai_jax.scaling.report_types import Section, Table

LOOSE = 30  # ratio of an interval's ends above which a coefficient counts as undetermined
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
        "Loss as a function of size and tokens",
        [
            f"{parametric.law.title}: {_law_text(parametric.values)}. The sum of the Huber losses "
            f"of log-loss residuals over {len(fits.points.loss)} runs is "
            f"{parametric.objective:.4g}; {parametric.starts[1]} of {parametric.starts[0]} "
            "starting points ended within 0.1% of it. The root-mean-square relative error is "
            f"{100 * rms['parametric']:.3g}%. " + _trust(parametric),
            "For comparison, the table gives the same law fitted by variable projection, which "
            "minimizes the squares of relative errors (root mean square "
            f"{100 * projected.error:.3g}%). Intervals are bootstrap percentiles over "
            f"{len(parametric.samples)} resamples of the runs, fitted from the best fit.",
            f"{joint.law.title}: the root-mean-square relative error is "
            f"{100 * rms['joint']:.3g}%. This law has no irreducible loss. " + _trust(joint),
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
    """Caveats about the coefficients of a law; empty if there are none."""
    with np.errstate(over="ignore"):  # a coefficient that these runs do not determine at all
        spans = {
            name: high / low if low > 0 else np.inf for name, (low, high) in law.intervals().items()
        }
    loose = [name for name, span in spans.items() if span > LOOSE and len(law.samples)]
    caveats = [] if law.converged else ["Not every fit converged."]
    if loose:
        caveats.append(
            f"These runs hardly determine {', '.join(loose)}, whose intervals span a factor of "
            f"more than {LOOSE}: the law can be used to interpolate between the runs, but its "
            "coefficients should not be interpreted."
        )
    return " ".join(caveats)


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
        "Loss as a function of size, tokens or compute alone",
        [
            "Power laws fitted to the frontier: the runs that no other run with the same or less "
            "of that quantity beats. The law of N assumes runs that more tokens would not improve, "
            "and the law of D runs that a larger model would not improve; to the extent that these "
            "runs violate that, the exponents are too small.",
            *(f"Not fitted: {reason}." for reason in reasons),
        ],
        [Table("one_variable", ("law", "exponent", *INTERVAL[1:], "critical value", "runs"), rows)],
        {"one_variable": plots.single(fits.points, laws, unit)} if laws else {},
        numbers,
    )


def isoflop(fits: Fits, unit: str) -> Section:
    title = "Compute-optimal size from isoFLOP parabolas"
    ends = [(f"{v.budget:.3g} FLOPs", v.edge) for v in valleys_of(fits.points)]
    edges = sentences("size N", ends, "minimum of the parabola")
    if isinstance(fits.isoflop, str):
        return Section(title, [f"Not fitted: {fits.isoflop}.", *edges])
    iso = fits.isoflop
    rows = [
        (v.budget, len(v.runs), v.parameters, v.tokens, v.tokens / v.parameters, v.loss)
        if v.inside else (v.budget, len(v.runs), None, None, None, None) for v in iso.valleys
    ]  # fmt: skip
    laws = {"N": iso.parameters, "D": iso.tokens, "L": iso.loss}
    return Section(
        title,
        [
            "Hoffmann et al. 2022, approach 2: for each budget, a parabola in log N is fitted to "
            "the losses of its runs, and power laws in the budget are fitted to the minima. A "
            "budget without a size in the table has no minimum between its smallest and largest "
            "run and is not used.",
            *edges,
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
    title = "Compute-optimal size from the envelope of training curves"
    if isinstance(fits.envelope, str):
        return Section(title, [f"Not fitted: {fits.envelope}."])
    laws = {"N": fits.envelope.parameters_law, "D": fits.envelope.tokens_law}
    smallest, largest = fits.envelope.edges
    return Section(
        title,
        [
            "Hoffmann et al. 2022, approach 1: power laws fitted to the sizes and tokens of the "
            "best run at each FLOP count during training. Note that a run in the middle of its "
            "learning-rate schedule is worse than one whose schedule ends there.",
            "Not used, because an even smaller or larger one may be better: the FLOP counts where "
            f"the smallest of the runs that reach them is the best ({smallest:.0%} of those that "
            f"several sizes reach) or the largest ({largest:.0%}).",
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
    exponents = {f"{prefix}/{of}_exponent": law.power for of, law in laws.items()}
    intervals = {f"{of}_exponent": law.power_interval() for of, law in laws.items()}
    return exponents | _bounds(prefix, intervals)


def optimum(
    fits: Fits, optima: list[Optimum], left_out: list[float], extrapolate: float
) -> Section:
    """left_out: budgets of the runs whose optimum by the parametric law is outside their range."""
    power_laws = {"isoFLOP": _size_laws(fits.isoflop), "envelope": _size_laws(fits.envelope)}
    budgets = [best.budget for best in optima]
    approaches = {"parametric": optima} | {
        name: [_by_power_laws(b, *laws) for b in valid]
        for name, laws in power_laws.items()
        if laws and (valid := [b for b in budgets if _in_range(b, laws, extrapolate)])
    }
    rows = [
        (best.budget, name, *best.parameters, *best.tokens,
         best.tokens.value / best.parameters.value, *(best.loss or (None, None, None)))
        for name, best_runs in approaches.items() for best in best_runs
    ]  # fmt: skip
    heads = ("budget (FLOPs)", "by", "N", "N low", "N high", "D", "D low", "D high", "D / N",
             "loss", "loss low", "loss high")  # fmt: skip
    values = fits.parametric.values
    exponent = values["beta"] / (values["alpha"] + fits.cost.power * values["beta"])
    return Section(
        "Compute-optimal runs",
        [
            f"The cost fitted to these runs is C = {fits.cost.factor:.4g} N^"
            f"{fits.cost.power:.4g} D FLOPs, within {100 * fits.cost.error:.2g}% of each run. "
            "With this cost, the parametric law has its compute-optimal size at N proportional to "
            f"C^{exponent:.4g}.",
            *(
                ()
                if optima
                else ("No budget of these runs has its optimum within their range of sizes.",)
            ),
            *(
                (
                    "Left out because their optimal size or tokens would be outside the range "
                    f"of the runs: budgets of {', '.join(f'{b:.3g}' for b in left_out)} FLOPs.",
                )
                if left_out
                else ()
            ),
            "The isoFLOP and envelope laws are used only within the range of budgets they were "
            "fitted to"
            + (f", extended by a factor of {extrapolate:g}." if extrapolate > 1 else "."),
        ],
        [Table("optimum", heads, rows)],
        {"optimum": plots.optima(approaches)} if optima else {},
        {"optimum/N_exponent": exponent},
    )


def _size_laws(fit: IsoFlop | Envelope | str) -> tuple[PowerLaw, ...]:
    """The laws of N and D; empty if there was no fit."""
    if isinstance(fit, str):
        return ()
    if isinstance(fit, IsoFlop):
        return fit.parameters, fit.tokens
    return fit.parameters_law, fit.tokens_law


def _in_range(budget: float, laws: tuple[PowerLaw, ...], extrapolate: float) -> bool:
    """Whether a budget is in the fitted range of all laws, or close enough."""
    margin = extrapolate * SAME_BUDGET
    return all(law.range[0] / margin <= budget <= law.range[1] * margin for law in laws)


def _by_power_laws(budget: float, *laws: PowerLaw) -> Optimum:
    """The optimum by power laws of N and D, which do not predict its loss."""
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
            f"{len(hidden.loss)} runs were held out from all fits, with up to {beyond:.3g} times "
            "the FLOPs of the largest fitted run. The parametric law predicts their losses to "
            f"within {100 * worst:.3g}%. Its intervals reflect the uncertainty of the law, not "
            "the scatter of single runs; kaplan_C applies to runs on the frontier.",
        ],
        [Table("held_out", heads, rows)],
        {"held_out": plots.held_out(fits.points, hidden, fits.parametric, unit)},
        {
            f"held_out/{name}/max_relative_error": float(np.max(np.abs(error)))
            for name, error in errors.items()
        },
    )
