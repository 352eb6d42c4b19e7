"""HiPPO matrices and their discretization: the state-space models S4 and S4D."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.sequence.recurrences.time_invariant import System


def hippo_legs(size: int) -> np.ndarray:
    """The matrix A of HiPPO-LegS (Gu et al. 2020, theorem 2), whose eigenvalues are -1 .. -size.

    Its state holds the coefficients of the input so far in Legendre polynomials.
    """
    n = np.arange(size, dtype=np.float64)
    a = np.sqrt(2 * n[:, None] + 1) * np.sqrt(2 * n + 1)
    return -np.where(n[:, None] > n, a, np.diag(n + 1))


class LowRank(NamedTuple):
    """A = diag(values) - p p^*, in the basis in which it is diagonal plus low rank; complex [size].

    Attributes:
      values: the diagonal.
      p: the correction of rank one.
      b: how the input enters the state.
    """

    values: np.ndarray
    p: np.ndarray
    b: np.ndarray


def normal_plus_low_rank(size: int) -> LowRank:
    """HiPPO-LegS as a normal matrix minus one of rank one (Gu et al. 2022a, theorem 1)."""
    n = np.arange(size, dtype=np.float64)
    p, b = np.sqrt(n + 0.5), np.sqrt(2 * n + 1)
    normal = hippo_legs(size) + np.outer(p, p)  # -1/2 I + a skew-symmetric matrix
    skew = normal - np.diag(np.diag(normal))
    imaginary, basis = np.linalg.eigh(skew * -1j)
    inverse = basis.conj().T
    return LowRank(-0.5 + 1j * imaginary, inverse @ p, inverse @ b)


def diagonal_system(log_step: jax.Array, a: jax.Array, c: jax.Array) -> System:
    """S4D, by a zero-order hold: A = exp(step a), B = (A - 1) / a (Gu et al. 2022b, section 3).

    Args:
      log_step: [channels].
      a, c: [channels, state / 2], complex: half of the conjugate pairs, so that y counts twice.
    """
    discrete = jnp.exp(jnp.exp(log_step)[:, None] * a)
    return System(discrete, (discrete - 1) / a, 2 * c)


def low_rank_system(
    log_step: jax.Array, values: jax.Array, p: jax.Array, b: jax.Array, c: jax.Array
) -> System:
    """S4, by the bilinear method: A is dense (Gu et al. 2022a, equation 3).

    (I - step A / 2)^-1 is that of a diagonal plus a product, by the formula of Sherman and Morrison
    (Gu et al. 2022a, appendix C.2).

    Args:
      log_step: [channels].
      values, p, b, c: [channels, state], complex; see `LowRank`.
    """
    half = jnp.exp(log_step)[:, None] / 2
    diagonal = 1 / (1 - half * values)
    left, right = diagonal * p, diagonal * p.conj()
    scale = half / (1 + half * jnp.sum(p.conj() * left, -1, keepdims=True))
    eye = jnp.eye(values.shape[-1])
    inverse = eye * diagonal[:, None] - (scale * left)[..., None] * right[:, None]
    entry = diagonal * b - scale * left * jnp.sum(right * b, -1, keepdims=True)
    return System(2 * inverse - eye, 2 * half * entry, c)


def low_rank_response(
    log_step: jax.Array,
    values: jax.Array,
    p: jax.Array,
    b: jax.Array,
    c: jax.Array,
    length: int,
    discrete: jax.Array,
) -> jax.Array:
    """The impulse response of `low_rank_system`, [length, channels], from Cauchy sums.

    The generating function of the response is evaluated at the roots of unity by the Woodbury
    identity and transformed back (Gu et al. 2022a, algorithm 1). Both sides of its fractions are
    multiplied by 1 + w, so that w = -1 is no pole.

    Args:
      log_step: [channels].
      values, p, b, c: [channels, state], complex.
      length: of the response.
      discrete: [channels, state, state], A of the discrete system.
    """
    end = jnp.linalg.matrix_power(discrete, length)
    c = c - jnp.einsum("cn,cnm->cm", c, end)
    w = jnp.exp(-2j * np.pi * jnp.arange(length) / length).astype(values.dtype)
    step = jnp.exp(log_step)

    def one(channel):
        step, values, p, b, c = channel
        below = (2 / step) * (1 - w[:, None]) - values * (1 + w[:, None])  # [length, state]
        inverse = 1 / below
        total = lambda left, right: inverse @ (left * right)
        cb, cp, pb, pp = total(c, b), total(c, p), total(p.conj(), b), total(p.conj(), p)
        return 2 * (cb - (1 + w) * cp * pb / (1 + (1 + w) * pp))

    at_roots = jax.lax.map(one, (step, values, p, b, c))  # [channels, length]
    return jnp.fft.ifft(at_roots, axis=-1).real.T
