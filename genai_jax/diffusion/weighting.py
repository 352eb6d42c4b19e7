"""Loss weights as functions of the noise level.

All are weights of |x0 - x0_hat|^2 as functions of the log-SNR, so that they mean the same for every
parameterization (Kingma and Gao 2023, section 2); "output" is the exception: it is the unweighted
error of the network's output.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Weighting = Callable[[jax.Array, float], jax.Array]  # (log-SNR, sigma_data) -> log of the weight

MIN_SNR = 5.0  # gamma of Hang et al. 2023
SIGMOID_BIAS = 2.0  # -b of Hoogeboom et al. 2024


def uniform(log_snr, sigma_data):
    """1: the error of x0."""
    del sigma_data
    return jnp.zeros_like(log_snr)


def snr(log_snr, sigma_data):
    """SNR: the error of epsilon (Ho et al. 2020, equation 14)."""
    del sigma_data
    return log_snr


def min_snr(log_snr, sigma_data):
    """min(SNR, 5) (Hang et al. 2023, equation 5)."""
    del sigma_data
    return jnp.minimum(log_snr, jnp.log(MIN_SNR))


def edm(log_snr, sigma_data):
    """(s^2 + sigma_data^2) / (s sigma_data)^2 with s = sigma / alpha (Karras et al. 2022)."""
    return jnp.logaddexp(log_snr, -2 * jnp.log(sigma_data))


def sigmoid(log_snr, sigma_data):
    """SNR x sigmoid(2 - log-SNR): a smooth min-SNR (Hoogeboom et al. 2024, section 3)."""
    del sigma_data
    return log_snr + jax.nn.log_sigmoid(SIGMOID_BIAS - log_snr)


WEIGHTINGS: dict[str, Weighting | None] = {
    "output": None,
    "uniform": uniform,
    "snr": snr,
    "min_snr": min_snr,
    "edm": edm,
    "sigmoid": sigmoid,
}


def log_weight(name: str, log_snr: jax.Array, sigma_data: float = 0.5) -> jax.Array:
    """The logarithm of the weight of |x0 - x0_hat|^2; undefined for "output"."""
    return WEIGHTINGS[name](log_snr, sigma_data)
