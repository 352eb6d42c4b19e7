"""The selective state space scan of Mamba (Gu & Dao 2023, equation 2 and algorithm 2)."""

from __future__ import annotations

import functools
import numbers

import jax
import jax.numpy as jnp

from .choose import Backend, Rule, choose, lazily

DTYPES = ("float32", "bfloat16", "float16", "float64")
CHUNK = 64  # positions whose states exist at once


def selective_scan(
    x, delta, a, b, c, d=None, *, initial_state=None, chunk_size=CHUNK, backend="auto"
) -> tuple[jax.Array, jax.Array]:
    """state_t = exp(delta_t a) state_{t-1} + delta_t b_t x_t;  y_t = c_t . state_t + d x_t.

    x        [batch, length, channels]: float32, bfloat16, float16 (float64 under x64)
    delta    [batch, length, channels], step sizes: positive, softplus and bias already applied
    a        [channels, state]: negative numbers, for a state that decays
    b, c     [batch, length, state]
    d        None, or [channels]
    initial_state  None for 0, or [batch, channels, state]
    chunk_size  positions whose states exist at once, for the two backends of XLA
    backend  "auto", "xla" (a loop over positions), "xla_parallel" (a chunk's at once) or "tpu"

    Returns (y like x, the last state [batch, channels, state]): a sequence may come in pieces.
    States are float32, or float64 where any array is. Differentiable in all arrays; the backward
    pass keeps the state of each chunk's beginning and makes the others anew: memory is
    length / chunk_size + chunk_size states. What does not fit is a ValueError of one line.
    """
    arrays = dict(x=x, delta=delta, a=a, b=b, c=c, d=d, initial_state=initial_state)
    arrays = {name: None if v is None else jnp.asarray(v) for name, v in arrays.items()}
    _check(**arrays, chunk_size=chunk_size)
    x, delta, a, b, c, d, state = _widened(arrays.values())
    name, _ = choose(backend, BACKENDS, AUTO, x, a)
    if state is None:
        state = jnp.zeros((x.shape[0], *a.shape), x.dtype)
    y, state = BACKENDS[name].run(x, delta, a, b, c, state, int(chunk_size))
    y = y if d is None else y + d * x
    return y.astype(arrays["x"].dtype), state


def reference(x, delta, a, b, c, d=None, *, initial_state=None) -> tuple[jax.Array, jax.Array]:
    """The definition: one position after the other."""
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *a.shape), x.dtype)
    y, state = _positions(x, delta, a, b, c, initial_state)
    return (y if d is None else y + d * x), state


def _positions(x, delta, a, b, c, state):
    """A loop over positions."""

    def step(state, position):
        x, delta, b, c = position
        new = (delta * x)[..., None] * b[:, None]
        state = jnp.exp(delta[..., None] * a) * state + new
        return state, jnp.sum(state * c[:, None], -1)

    first = lambda v: jnp.moveaxis(v, 1, 0)
    state, y = jax.lax.scan(step, state, tuple(map(first, (x, delta, b, c))))
    return jnp.moveaxis(y, 0, 1), state


def _together(x, delta, a, b, c, state):
    """All positions at once: the recurrence is associative (Blelloch 1990, section 1.4)."""
    decay = jnp.exp(delta[..., None] * a)
    new = (delta * x)[..., None] * b[:, :, None]
    new = new.at[:, 0].add(decay[:, 0] * state)
    join = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    _, states = jax.lax.associative_scan(join, (decay, new), axis=1)
    return jnp.sum(states * c[:, :, None], -1), states[:, -1]


def _chunked(inside, x, delta, a, b, c, state, chunk_size):
    """`inside` over one chunk after the other; its states are made anew in the backward pass."""
    length = x.shape[1]
    size = min(chunk_size, length)
    pad = -length % size  # with delta 0: the state stays

    def split(v):
        v = jnp.pad(v, ((0, 0), (0, pad), (0, 0))) if pad else v
        return jnp.moveaxis(v.reshape(v.shape[0], -1, size, v.shape[2]), 1, 0)

    @jax.checkpoint
    def step(state, chunk):
        x, delta, b, c = chunk
        y, state = inside(x, delta, a, b, c, state)
        return state, y

    state, y = jax.lax.scan(step, state, tuple(map(split, (x, delta, b, c))))
    return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :length], state


def _widened(arrays):
    """All in the dtype that holds the values of each: float32, or float64 where one is."""
    dtype = jnp.result_type(jnp.float32, *(v.dtype for v in arrays if v is not None))
    return [None if v is None else v.astype(dtype) for v in arrays]


def _check(x, delta, a, b, c, d, initial_state, chunk_size):
    if len(x.shape) != 3 or 0 in x.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; allowed: [batch, length, channels], each >= 1"
        )
    if len(a.shape) != 2 or a.shape[0] != x.shape[2] or 0 in a.shape:
        raise ValueError(
            f"a has shape {tuple(a.shape)}; allowed: [channels, state]=[{x.shape[2]}, >= 1]"
        )
    batch, length, channels = x.shape
    wanted = dict(
        delta=(delta, "batch, length, channels", (batch, length, channels)),
        b=(b, "batch, length, state", (batch, length, a.shape[1])),
        c=(c, "batch, length, state", (batch, length, a.shape[1])),
        d=(d, "channels", (channels,)),
        initial_state=(initial_state, "batch, channels, state", (batch, *a.shape)),
    )
    for name, (v, dimensions, shape) in wanted.items():
        if v is not None and tuple(v.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(v.shape)}; allowed: [{dimensions}]={list(shape)}"
            )
    for name, v in dict(x=x, delta=delta, a=a, b=b, c=c, d=d, initial_state=initial_state).items():
        if v is not None and str(v.dtype) not in DTYPES:
            raise ValueError(f"{name} has dtype {v.dtype}; allowed: {', '.join(DTYPES)}")
    if not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; allowed: an integer >= 1")


BACKENDS: dict[str, Backend] = {
    "xla": Backend(functools.partial(_chunked, _positions)),
    "xla_parallel": Backend(functools.partial(_chunked, _together)),
    "tpu": Backend(
        lazily("tpu.selective_scan", "scan"), ("tpu",), lazily("tpu.selective_scan", "check")
    ),
}

# The first rule that holds, and whose backend can run the call, decides.
AUTO: tuple[Rule, ...] = (
    Rule("tpu", "the kernels: no state but each chunk's first in HBM"),
    Rule("xla", "on cpu one position after the other", lambda *call: call[-1] == "cpu"),
    Rule("xla_parallel", "a chunk's positions at once"),
)
