"""The selective scan on TPU: states stay in registers and VMEM.

Channels lie along lanes and the state along sublanes. A block of channels steps through the
sequence chunk by chunk; the forward pass keeps only the state at the start of each chunk, and the
backward pass recomputes the others in VMEM, starting from the last chunk. XLA writes every state to
HBM several times. Segment resets are one more factor of the decay, 0 or 1, a scalar in SMEM per
position: 2 bundles (4 %).
Predicted for v5e, batch 8, length 4,096, 2,048 channels, state 16: forward 5.4 ms from instruction
bundles (51 per position and 512 channels, plus 1,379 per chunk); XLA's parallel scan 156 ms from
the bytes that it moves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..choose import check_not_split
from ..padding import pad_length
from ..spec import Unsupported
from .layout import vmem_limit
from .tile import LANES, across, lane_sums, matmul

CHUNK = 128  # positions: as many as a block of b or c has lanes
STATE_LIMIT = 128


class Settings(NamedTuple):
    """channels: the most per block, a multiple of 128. interpret: as in `pallas_call`."""

    channels: int = 512
    interpret: object = False


DEFAULT = Settings()


def check(x, a):
    """Raises Unsupported(reason) for calls that these kernels do not support."""
    if str(x.dtype) == "float64":
        raise Unsupported("dtype float64; allowed: float32, bfloat16, float16")
    if a.shape[1] > STATE_LIMIT or a.shape[1] % 8:
        raise Unsupported(f"state {a.shape[1]}; allowed: multiples of 8 up to {STATE_LIMIT}")
    _width(LANES, a.shape[1], LANES)
    check_not_split()


def scan(x, delta, a, b, c, state, resets, chunk_size, settings: Settings = DEFAULT):
    """(y, final state), float32, as `selective_scan._positions`; chunk_size is ignored."""
    del chunk_size
    length, channels = x.shape[1:]
    lanes = lambda v, axis: pad_length(v, axis, LANES)
    x, delta = (lanes(pad_length(v, 1, CHUNK), 2) for v in (x, delta))  # delta 0: no change
    b, c = (pad_length(v, 1, CHUNK).swapaxes(1, 2) for v in (b, c))
    keep = ()
    if resets is not None:
        keep = (pad_length(jnp.where(resets, 0.0, 1.0), 1, CHUNK, 1)[:, None],)
    state = lanes(state.swapaxes(1, 2), 2)
    y, state = _scan(x, delta, lanes(a.T, 1), b, c, state, keep, settings)
    return y[:, :length, :channels], state[..., :channels].swapaxes(1, 2)


# Below: x, delta, y [batch, length, channels]; a [state, channels]; b, c [batch, state, length];
# states [batch, state, channels]; keep () or ([batch, 1, length],), a factor of the decay: 0 where
# the state is reset, else 1. All float32, in whole blocks.


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(x, delta, a, b, c, state, keep, settings):
    return forward(x, delta, a, b, c, state, keep, settings)[0]


def forward(x, delta, a, b, c, state, keep, settings):
    """((y, final state), residuals of `backward`: the inputs, and the state before each chunk)."""
    specs = _Specs(x, a, settings)

    def kernel(x, delta, a, b, c, first, keep, y, last, begin, state, b_wide, c_wide):
        chunk = pl.program_id(2)

        @pl.when(chunk == 0)
        def _():
            state[...] = first[0]

        begin[0, 0] = state[...]
        _widen(b, b_wide)
        _widen(c, c_wide)

        def step(t, _):
            row = pl.ds(t, 1)
            new = delta[0, row] * x[0, row]
            decay = _decay(delta[0, row], a, keep, t)
            now = decay * state[...] + new * across(b_wide[t], specs.width)
            state[...] = now
            y[0, row] = jnp.sum(now * across(c_wide[t], specs.width), axis=0, keepdims=True)

        jax.lax.fori_loop(0, CHUNK, step, None)

        @pl.when(chunk == pl.num_programs(2) - 1)
        def _():
            last[0] = state[...]

    y, last, begins = specs.call(
        kernel,
        inputs=("rows", "rows", "matrix", "lanes", "lanes", "state", _kind(keep)),
        outputs=("rows", "state", "states"),
        scratch=[specs.vmem(), specs.vmem(CHUNK, LANES), specs.vmem(CHUNK, LANES)],
        name="selective_scan_forward",
    )(x, delta, a, b, c, state, keep)
    return (y, last), (x, delta, a, b, c, keep, begins)


def backward(settings, residuals, grads):
    """The gradients of the inputs of `forward`, given those of y and of the final state."""
    x, delta, a, b, c, keep, begins = residuals
    y_grad, last_grad = grads
    specs = _Specs(x, a, settings, reverse=True)

    def kernel(
        x, delta, a, b, c, begin, y_grad, last_grad, keep,
        x_grad, delta_grad, a_grad, b_grad, c_grad, first_grad,
        states, grad, b_wide, c_wide, b_sums, c_sums,
    ):  # fmt: skip
        chunk = pl.program_id(2)

        @pl.when(chunk == 0)
        def _():
            grad[...] = last_grad[0]
            a_grad[0] = jnp.zeros_like(a_grad[0])

        _widen(b, b_wide)
        _widen(c, c_wide)
        states[0] = begin[0, 0]

        def recompute(t, _):
            row = pl.ds(t, 1)
            decay = _decay(delta[0, row], a, keep, t)
            new = delta[0, row] * x[0, row] * across(b_wide[t], specs.width)
            states[t + 1] = decay * states[t] + new

        def back(i, _):
            t = CHUNK - 1 - i
            row = pl.ds(t, 1)
            step, at, out = delta[0, row], x[0, row], y_grad[0, row]
            now = grad[...] + across(c_wide[t], specs.width) * out
            c_sums[t] = lane_sums(states[t + 1] * out)
            b_sums[t] = lane_sums(now * (step * at))
            into = jnp.sum(now * across(b_wide[t], specs.width), axis=0, keepdims=True)
            decayed = now * _decay(step, a, keep, t)
            slope = decayed * states[t]
            x_grad[0, row] = into * step
            delta_grad[0, row] = into * at + jnp.sum(slope * a[...], axis=0, keepdims=True)
            a_grad[0] += slope * step
            grad[...] = decayed

        jax.lax.fori_loop(0, CHUNK, recompute, None)
        jax.lax.fori_loop(0, CHUNK, back, None)
        for sums, out in ((b_sums, b_grad), (c_sums, c_grad)):
            flat = sums[...].reshape(CHUNK * specs.height, LANES)
            out[0, 0] = matmul(jnp.ones((8, LANES), jnp.float32), flat, (1, 1))[:1]

        @pl.when(chunk == pl.num_programs(2) - 1)
        def _():
            first_grad[0] = grad[...]

    kinds = ("rows", "rows", "matrix", "lanes", "lanes", "states", "rows", "state")
    chunk = (CHUNK, LANES)
    x_grad, delta_grad, a_grad, b_grad, c_grad, first_grad = specs.call(
        kernel,
        inputs=(*kinds, _kind(keep)),
        outputs=("rows", "rows", "state", "sums", "sums", "state"),
        scratch=[
            specs.vmem(CHUNK + 1, specs.width),
            specs.vmem(),
            *(specs.vmem(*chunk) for _ in range(4)),
        ],
        name="selective_scan_backward",
    )(x, delta, a, b, c, begins, y_grad, last_grad, keep)
    summed = lambda v: v.sum(1).reshape(*v.shape[:1], -1, a.shape[0]).swapaxes(1, 2)
    return x_grad, delta_grad, a_grad.sum(0), summed(b_grad), summed(c_grad), first_grad, None


_scan.defvjp(forward, backward)


def _decay(step, a, keep, t):
    """The fraction of the previous state that remains at position t, [state, channels]."""
    decay = jnp.exp(step * a[...])
    return decay * keep[0][0, 0, t] if keep else decay


def _kind(keep):
    return ("scalars",) * len(keep)


def _widen(columns, wide):
    """wide[t] = column t of `columns`, in every lane."""
    for t in range(CHUNK):
        wide[t] = jnp.broadcast_to(columns[0, :, t : t + 1], wide.shape[1:])


def _width(channels: int, state: int, limit: int) -> int:
    """Channels per block: the largest width up to `limit` that divides `channels` and whose states
    fit VMEM. Unsupported(reason) if there is none."""
    for width in range(min(limit, channels), 0, -LANES):
        if channels % width == 0 and _backward_bytes(width, state) <= vmem_limit():
            return width
    raise Unsupported(f"state {state}: a chunk of it does not fit VMEM, {vmem_limit() >> 20} MiB")


def _backward_bytes(width: int, state: int) -> int:
    """VMEM of the backward kernel, which needs more than the forward one: double buffers of five
    arrays with the rows of a chunk and of five with one state; the states of a chunk; b and c in
    every lane, and the per-lane sums of their gradients; half a MiB for the rest."""
    rows, states = 10 * CHUNK * width, (10 + CHUNK + 2) * state * width
    return 4 * (rows + states + 4 * CHUNK * state * LANES) + (1 << 19)


class _Specs:
    """The blocks of both kernels, by kind, on the grid (batch, channel blocks, chunks)."""

    def __init__(self, x, a, settings: Settings, reverse: bool = False):
        self.batch, self.length, self.channels = x.shape
        self.height = a.shape[0]
        self.width = _width(self.channels, self.height, settings.channels)
        self.interpret = settings.interpret
        self.chunks = self.length // CHUNK
        self.at = (lambda k: self.chunks - 1 - k) if reverse else (lambda k: k)

    def vmem(self, *lead_and_lanes):
        """Scratch [state, channels], or with (count, lanes) [count, state, lanes]."""
        if not lead_and_lanes:
            return pltpu.VMEM((self.height, self.width), jnp.float32)
        count, lanes = lead_and_lanes
        return pltpu.VMEM((count, self.height, lanes), jnp.float32)

    def block(self, kind: str):
        """(shape of the whole array, its BlockSpec)."""
        n, w, at = self.height, self.width, self.at
        flat = CHUNK * n
        return {
            "rows": (
                (self.batch, self.length, self.channels),
                pl.BlockSpec((1, CHUNK, w), lambda i, j, k: (i, at(k), j)),
            ),
            "lanes": (
                (self.batch, n, self.length),
                pl.BlockSpec((1, n, CHUNK), lambda i, j, k: (i, 0, at(k))),
            ),
            "scalars": (
                (self.batch, 1, self.length),
                pl.BlockSpec((1, 1, CHUNK), lambda i, j, k: (i, 0, at(k)), memory_space=pltpu.SMEM),
            ),
            "matrix": ((n, self.channels), pl.BlockSpec((n, w), lambda i, j, k: (0, j))),
            "state": (
                (self.batch, n, self.channels),
                pl.BlockSpec((1, n, w), lambda i, j, k: (i, 0, j)),
            ),
            "states": (
                (self.batch, self.chunks, n, self.channels),
                pl.BlockSpec((1, 1, n, w), lambda i, j, k: (i, at(k), 0, j)),
            ),
            "sums": (
                (self.batch, self.channels // w, 1, self.length * n),
                pl.BlockSpec((1, 1, 1, flat), lambda i, j, k: (i, j, 0, at(k))),
            ),
        }[kind]

    def call(self, kernel, inputs, outputs, scratch, name: str):
        shapes = [jax.ShapeDtypeStruct(self.block(kind)[0], jnp.float32) for kind in outputs]
        return pl.pallas_call(
            kernel,
            grid=(self.batch, self.channels // self.width, self.chunks),
            in_specs=jax.tree.map(lambda kind: self.block(kind)[1], inputs),
            out_specs=[self.block(kind)[1] for kind in outputs],
            out_shape=shapes,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=vmem_limit(),
            ),
            interpret=self.interpret,
            name=name,
        )
