"""Schedules, parameterizations, times and weightings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion import times, weighting
from genai_jax.diffusion.objective import denoising_loss, flow_matching_loss
from genai_jax.diffusion.parameterization import PARAMETERIZATIONS, convert, input_scale
from tests.diffusion.gaussian import EVERY_SCHEDULE, float64

INSIDE = jnp.linspace(0.05, 0.95, 19)


@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_a_schedule_is_consistent_and_invertible(name):
    schedule = EVERY_SCHEDULE[name]()
    alpha, sigma = schedule.alpha(INSIDE), schedule.sigma(INSIDE)
    log_snr = schedule.log_snr(INSIDE)
    np.testing.assert_allclose(log_snr, 2 * jnp.log(alpha / sigma), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(schedule.time(log_snr), INSIDE, atol=1e-4)
    assert np.all(np.diff(log_snr) < 0)
    if name not in ("ve", "edm", "flow"):
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["vp_linear", "cosine", "flow", "edm", "zero_terminal"])
def test_derivatives_match_finite_differences(name):
    with float64(True):
        schedule = EVERY_SCHEDULE[name]()
        t, h = jnp.linspace(0.1, 0.9, 9), 1e-6
        for function in (schedule.alpha, schedule.sigma):
            slope = (function(t + h) - function(t - h)) / (2 * h)
            np.testing.assert_allclose(
                schedules.derivative(function, t), slope, rtol=1e-5, atol=1e-7
            )
        # The forward process has the schedule's variance: d sigma^2 / dt = 2 f sigma^2 + g^2.
        variance = lambda t: jnp.square(schedule.sigma(t))
        slope = 2 * schedules.drift(schedule, t) * variance(t)
        slope += schedules.diffusion_squared(schedule, t)
        np.testing.assert_allclose(schedules.derivative(variance, t), slope, rtol=1e-5, atol=1e-9)


def test_end_points():
    zero, one = jnp.float32(0), jnp.float32(1)
    rescaled = schedules.zero_terminal_snr(schedules.cosine())
    assert float(rescaled.alpha(one)) == 0
    assert float(rescaled.sigma(one)) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(rescaled.sigma(zero), schedules.cosine().sigma(zero), rtol=1e-3)
    edm = schedules.edm()
    assert float(edm.sigma(zero)) == pytest.approx(0.002, rel=1e-4)
    assert float(edm.sigma(one)) == pytest.approx(80, rel=1e-4)
    with pytest.raises(ValueError, match="preserve the variance"):
        schedules.zero_terminal_snr(schedules.edm())


def test_a_learned_schedule_has_fixed_ends_and_increases():
    params = schedules.init_monotone_gamma(jax.random.key(0))
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), params)
    gamma = lambda t: schedules.monotone_gamma(params, t, -13.3, 5.0)
    values = gamma(jnp.linspace(0, 1, 101))
    np.testing.assert_allclose(values[jnp.array([0, -1])], [-13.3, 5.0], rtol=1e-6)
    assert np.all(np.diff(values) > 0)
    schedule = schedules.learned(gamma)
    np.testing.assert_allclose(schedule.log_snr(INSIDE), -gamma(INSIDE))


@pytest.mark.parametrize("name", EVERY_SCHEDULE)
def test_every_parameterization_converts_to_every_other(name):
    with float64(True):
        schedule = EVERY_SCHEDULE[name]()
        t = jnp.linspace(0.1, 0.9, 5)
        rng = np.random.default_rng(0)
        x0, eps = (jnp.asarray(rng.normal(size=(5, 3))) for _ in range(2))
        x = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * eps
        values = {p: convert(eps, "eps", p, x, schedule, t) for p in PARAMETERIZATIONS}
        np.testing.assert_allclose(values["x0"], x0, rtol=1e-8, atol=1e-8)
        for source, target in itertools.product(PARAMETERIZATIONS, repeat=2):
            converted = convert(values[source], source, target, x, schedule, t)
            np.testing.assert_allclose(converted, values[target], rtol=1e-7, atol=1e-7)


def test_edm_is_the_preconditioning_of_karras_et_al():
    schedule, data = schedules.edm(), 0.5
    t = jnp.array([0.3, 0.7])
    sigma = schedule.sigma(t)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    output = jax.random.normal(jax.random.key(1), (2, 4))
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / jnp.sqrt(sigma**2 + data**2)
    x0 = skip[:, None] * x + out[:, None] * output
    np.testing.assert_allclose(
        convert(output, "edm", "x0", x, schedule, t), x0, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        input_scale("edm", schedule, t), 1 / jnp.sqrt(sigma**2 + data**2), rtol=1e-6
    )


def test_low_discrepancy_gives_one_time_per_bin():
    schedule = schedules.cosine()
    t = times.sample_times("uniform", jax.random.key(3), 16, schedule)
    np.testing.assert_array_equal(np.sort(np.floor(np.asarray(t) * 16)), np.arange(16))
    independent = times.sample_times(
        "uniform", jax.random.key(3), 16, schedule, low_discrepancy=False
    )
    assert len(set(np.floor(np.asarray(independent) * 16))) < 16


def test_time_distributions_have_their_moments():
    edm = schedules.edm()
    t = times.sample_times("logit_normal", jax.random.key(0), 4096, edm, mean=0.3, std=0.8)
    logit = np.log(np.asarray(t)) - np.log1p(-np.asarray(t))
    assert logit.mean() == pytest.approx(0.3, abs=0.01) and logit.std() == pytest.approx(0.8, 0.02)
    t = times.sample_times("log_normal", jax.random.key(0), 4096, edm, mean=-1.2, std=1.2)
    log_sigma = np.log(np.asarray(edm.sigma(t)))
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std() == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize("name", EVERY_SCHEDULE)
@pytest.mark.parametrize("spacing", times.SPACINGS)
def test_solver_times_decrease_from_start_to_end(name, spacing):
    t = times.time_grid(EVERY_SCHEDULE[name](), 7, spacing)
    assert t.shape == (8,) and float(t[0]) == 1 and float(t[-1]) == 0
    assert np.all(np.diff(t) < 0)


def test_a_discrete_schedule_uses_only_its_own_times():
    schedule = schedules.discrete(schedules.cosine(), 10)
    np.testing.assert_allclose(times.time_grid(schedule, 10), np.arange(10, -1, -1) / 10, atol=1e-6)
    for spacing in times.SPACINGS:
        t = np.asarray(times.time_grid(schedule, 6, spacing)) * 10
        np.testing.assert_allclose(t, np.round(t), atol=1e-5)
        assert np.all(np.diff(t) <= -1 + 1e-5)
    t = times.sample_times("uniform", jax.random.key(0), 50, schedule)
    assert set(np.round(np.asarray(t) * 10).astype(int)) == set(range(1, 11))
    with pytest.raises(ValueError, match="11 steps are too many for a discrete schedule with 10"):
        times.time_grid(schedule, 11)


def test_weightings_in_closed_form():
    log_snr = jnp.linspace(-10, 10, 9)
    snr = np.exp(np.asarray(log_snr, np.float64))
    weights = {
        name: np.exp(np.asarray(weighting.log_weight(name, log_snr)))
        for name in weighting.WEIGHTINGS
        if name != "output"
    }
    np.testing.assert_allclose(weights["uniform"], 1)
    np.testing.assert_allclose(weights["snr"], snr, rtol=1e-5)
    np.testing.assert_allclose(weights["min_snr"], np.minimum(snr, 5), rtol=1e-5)
    np.testing.assert_allclose(weights["edm"], snr + 4, rtol=1e-5)
    np.testing.assert_allclose(weights["sigmoid"], snr / (1 + snr * np.exp(-2.0)), rtol=1e-5)


def test_equivalent_weightings_are_equal():
    """The weight of edm undoes its output scale; SNR turns the error of x0 into that of eps."""
    x0 = jax.random.normal(jax.random.key(0), (6, 4))
    t = jnp.linspace(0.1, 0.9, 6)
    predict = lambda x, t: jnp.sin(x)

    def loss(schedule, parameterization, weight):
        return denoising_loss(
            predict, schedule, x0, t, jax.random.key(1),
            parameterization=parameterization, weighting=weight,
        )  # fmt: skip

    edm, cosine = schedules.edm(), schedules.cosine()
    np.testing.assert_allclose(loss(edm, "edm", "edm"), loss(edm, "edm", "output"), rtol=1e-4)
    np.testing.assert_allclose(loss(cosine, "eps", "snr"), loss(cosine, "eps", "output"), rtol=1e-4)


def test_flow_matching_target_is_noise_minus_data():
    x0 = jax.random.normal(jax.random.key(0), (6, 4))
    t, key = jnp.linspace(0.1, 0.9, 6), jax.random.key(1)
    noise = jax.random.normal(key, x0.shape)
    perfect = flow_matching_loss(lambda x, t: noise - x0, schedules.linear_flow(), x0, t, key)
    np.testing.assert_allclose(perfect, 0, atol=1e-12)
