"""The selective scan of Mamba, a state-space model (Gu & Dao 2023, equation 2 and algorithm 2)."""

from __future__ import annotations

import functools
import numbers

import jax
import jax.numpy as jnp

from . import scan_loop
from .choose import Backend, Rule, choose, lazily
from .padding import pad_length
from .validate import check_segment_ids

DTYPES = ("float32", "bfloat16", "float16", "float64")
CHUNK = 64  # positions whose states are in memory at the same time


def selective_scan(
    x,
    delta,
    a,
    b,
    c,
    d=None,
    *,
    initial_state=None,
    segment_ids=None,
    chunk_size=CHUNK,
    backend="auto",
) -> tuple[jax.Array, jax.Array]:
    """state_t = exp(delta_t a) state_{t-1} + delta_t b_t x_t;  y_t = c_t . state_t + d x_t.

    x        [batch, length, channels]: float32, bfloat16, float16 (float64 under x64)
    delta    [batch, length, channels], step sizes: positive, softplus and bias already applied
    a        [channels, state]: negative, so that the state decays
    b, c     [batch, length, state]
    d        None, or [channels]
    initial_state  None for 0, or [batch, channels, state]: the state before the first token
    segment_ids  None, or ints [batch, length]: the document of each token, 0 for padding
    chunk_size  positions whose states are in memory at the same time (XLA backends only)
    backend  "auto", "xla" (a loop over positions), "xla_parallel" (the positions of a chunk in
             parallel) or "tpu"

    Returns (y like x, the final state [batch, channels, state]). The final state is the
    initial_state of the next piece, so a long sequence can be processed piece by piece.
    States are float32, or float64 if any input is. Differentiable in all float arrays; the backward
    pass keeps the state at the start of each chunk and recomputes the others, so that memory is
    length / chunk_size + chunk_size states. "xla" has gradients in reverse mode only. Invalid
    arguments raise a one-line ValueError.

    Segments: the state is reset to zero before each token whose id differs from that of the
    previous token in its row. Padding (id 0) is skipped, wherever it is: it leaves the state as it
    is, does not count as the previous token, and its y and gradients are 0. Hence
    - the final state is the state after the last real token of each row (initial_state if the row
      is all padding): to prefill right-padded prompts, pass
      `segment_ids=(jnp.arange(length) < lengths[:, None]).astype(int)`. This is exact: padding
      multiplies the state by 1 and adds 0; only "xla_parallel" groups its products differently;
    - initial_state reaches the tokens of the row's first segment and no others. Ids are compared
      only within the call: where a row does not continue the document that its initial_state comes
      from, pass a zero state for that row.
    """
    arrays = dict(x=x, delta=delta, a=a, b=b, c=c, d=d, initial_state=initial_state)
    arrays = {name: None if v is None else jnp.asarray(v) for name, v in arrays.items()}
    _check(**arrays, chunk_size=chunk_size)
    real, resets = _segments(segment_ids, arrays["x"].shape[:2])
    x, delta, a, b, c, d, state = _widened(arrays.values())
    name, _ = choose(backend, BACKENDS, AUTO, x, a)
    if state is None:
        state = jnp.zeros((x.shape[0], *a.shape), x.dtype)
    run = functools.partial(BACKENDS[name].run, chunk_size=int(chunk_size))
    y, state = _with_skip(run, x, delta, a, b, c, d, state, real, resets)
    return y.astype(arrays["x"].dtype), state


def reference(
    x, delta, a, b, c, d=None, *, initial_state=None, segment_ids=None
) -> tuple[jax.Array, jax.Array]:
    """The definition: a loop over positions."""
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *a.shape), x.dtype)
    real, resets = _segments(segment_ids, x.shape[:2])
    return _with_skip(_positions, x, delta, a, b, c, d, initial_state, real, resets)


