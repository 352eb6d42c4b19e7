"""The selective scan on TPU: states live in registers and VMEM, never in HBM.

Channels lie along lanes and the state along sublanes. A block of channels runs through the sequence
a chunk at a time; the state of each chunk's beginning is kept, and the backward pass makes the
others anew in VMEM, chunk after chunk from the end. XLA writes every state to HBM several times.
Predicted for v5e, batch 8, length 4,096, 2,048 channels, state 16: forward 5.4 ms from the bundles
(51 a position and 512 channels, 1,379 more a chunk), XLA's parallel scan 156 ms from its bytes.
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

CHUNK = 128  # positions: those of b and c fill the lanes of a block
STATE_LIMIT = 128


class Settings(NamedTuple):
    """channels: of a block at most, a multiple of 128. interpret: as in `pallas_call`."""

    channels: int = 512
    interpret: object = False


DEFAULT = Settings()


def check(x, a):
    """Raises Unsupported(reason) for what these kernels do not do."""
    if str(x.dtype) == "float64":
        raise Unsupported("dtype float64; allowed: float32, bfloat16, float16")
    if a.shape[1] > STATE_LIMIT or a.shape[1] % 8:
        raise Unsupported(f"state {a.shape[1]}; allowed: multiples of 8 up to {STATE_LIMIT}")
    _width(LANES, a.shape[1], LANES)
    check_not_split()


def scan(x, delta, a, b, c, state, chunk_size, settings: Settings = DEFAULT):
    """(y, last state), float32, as `selective_scan._positions`; chunk_size is the kernel's own."""
    del chunk_size
    length, channels = x.shape[1:]
    lanes = lambda v, axis: pad_length(v, axis, LANES)
    x, delta = (lanes(pad_length(v, 1, CHUNK), 2) for v in (x, delta))  # delta 0: the state stays
    b, c = (pad_length(v, 1, CHUNK).swapaxes(1, 2) for v in (b, c))
    y, state = _scan(x, delta, lanes(a.T, 1), b, c, lanes(state.swapaxes(1, 2), 2), settings)
    return y[:, :length, :channels], state[..., :channels].swapaxes(1, 2)


# Below: x, delta, y [batch, length, channels]; a [state, channels]; b, c [batch, state, length];
# states [batch, state, channels]; all float32, in whole blocks.


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _scan(x, delta, a, b, c, state, settings):
    return forward(x, delta, a, b, c, state, settings)[0]


def forward(x, delta, a, b, c, state, settings):
    """((y, last state), what `backward` needs: the arguments, and each chunk's first state)."""
    specs = _Specs(x, a, settings)

    def kernel(x, delta, a, b, c, first, y, last, begin, state, b_wide, c_wide):
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
            decay = jnp.exp(delta[0, row] * a[...])
            now = decay * state[...] + new * across(b_wide[t], specs.width)
            state[...] = now
            y[0, row] = jnp.sum(now * across(c_wide[t], specs.width), axis=0, keepdims=True)

        jax.lax.fori_loop(0, CHUNK, step, None)

        @pl.when(chunk == pl.num_programs(2) - 1)
        def _():
            last[0] = state[...]

    y, last, begins = specs.call(
        kernel,
        inputs=("rows", "rows", "matrix", "lanes", "lanes", "state"),
        outputs=("rows", "state", "states"),
        scratch=[specs.vmem(), specs.vmem(CHUNK, LANES), specs.vmem(CHUNK, LANES)],
        name="selective_scan_forward",
    )(x, delta, a, b, c, state)
    return (y, last), (x, delta, a, b, c, begins)


def backward(settings, residuals, grads):
    """The gradients by all of `forward`'s arrays, given those of y and of the last state."""
    x, delta, a, b, c, begins = residuals
    y_grad, last_grad = grads
    specs = _Specs(x, a, settings, reverse=True)

    def kernel(
        x, delta, a, b, c, begin, y_grad, last_grad,
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

        def again(t, _):
            row = pl.ds(t, 1)
            decay = jnp.exp(delta[0, row] * a[...])
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
            decayed = now * jnp.exp(step * a[...])
            slope = decayed * states[t]
            x_grad[0, row] = into * step
            delta_grad[0, row] = into * at + jnp.sum(slope * a[...], axis=0, keepdims=True)
            a_grad[0] += slope * step
            grad[...] = decayed

        jax.lax.fori_loop(0, CHUNK, again, None)
        jax.lax.fori_loop(0, CHUNK, back, None)
        for sums, out in ((b_sums, b_grad), (c_sums, c_grad)):
            flat = sums[...].reshape(CHUNK * specs.height, LANES)
            out[0, 0] = matmul(jnp.ones((8, LANES), jnp.float32), flat, (1, 1))[:1]

        @pl.when(chunk == pl.num_programs(2) - 1)
        def _():
            first_grad[0] = grad[...]

    chunk = (CHUNK, LANES)
    x_grad, delta_grad, a_grad, b_grad, c_grad, first_grad = specs.call(
        kernel,
        inputs=("rows", "rows", "matrix", "lanes", "lanes", "states", "rows", "state"),
        outputs=("rows", "rows", "state", "sums", "sums", "state"),
        scratch=[
            specs.vmem(CHUNK + 1, specs.width),
            specs.vmem(),
            *(specs.vmem(*chunk) for _ in range(4)),
        ],
        name="selective_scan_backward",
    )(x, delta, a, b, c, begins, y_grad, last_grad)
    summed = lambda v: v.sum(1).reshape(*v.shape[:1], -1, a.shape[0]).swapaxes(1, 2)
    return x_grad, delta_grad, a_grad.sum(0), summed(b_grad), summed(c_grad), first_grad


_scan.defvjp(forward, backward)


def _widen(columns, wide):
    """wide[t] = column t of `columns`, in every lane."""
    for t in range(CHUNK):
        wide[t] = jnp.broadcast_to(columns[0, :, t : t + 1], wide.shape[1:])


def _width(channels: int, state: int, limit: int) -> int:
    """Channels of a block: the most up to `limit` that divide `channels` and whose states fit.
    Unsupported(reason) if none do."""
    for width in range(min(limit, channels), 0, -LANES):
        if channels % width == 0 and _backward_bytes(width, state) <= vmem_limit():
            return width
    raise Unsupported(f"state {state}: more than VMEM holds a chunk of, {vmem_limit() >> 20} MiB")


def _backward_bytes(width: int, state: int) -> int:
    """VMEM of the backward kernel, which takes more than the forward one: two buffers of five
    arrays of a chunk's rows, and of five of one state; a chunk's states; b and c and the sums of
    their gradients across lanes; half a MiB for the rest."""
    rows, states = 10 * CHUNK * width, (10 + CHUNK + 2) * state * width
    return 4 * (rows + states + 4 * CHUNK * state * LANES) + (1 << 19)


class _Specs:
    """The blocks of both kernels, by kind, on the grid (batch, blocks of channels, chunks)."""

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
            in_specs=[self.block(kind)[1] for kind in inputs],
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
