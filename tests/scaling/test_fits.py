"""Fits of scaling laws to data with known coefficients."""

import numpy as np
import pytest
from scipy import optimize

from genai_jax.config import ConfigError
from genai_jax.scaling.fits.bootstrap import interval, resampled
from genai_jax.scaling.fits.envelope import fit_envelope
from genai_jax.scaling.fits.fit import fit, huber_sums
from genai_jax.scaling.fits.isoflop import fit_isoflop
from genai_jax.scaling.fits.laws import KaplanJoint, Parametric
from genai_jax.scaling.fits.minimize import minimize
from genai_jax.scaling.fits.optimum import (
    Cost,
    check_budget,
    check_optimum,
    fit_cost,
    optimum,
)
from genai_jax.scaling.fits.points import Curve, Points, make_points
from genai_jax.scaling.fits.power_law import fit_kaplan, fit_power_law, frontier
from genai_jax.scaling.fits.variable_projection import fit_projected, nonnegative

LAW = Parametric()
VALUES = np.array([1.69, 406.4, 410.7, 0.34, 0.28])  # E, A, B, alpha, beta of Hoffmann et al. 2022
E, A, B, ALPHA, BETA = VALUES
START = np.array([[5.0, 5.0, 0.5, 0.5, 0.5]])  # a point of the paper's grid


def loss_of(parameters, tokens):
    return E + A * parameters**-ALPHA + B * tokens**-BETA


def runs(count: int, noise: float = 0.0, seed: int = 0) -> Points:
    rng = np.random.default_rng(seed)
    parameters = np.exp(rng.uniform(*np.log([5e7, 1.6e10]), count))
    tokens = np.exp(rng.uniform(*np.log([1e9, 5e11]), count))
    scatter = np.exp(noise * rng.standard_normal(count))
    return make_points(parameters, tokens, loss_of(parameters, tokens) * scatter)


def best_size(budget):
    """Hoffmann et al. 2022, equation 4."""
    return (ALPHA * A / (BETA * B) * (budget / 6) ** BETA) ** (1 / (ALPHA + BETA))


def ladder(budgets, sizes=7, spread=3.0) -> Points:
    """Runs of each budget, from `spread` times too small to `spread` times too large."""
    pairs = [
        (best_size(c) * f, c / 6 / best_size(c) / f)
        for c in budgets
        for f in np.geomspace(1 / spread, spread, sizes)
    ]
    parameters, tokens = np.array(pairs).T
    return make_points(parameters, tokens, loss_of(parameters, tokens))


def errors(fitted) -> np.ndarray:
    return np.abs(np.array(list(fitted.values.values())) / VALUES - 1)


@pytest.mark.smoke
def test_known_coefficients_are_recovered_from_the_full_grid_of_starts():
    fitted = fit(LAW, runs(200))
    assert fitted.starts[0] == 4500 and fitted.starts[1] > 100 and fitted.converged
    assert errors(fitted).max() < 1e-6


def test_a_mean_with_default_tolerances_stops_far_from_the_minimum_but_ours_does_not():
    points = runs(200)
    logs = np.log(points.parameters), np.log(points.tokens), np.log(points.loss)

    def mean(x):
        value, gradient = huber_sums(LAW, x[None], *logs)
        return value[0] / 200, gradient[0] / 200

    stopped = optimize.minimize(mean, START[0], jac=True, method="L-BFGS-B")
    assert stopped.success
    assert np.max(np.abs(LAW.values(stopped.x) / VALUES - 1)) > 0.05
    assert errors(fit(LAW, points, starts=START)).max() < 1e-6


@pytest.mark.parametrize("law", [Parametric(), KaplanJoint()])
def test_gradients_are_those_of_the_objective(law):
    rng = np.random.default_rng(0)
    log_n, log_d, log_loss = rng.normal(size=(3, 9))
    weights = rng.integers(0, 3, (4, 9)).astype(float)
    x = rng.normal(0, 0.5, (4, len(law.coefficients)))
    value = lambda x: huber_sums(law, x, log_n, log_d, log_loss, weights)[0]
    steps = 1e-6 * np.eye(x.shape[1])
    numeric = np.stack([(value(x + s) - value(x - s)) / 2e-6 for s in steps], -1)
    gradient = huber_sums(law, x, log_n, log_d, log_loss, weights)[1]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("law", [Parametric(), KaplanJoint()])
