"""Guidance and editing, which turn denoisers into denoisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.diffusion import editing, guidance
from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion.solvers import solve
from genai_jax.diffusion.times import time_grid
from tests.diffusion.gaussian import denoiser

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
T = jnp.full(3, 0.5)


def one(x, t):
    return jnp.sin(x)


def other(x, t):
    return 0.5 * x


def never(x, t):
    raise AssertionError("this denoiser must not be evaluated")


@pytest.mark.parametrize("guide", [guidance.classifier_free, guidance.autoguidance])
def test_weights_1_and_0_evaluate_only_one_model(guide):
    np.testing.assert_array_equal(guide(one, never, 1)(X, T), one(X, T))
    np.testing.assert_array_equal(guide(never, other, 0.0)(X, T), other(X, T))
    expected = other(X, T) + 3 * (one(X, T) - other(X, T))
    np.testing.assert_allclose(guide(one, other, 3.0)(X, T), expected, rtol=1e-6)


def test_rescaling_restores_the_contrast():
    guided = lambda x, t: 5 * one(x, t)
    np.testing.assert_allclose(guidance.rescaled(guided, one, 0.0)(X, T), guided(X, T))
    np.testing.assert_allclose(guidance.rescaled(guided, one, 1.0)(X, T), one(X, T), rtol=1e-5)


def test_guidance_acts_only_within_its_interval():
    schedule = schedules.cosine()
    limited = guidance.limited_interval(one, other, schedule, -1.0, 1.0)
    for t, expected in ((0.5, one), (0.05, other), (0.95, other)):
        times = jnp.full(3, t)
        np.testing.assert_array_equal(limited(X, times), expected(X, times))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "heun"])
def test_inpainting_ends_at_the_known_data(name):
    schedule = schedules.cosine()
    known = jnp.full((1, 4, 4, 2), 0.25)
    mask = jnp.zeros((1, 4, 4, 1)).at[:, :2].set(1)
    denoise = editing.inpaint(denoiser(schedule), known, mask)
    x = solve(name, denoise, schedule, X, time_grid(schedule, 10), jax.random.key(0))
    np.testing.assert_allclose(x[:, :2], 0.25, atol=1e-3)
    assert float(jnp.min(jnp.abs(x[:, 2:] - 0.25))) > 1e-3


def test_a_noised_start_has_the_signal_and_noise_of_its_time():
    schedule = schedules.cosine()
    image = jnp.full((1, 64, 64, 1), 0.5)
    x = editing.noised_start(schedule, image, 0.4, jax.random.key(0))
    alpha, sigma = (float(f(jnp.float32(0.4))) for f in (schedule.alpha, schedule.sigma))
    assert float(x.mean()) == pytest.approx(0.5 * alpha, abs=0.05)
    assert float(x.std()) == pytest.approx(sigma, rel=0.05)


def test_slerp_keeps_the_ends_and_the_norm():
    a, b = (jax.random.normal(jax.random.key(i), (2, 500)) for i in (0, 1))
    np.testing.assert_allclose(editing.slerp(a, b, 0.0), a, atol=1e-5)
    np.testing.assert_allclose(editing.slerp(a, b, 1.0), b, atol=1e-5)
    middle = editing.slerp(a, b, 0.5)
    np.testing.assert_allclose(jnp.std(middle, 1), 1.0, atol=0.1)
    np.testing.assert_allclose(editing.slerp(a, a, 0.3), a, atol=1e-5)
