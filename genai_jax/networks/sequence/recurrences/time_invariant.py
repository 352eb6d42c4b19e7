"""State-space models that do not change over time: a convolution, or a recurrence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.sequence.recurrences.boundaries import Boundaries, masked
from genai_jax.networks.sequence.recurrences.chunks import chunks_of, merge, split

CHUNK = 16


class System(NamedTuple):
    """h_t = A h_{t-1} + B x_t, y_t = Re(C h_t), one for each channel, in discrete time; complex.

    Attributes:
      a: [channels, state] if A is diagonal, or [channels, state, state].
      b, c: [channels, state].
    """

    a: jax.Array
    b: jax.Array
    c: jax.Array

    def advance(self, h: jax.Array) -> jax.Array:
        """A h, for h [..., channels, state]."""
        return self.a * h if self.a.ndim == 2 else jnp.einsum("cnm,...cm->...cn", self.a, h)


def system_step(system: System):
    """The recurrence for one token of each row, for `loop`: h [batch, channels, state, 2]."""

    def step(state, x):
        h = system.advance(to_complex(state)) + system.b * x[..., None]
        return from_complex(h), jnp.sum(system.c * h, -1).real

    return step


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y_t = sum_s kernel_s x_{t-s} by Fourier transforms; x [batch, length, channels].

    kernel: [length, channels], the impulse response.
    """
    size = 2 * x.shape[1]
    product = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(kernel, size, axis=0)
    return jnp.fft.irfft(product, size, axis=1)[:, : x.shape[1]]


def impulse_response(system: System, length: int) -> jax.Array:
    """Re(C A^t B) for t < length, [length, channels]."""
    return jnp.sum(_powers(system, length) * system.c, -1).real


def by_chunks(system: System, x: jax.Array, bounds: Boundaries, chunk: int = CHUNK) -> jax.Array:
    """y for rows of several documents, each with an empty state before it.

    Args:
      system: of all channels.
      x: [batch, length, channels], float32.
      bounds: padding, which may be anywhere but within a document, and where documents begin.
      chunk: tokens that are computed in parallel.
    """
    batch, length, channels = x.shape
    size = min(chunk, length)
    parts = chunks_of(bounds, batch, length, size)
    x = split(masked(x, bounds.real), size)
    powers = _powers(system, size)  # A^t B
    kernel = jnp.sum(powers * system.c, -1).real  # [size, channels]
    lag = np.arange(size)[:, None] - np.arange(size)
    toeplitz = jnp.where((lag >= 0)[..., None], kernel[np.maximum(lag, 0)], 0)  # [i, j, channels]
    # Re(C h) as a product of real numbers: complex matmuls are slow on some devices.
    observed = _side_by_side(_observations(system, size).conj())  # C A^(t + 1)
    entered = _side_by_side(powers[::-1])
    over = _power(system, size)

    @jax.checkpoint
    def step(h, chunk):
        x, pairs, from_state, to_state = chunk
        y = jnp.einsum("bij,ijc,bjc->bic", pairs.astype(x.dtype), toeplitz, x)
        y += from_state[..., None] * jnp.einsum("icn,bcn->bic", observed, h)
        new = jnp.einsum("jcn,bjc->bcn", entered, to_state[..., None] * x)
        carried = _side_by_side(over.advance(jax.lax.complex(*jnp.split(h, 2, -1))))
        return carried * from_state[:, -1, None, None] + new, y

    h = jnp.zeros((batch, channels, 2 * system.b.shape[-1]))
    each = (x, parts.pairs, parts.from_state, parts.to_state)
    _, y = jax.lax.scan(step, h, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), each))
    return merge(jnp.moveaxis(y, 0, 1), length)


def to_complex(a: jax.Array) -> jax.Array:
    """[..., 2] real and imaginary parts -> complex."""
    return jax.lax.complex(a[..., 0], a[..., 1])


def from_complex(a: jax.Array) -> jax.Array:
    """The inverse of `to_complex`."""
    return jnp.stack([a.real, a.imag], -1)


def _side_by_side(a: jax.Array) -> jax.Array:
    """[..., n] complex -> [..., 2 n], the real parts and then the imaginary ones."""
    return jnp.concatenate([a.real, a.imag], -1)


def _powers(system: System, length: int) -> jax.Array:
    """A^t B for t < length, [length, channels, state]."""
    if system.a.ndim == 2:
        t = jnp.arange(length)[:, None, None]
        return system.a**t * system.b
    step = lambda h, _: (system.advance(h), h)
    return jax.lax.scan(step, system.b, length=length)[1]


def _observations(system: System, length: int) -> jax.Array:
    """C A^(t + 1) for t < length, [length, channels, state]."""
    transposed = system.a if system.a.ndim == 2 else system.a.swapaxes(-1, -2)
    turned = System(transposed, system.c, system.b)
    return _powers(turned._replace(b=turned.advance(system.c)), length)


def _power(system: System, count: int) -> System:
    """The system whose A is A^count."""
    if system.a.ndim == 2:
        return system._replace(a=system.a**count)
    return system._replace(a=jnp.linalg.matrix_power(system.a, count))