def test_moving_the_reference_leaves_a_law_unchanged(law):
    x = np.array([[4.0, 3.0, -0.3, 0.2, 0.4][: len(law.coefficients)]])
    log_n, log_d = np.array([18.0, 20, 23]), np.array([24.0, 21, 22])
    here = law.predict(x, log_n, log_d)[0]
    there = law.predict(law.moved(x, 20, 21), log_n - 20, log_d - 21)[0]
    np.testing.assert_allclose(here, there, rtol=1e-12)
    np.testing.assert_allclose(law.moved(law.moved(x, 20, 21), -20, -21), x, rtol=1e-12)


def test_a_batch_of_minimizations_converges():
    def rosenbrock(x, rows):
        a, b = x.T
        value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
        slope = np.stack([-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2)], -1)
        outside = np.abs(x).max(1) > 50  # steps there are rejected
        return np.where(outside, np.nan, value), slope

    starts = np.random.default_rng(0).uniform(-2, 2, (20, 2))
    minima = minimize(rosenbrock, starts, tolerance=1e-12)
    assert minima.converged.all() and minima.evaluations.max() < 200
    np.testing.assert_allclose(minima.x, 1, atol=1e-5)
    cut = minimize(rosenbrock, starts, max_evaluations=3)
    assert not cut.converged.any() and (cut.evaluations == 3).all()


def test_intervals_cover_the_truth_and_are_reproducible():
    hits, starts = [], LAW.starts()[::73]
    for seed in range(8):
        fitted = fit(LAW, runs(200, 0.01, seed), starts=starts, resamples=60, seed=seed)
        low, high = np.array(list(fitted.intervals().values())).T
        hits.append((low <= VALUES) & (high >= VALUES))
    assert np.sum(hits, 0).min() >= 7
    again = fit(LAW, runs(200, 0.01, 7), starts=starts, resamples=60, seed=7)
    assert again.intervals() == fitted.intervals()
    other = fit(LAW, runs(200, 0.01, 7), starts=starts, resamples=60, seed=8)
    assert other.intervals() != fitted.intervals()


def test_resamples_keep_enough_points_and_intervals_are_percentiles():
    counts = resampled(6, 300, 0, 5)
    assert counts.sum(1).tolist() == [6.0] * 300
    assert (counts > 0).sum(1).min() == 5
    sizes = np.array([1, 1, 2, 2, 3, 3])
    counts = resampled(6, 300, 0, 3, sizes)
    assert all(len(np.unique(sizes[row > 0])) == 3 for row in counts)
    assert interval(np.arange(1001.0)) == (25, 975)
    assert interval(np.array([np.nan, 1.0, 2.0])) == (1, 2)
    assert np.isnan(interval(np.empty((0, 2)))).all()


def test_the_joint_law_of_kaplan_is_recovered():
    truth = np.array([8.8e13, 5.4e13, 0.076, 0.095])  # from the paper
    rng = np.random.default_rng(0)
    parameters = np.exp(rng.uniform(*np.log([1e6, 1e9]), 60))
    tokens = np.exp(rng.uniform(*np.log([1e7, 2e10]), 60))
    loss = ((truth[0] / parameters) ** (truth[2] / truth[3]) + truth[1] / tokens) ** truth[3]
    fitted = fit(KaplanJoint(), make_points(parameters, tokens, loss), resamples=20)
    np.testing.assert_allclose(list(fitted.values.values()), truth, rtol=1e-3)
    np.testing.assert_allclose(fitted.loss(parameters, tokens), loss, rtol=1e-6)