def _segments(segment_ids, shape: tuple[int, int]):
    """(tokens that are not padding, tokens before which the state is reset), both bool
    [batch, length]; None without segments."""
    if segment_ids is None:
        return None, None
    ids = jnp.asarray(check_segment_ids("segment_ids", segment_ids, shape))
    skip_padding = lambda old, new: jnp.where(new == 0, old, new)
    latest = jax.lax.associative_scan(skip_padding, ids, axis=1)  # up to and including each token
    previous = jnp.pad(latest, ((0, 0), (1, 0)))[:, :-1]  # 0 where there is none
    real = ids != 0
    return real, real & (previous != 0) & (ids != previous)


def _with_skip(run, x, delta, a, b, c, d, state, real, resets):
    """(y, final state) of a backend, with the term d x and without padding."""
    if real is not None:
        delta = jnp.where(real[..., None], delta, 0)  # leaves the state unchanged
    y, state = run(x, delta, a, b, c, state, resets)
    y = y if d is None else y + d * x
    return (y if real is None else jnp.where(real[..., None], y, 0)), state


def _positions(x, delta, a, b, c, state, resets):
    """A loop over positions."""

    def step(state, position):
        x, delta, b, c, reset = position
        if reset is not None:
            state = jnp.where(reset[:, None, None], 0, state)
        new = (delta * x)[..., None] * b[:, None]
        state = jnp.exp(delta[..., None] * a) * state + new
        return state, jnp.sum(state * c[:, None], -1)

    first = lambda v: jnp.moveaxis(v, 1, 0)
    state, y = jax.lax.scan(step, state, jax.tree.map(first, (x, delta, b, c, resets)))
    return jnp.moveaxis(y, 0, 1), state


def _parallel(x, delta, a, b, c, state, resets):
    """All positions in parallel: the recurrence is associative (Blelloch 1990, section 1.4)."""
    decay = jnp.exp(delta[..., None] * a)
    if resets is not None:
        decay = jnp.where(resets[..., None, None], 0, decay)
    new = (delta * x)[..., None] * b[:, :, None]
    new = new.at[:, 0].add(decay[:, 0] * state)
    compose = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    _, states = jax.lax.associative_scan(compose, (decay, new), axis=1)
    return jnp.sum(states * c[:, :, None], -1), states[:, -1]


def _chunks(x, delta, a, b, c, state, resets, chunk_size):
    """`_parallel` chunk by chunk; the backward pass recomputes the states within each chunk."""
    length = x.shape[1]
    size = min(chunk_size, length)

    def split(v):
        v = pad_length(v, 1, size)  # with delta 0: the state does not change
        return jnp.moveaxis(v.reshape(v.shape[0], -1, size, *v.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(state, chunk):
        x, delta, b, c, resets = chunk
        y, state = _parallel(x, delta, a, b, c, state, resets)
        return state, y

    state, y = jax.lax.scan(step, state, jax.tree.map(split, (x, delta, b, c, resets)))
    return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :length], state


def _widened(arrays):
    """All arrays in one dtype: float64 if any of them is, float32 otherwise."""
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
    expected = dict(
        delta=(delta, "batch, length, channels", (batch, length, channels)),
        b=(b, "batch, length, state", (batch, length, a.shape[1])),
        c=(c, "batch, length, state", (batch, length, a.shape[1])),
        d=(d, "channels", (channels,)),
        initial_state=(initial_state, "batch, channels, state", (batch, *a.shape)),
    )
    for name, (v, dimensions, shape) in expected.items():
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
    "xla": Backend(scan_loop.run),
    "xla_parallel": Backend(_chunks),
    "tpu": Backend(
        lazily("tpu.selective_scan", "scan"), ("tpu",), lazily("tpu.selective_scan", "check")
    ),
}

# The first rule that holds and whose backend can run the call decides.
AUTO: tuple[Rule, ...] = (
    Rule("tpu", "the kernels: HBM holds only the state at the start of each chunk"),
    Rule("xla", "on cpu a loop over positions", lambda *call: call[-1] == "cpu"),
    Rule("xla_parallel", "the positions of a chunk in parallel"),
)
