"""Solvers: their order, their equivalences, and the distributions of stochastic ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion.solvers import SOLVERS, solve
from genai_jax.diffusion.times import time_grid
from tests.diffusion.gaussian import EVERY_SCHEDULE, MEAN, STD, denoiser, exact_flow, float64

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3}
DETERMINISTIC = tuple(ORDERS)
STOCHASTIC = ("ddpm", "euler_maruyama", "predictor_corrector", "langevin")


@pytest.mark.parametrize("schedule_name", ["cosine", "flow"])
@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_global_order_on_gaussian_data(name, order, schedule_name):
    with float64(True):
        schedule = schedules.SCHEDULES[schedule_name]()
        x = jnp.array([[0.5], [-1.2], [1.7]])
        assert x.dtype == jnp.float64
        errors = []
        for steps in (320, 640):
            times = time_grid(schedule, steps, "log_snr", start=0.95, end=0.05)
            exact = exact_flow(schedule, x, times[0], times[-1])
            run = jax.jit(
                lambda x, times=times: solve(
                    name, denoiser(schedule), schedule, x, times, jax.random.key(0)
                )
            )
            errors.append(float(jnp.max(jnp.abs(run(x) - exact))))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("schedule_name", EVERY_SCHEDULE)
def test_every_solver_stays_finite_from_noise_to_data(schedule_name):
    """Even if the log-SNR is infinite at an end; deterministic ones end near the exact solution."""
    schedule = EVERY_SCHEDULE[schedule_name]()
    times = time_grid(schedule, 12)
    x = schedule.sigma(jnp.float32(1)) * jax.random.normal(jax.random.key(0), (8, 2))

    @jax.jit
    def all_solvers(x):
        return {
            name: solve(name, denoiser(schedule), schedule, x, times, jax.random.key(1))
            for name in SOLVERS
        }

    for name, end in all_solvers(x).items():
        assert end.dtype == jnp.float32 and np.all(np.isfinite(end)), name
        if name in DETERMINISTIC:
            exact = exact_flow(schedule, x, times[0], times[-1])
            assert float(jnp.max(jnp.abs(end - exact))) < 0.5, name


def test_ancestral_sampling_is_ddim_with_eta_1():
    schedule = schedules.cosine()
    times = time_grid(schedule, 8, start=0.9, end=0.1)
    x = jax.random.normal(jax.random.key(0), (4, 3))
    run = lambda name, **options: solve(
        name, denoiser(schedule), schedule, x, times, jax.random.key(1), **options
    )
    np.testing.assert_allclose(run("ddpm"), run("ddim", eta=1.0), atol=2e-5)
    assert float(jnp.max(jnp.abs(run("ddim") - run("ddpm")))) > 0.1


@pytest.mark.parametrize("schedule_name", ["vp_linear", "edm", "flow"])
def test_ddim_is_the_first_order_dpm_solver(schedule_name):
    """A single step of the multistep method has no history to use."""
    schedule = schedules.SCHEDULES[schedule_name]()
    x = jax.random.normal(jax.random.key(0), (4, 3))
    times = jnp.array([0.7, 0.5])
    run = lambda name: solve(name, denoiser(schedule), schedule, x, times, jax.random.key(1))
    np.testing.assert_allclose(run("ddim"), run("dpmpp_2m"), rtol=1e-5, atol=1e-5)


def test_heun_matches_karras_et_al_if_the_signal_is_constant():
    schedule = schedules.edm()
    x = 3.0 * jax.random.normal(jax.random.key(0), (4, 3))
    t, s = jnp.float32(0.6), jnp.float32(0.5)
    denoise = denoiser(schedule)
    high, low = schedule.sigma(t), schedule.sigma(s)
    slope = (x - denoise(x, jnp.full(4, t))) / high
    euler = x + (low - high) * slope
    second = (euler - denoise(euler, jnp.full(4, s))) / low
    expected = x + (low - high) * (slope + second) / 2
    end = solve("heun", denoise, schedule, x, jnp.stack([t, s]), jax.random.key(0))
    np.testing.assert_allclose(end, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*STOCHASTIC, "heun", "ddim"])
def test_stochastic_solvers_keep_mean_and_variance(name):
    schedule = schedules.cosine()
    options = {"heun": {"s_churn": 40.0}, "ddim": {"eta": 0.7}}.get(name, {})
    times = time_grid(schedule, 300 if name == "euler_maruyama" else 150)
    x = jax.random.normal(jax.random.key(0), (20_000, 1))
    end = jax.jit(
        lambda x: solve(name, denoiser(schedule), schedule, x, times, jax.random.key(1), **options)
    )(x)
    assert float(jnp.mean(end)) == pytest.approx(MEAN, abs=0.015)
    assert float(jnp.std(end)) == pytest.approx(STD, rel=0.06)


def test_a_path_has_every_state_from_start_to_end():
    schedule = schedules.cosine()
    times = time_grid(schedule, 5)
    x = jax.random.normal(jax.random.key(0), (2, 3))
    for name in ("ddim", "dpmpp_3m", "unipc"):
        end, path = solve(
            name, denoiser(schedule), schedule, x, times, jax.random.key(0), return_path=True
        )
        assert path.shape == (6, 2, 3)
        np.testing.assert_array_equal(path[0], x)
        np.testing.assert_array_equal(path[-1], end)


def test_data_to_noise_and_back():
    schedule = schedules.cosine()
    times = time_grid(schedule, 200, "log_snr", start=0.95, end=0.05)
    x = MEAN + STD * jax.random.normal(jax.random.key(0), (4, 3))
    run = jax.jit(
        lambda x, times: solve(
            "dpmpp_2m", denoiser(schedule), schedule, x, times, jax.random.key(0)
        )
    )
    np.testing.assert_allclose(run(run(x, times[::-1]), times), x, atol=2e-3)


def test_a_shape_is_compiled_once():
    schedule = schedules.cosine()
    run = jax.jit(lambda x, t, key: solve("ddpm", denoiser(schedule), schedule, x, t, key))
    for i in range(3):
        run(jnp.full((2, 3), float(i)), time_grid(schedule, 4), jax.random.key(i))
    assert run._cache_size() == 1