def test_laws_of_one_variable_are_fitted_to_the_frontier():
    x = np.array([1.0, 1, 2, 3, 4])
    assert frontier(x, np.array([5.0, 4, 4.5, 3, 2])).tolist() == [1, 3, 4]
    size = np.geomspace(1e6, 1e9, 12)
    loss = (8.8e13 / size) ** 0.076
    points = make_points(
        np.repeat(size, 2), 1e10 * np.ones(24), np.repeat(loss, 2) * np.tile([1, 1.2], 12)
    )
    law = fit_kaplan(points, "N")
    assert law.alpha == pytest.approx(0.076) and law.critical == pytest.approx(8.8e13, rel=1e-6)
    assert law.alpha_interval() == pytest.approx((0.076, 0.076))
    noisy = loss * np.exp(0.01 * np.random.default_rng(0).standard_normal(12))
    low, high = fit_power_law(size, noisy, 500, 0).power_interval()
    assert low < -0.076 < high and high - low < 0.01


def test_variable_projection_agrees_and_its_linear_part_is_never_negative():
    fitted = fit_projected(runs(100), resamples=10)
    np.testing.assert_allclose(fitted.values, VALUES, rtol=1e-5)
    np.testing.assert_allclose(fitted.samples, np.tile(VALUES, (10, 1)), rtol=1e-3)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 8, 3)) + 0.3
    weights = rng.integers(0, 3, (50, 8)) + 0.5
    ours = nonnegative(rows, weights)
    for row, weight, x in zip(rows, weights, ours, strict=True):
        root = np.sqrt(weight)
        np.testing.assert_allclose(x, optimize.nnls(row * root[:, None], root)[0], atol=1e-9)
    assert (ours == 0).any() and (ours > 0).any()


def test_parabolas_have_their_minima_at_the_best_sizes():
    budgets = np.geomspace(1e18, 1e21, 5)
    points = ladder(budgets)
    # A budget whose smallest run is best has no minimum between its runs.
    c = 4e21
    sizes = best_size(c) * np.array([2.0, 4, 8])
    edge = make_points(sizes, c / 6 / sizes, loss_of(sizes, c / 6 / sizes))
    both = Points(*(np.concatenate(pair) for pair in zip(points, edge, strict=True)))
    fitted = fit_isoflop(both, resamples=50)
    assert [v.inside for v in fitted.valleys] == [True] * 5 + [False]
    assert [v.edge for v in fitted.valleys] == [""] * 5 + ["smallest"]
    for valley, budget in zip(fitted.valleys, budgets, strict=False):
        assert valley.budget == pytest.approx(budget)
        assert valley.parameters == pytest.approx(best_size(budget), rel=0.05)
        assert 6 * valley.parameters * valley.tokens == pytest.approx(budget, rel=1e-6)
    exponent = BETA / (ALPHA + BETA)
    assert fitted.parameters.power == pytest.approx(exponent, abs=0.01)
    assert fitted.tokens.power == pytest.approx(1 - exponent, abs=0.01)
    low, high = fitted.parameters.power_interval()
    assert low < exponent < high
    with pytest.raises(ConfigError, match=r"2 budgets .* there are 1 \(of 1"):
        fit_isoflop(ladder([1e18]))


def test_the_envelope_of_curves_has_the_same_exponent():
    curves = []
    for size in np.geomspace(5e7, 1e10, 12):
        tokens = np.geomspace(1e8, 2e11 * (size / 5e8) ** 0.3, 60)
        curves.append(Curve(size, tokens, 6 * size * tokens, loss_of(size, tokens)))
    fitted = fit_envelope(curves, resamples=20)
    assert fitted.parameters_law.power == pytest.approx(BETA / (ALPHA + BETA), abs=0.02)
    np.testing.assert_allclose(6 * fitted.parameters * fitted.tokens, fitted.budget, rtol=0.02)
    assert fitted.parameters.min() > 5e7 and fitted.parameters.max() < 1e10  # without the ends
    smallest, largest = fitted.edges
    assert 0 < smallest < 0.5 and 0 <= largest < 0.5
    with pytest.raises(ConfigError, match="envelope of 2 training curves"):
        fit_envelope(curves[:2])


