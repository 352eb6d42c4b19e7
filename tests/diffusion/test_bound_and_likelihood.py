"""The variational bound and the exact log-density, on data of known density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion.bound import bits_per_dim, diffusion_weight, prior, variational_bound
from genai_jax.diffusion.likelihood import log_density
from tests.diffusion.gaussian import float64, per_example

GAMMA_MIN, GAMMA_MAX, STD = -13.3, 5.0, 0.5


def test_the_bound_is_the_entropy_plus_the_gap_of_the_prior():
    """Gaussian data and its exact denoiser, in float64.

    The bound exceeds the entropy only by the KL divergence between the noised data at t = 1 and the
    standard normal. The reconstruction term is that of continuous data, with the exact posterior
    p(x0 | z).
    """
    with float64(True):
        slope = GAMMA_MAX - GAMMA_MIN
        schedule = schedules.learned(lambda t: GAMMA_MIN + slope * t)
        nodes, weights = np.polynomial.legendre.leggauss(200)
        t, weights = jnp.asarray((nodes + 1) / 2), jnp.asarray(weights / 2)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        spread = alpha**2 * STD**2 + sigma**2
        eps_error = alpha**2 * STD**2 / spread  # E |eps - eps_hat|^2
        diffusion = float(jnp.sum(weights * diffusion_weight(schedule, t) * eps_error))
        assert diffusion == pytest.approx(5.956015, abs=1e-6)

        start, end = jnp.float64(0), jnp.float64(1)
        posterior = 1 / (1 / STD**2 + jnp.exp(schedule.log_snr(start)))
        reconstruction = 0.5 * np.log(2 * np.pi * np.e * float(posterior))
        points, mass = np.polynomial.hermite_e.hermegauss(20)
        x0 = jnp.asarray(STD * points)[:, None]
        prior_term = float(np.sum(mass * np.asarray(prior(schedule, x0))) / mass.sum())
        # KL(N(0, v) || N(0, 1)), where v is the variance of the noised data.
        v = float(schedule.alpha(end) ** 2 * STD**2 + schedule.sigma(end) ** 2)
        gap = 0.5 * (v - 1 - np.log(v))
        entropy = 0.5 * np.log(2 * np.pi * np.e * STD**2)
        assert diffusion + prior_term + reconstruction == pytest.approx(entropy + gap, abs=1e-6)


def test_discrete_steps_approach_the_continuous_bound_from_above():
    schedule = schedules.learned(lambda t: GAMMA_MIN + (GAMMA_MAX - GAMMA_MIN) * t)

    def diffusion(steps):
        t = jnp.arange(1, steps + 1) / steps
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        error = alpha**2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
        weight = diffusion_weight(schedules.discrete(schedule, steps), t)
        return float(jnp.mean(weight * error))

    values = [diffusion(steps) for steps in (50, 200, 2000)]
    assert values[0] > values[1] > values[2] > 5.95 and values[2] == pytest.approx(5.956, abs=0.05)


def test_uniform_bytes_take_eight_bits():
    """With the exact denoiser of uniform levels, only the error of the estimate remains."""
    levels = 256
    schedule = schedules.learned(lambda t: GAMMA_MIN + (GAMMA_MAX - GAMMA_MIN) * t)
    values = jnp.linspace(-1, 1, levels)

    def predict(x, t):
        alpha, sigma = per_example(schedule.alpha(t), x), per_example(schedule.sigma(t), x)
        logits = -jnp.square(x[..., None] - alpha[..., None] * values) / (
            2 * jnp.square(sigma)[..., None]
        )
        return jnp.sum(jax.nn.softmax(logits) * values, -1)

    @jax.jit
    def bits(key):
        data_key, bound_key = jax.random.split(key)
        index = jax.random.randint(data_key, (20_000, 1), 0, levels)
        bound = variational_bound(
            predict, schedule, values[index], bound_key, parameterization="x0", levels=levels
        )
        return bits_per_dim(sum(bound), 1)

    estimates = np.concatenate([bits(jax.random.key(i)) for i in range(40)])
    error = estimates.std() / np.sqrt(len(estimates))
    assert error < 0.02
    assert estimates.mean() == pytest.approx(8.0, abs=3 * error)


MEANS = jnp.array([[1.0, 0.5], [-1.0, -0.3]])
STDS, SHARES = jnp.array([0.4, 0.6]), jnp.array([0.3, 0.7])


def mixture_log_density(x, alpha=1.0, sigma=0.0):
    """Log-density of a mixture of two Gaussians in the plane, noised, [batch]."""
    variance = jnp.square(alpha * STDS) + jnp.square(sigma)
    squares = jnp.sum(jnp.square(x[:, None] - alpha * MEANS), -1)
    return jax.nn.logsumexp(
        jnp.log(SHARES) - squares / (2 * variance) - jnp.log(2 * jnp.pi * variance), -1
    )


def mixture_denoiser(schedule):
    def denoise(x, t):
        alpha, sigma = schedule.alpha(t[0]), schedule.sigma(t[0])
        score = jax.grad(lambda x: jnp.sum(mixture_log_density(x, alpha, sigma)))(x)
        return (x + jnp.square(sigma) * score) / alpha

    return denoise


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_log_density_of_a_mixture_within_a_hundredth_of_a_nat(name):
    schedule = schedules.SCHEDULES[name]()
    x = jax.random.normal(jax.random.key(0), (64, 2))
    denoise = mixture_denoiser(schedule)
    exact = jax.jit(lambda x: log_density(denoise, schedule, x, steps=100))(x)
    np.testing.assert_allclose(exact, mixture_log_density(x), atol=0.01)
    if name == "flow":
        return
    estimate = jax.jit(
        lambda x: log_density(
            denoise, schedule, x, steps=50, divergence="hutchinson", key=jax.random.key(1),
            num_probes=256,
        )
    )(x)  # fmt: skip
    assert float(jnp.mean(jnp.abs(estimate - exact))) < 0.05
    assert float(jnp.mean(estimate - exact)) == pytest.approx(0, abs=0.02)