def test_the_optimum_of_a_budget_has_the_smallest_loss():
    points = ladder(np.geomspace(1e18, 1e21, 4), sizes=6)
    fitted = fit(LAW, points, starts=START, resamples=30)
    plain = optimum(fitted, fit_cost(points), 1e20)
    assert plain.parameters.value == pytest.approx(best_size(1e20), rel=1e-4)
    assert plain.parameters.low <= plain.parameters.value * 1.0001
    cost = Cost(factor=40.0, power=0.9, error=0.0)  # small models cost more than 6 N D
    best = optimum(fitted, cost, 1e20)
    sizes = best.parameters.value * np.array([0.9, 1.0, 1.1])
    tokens = 1e20 / (cost.factor * sizes**cost.power)
    assert tokens[1] == pytest.approx(best.tokens.value)
    losses = fitted.loss(sizes, tokens)
    assert losses[1] == pytest.approx(best.loss.value) and losses.argmin() == 1


def test_the_cost_is_fitted_to_the_runs():
    size, tokens = np.geomspace(1e6, 1e8, 5), np.full(5, 1e9)
    points = make_points(size, tokens, np.ones(5), 40 * size**0.9 * tokens)
    assert fit_cost(points) == pytest.approx((40, 0.9, 0), abs=1e-9)


def test_extrapolating_too_far_is_an_error():
    points = ladder([1e18, 1e19, 1e20])
    with pytest.raises(
        ConfigError, match=r"budget=1e\+22 .* 1e\+18 to 1e\+20 FLOPs; --extrapolate=100"
    ):
        check_budget(1e22, points, 2)
    check_budget(1e22, points, 100)
    # Whole numbers of parameters and tokens miss the budget that they were chosen for by a hair.
    size, tokens = np.full(2, 1e4 + 1), np.array([1e8, 1e13]) // (6e4 + 6)
    whole = make_points(size, tokens, np.ones(2), 6 * size * tokens)
    assert whole.flops.max() < 1e13
    check_budget(1e13, whole, 1)
    with pytest.raises(ConfigError, match=r"; --extrapolate=10 would allow it"):
        check_budget(1e14, whole, 1)
    fitted = fit(LAW, points, starts=START)
    # Within the range of budgets, but outside the range of sizes.
    few = points.where(points.parameters < 1.5e8)
    with pytest.raises(ConfigError, match=r"whose best run has 6\.45e\+08 parameters .* fitted"):
        check_optimum(optimum(fitted, fit_cost(points), 1e20), few, 1.5)
    flat = fitted._replace(x=fitted.x * [1, 1, 1, -1, 1])
    with pytest.raises(ConfigError, match=r"no compute-optimal size: alpha is -0\.34"):
        optimum(flat, fit_cost(points), 1e19)


def test_too_few_points_or_sizes_are_an_error():
    points = runs(20)
    with pytest.raises(ConfigError, match="as many points as its 5 coefficients, not 4"):
        fit(LAW, points.where(np.arange(4)))
    with pytest.raises(ConfigError, match="as many points as its 4 coefficients, not 3"):
        fit(KaplanJoint(), points.where(np.arange(3)))
    with pytest.raises(ConfigError, match="as many points as its 5 coefficients, not 4"):
        fit_projected(points.where(np.arange(4)))
    same = points._replace(parameters=np.full(20, 1e8))
    with pytest.raises(ConfigError, match="3 different parameters, but there are 1"):
        fit(LAW, same)
    with pytest.raises(ConfigError, match="two different values, but all 3 are 5"):
        fit_power_law(np.full(3, 5.0), np.ones(3), 10, 0)
    with pytest.raises(ConfigError, match="point 1: loss is -1; it must be a positive number"):
        make_points([1, 2], [1, 2], [3, -1])
    with pytest.raises(ConfigError, match=r"of the same length, not parameters \(2,\)"):
        make_points([1, 2], [1, 2], [3])
