"""Fused linear cross-entropy on Hopper: the forward pass keeps its logits in registers.

A thread block takes 256 tokens and a span of the vocabulary, runs a softmax over it, and writes
that softmax's statistics; spans are merged outside. The gradient is that of the XLA backend, one
chunk of tokens at a time: a kernel that recomputes the logits needs one more matmul, which on an
H200 costs more than moving a chunk's logits through memory if embed exceeds about 1,500
(predicted).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import chunked_cross_entropy as chunked
from ..choose import check_not_split
from ..chunked_cross_entropy import Spec, Tokens, indices, weighted_sums
from ..padding import pad_length
from ..spec import Unsupported
from . import stream
from .plan import COMPILER_PARAMS, CONSUMERS, REGISTERS
from .stream import COLUMNS, DEPTH, PART, ROWS
from .tile import LOG2_E, LOWEST, across, filled, load_rows, positions, tanh

DTYPES = ("bfloat16", "float16")
STAGES = 4
SPAN = 16  # blocks of COLUMNS per thread block


class Settings(NamedTuple):
    """span: blocks of the vocabulary per thread block. interpret: as in `plgpu.kernel`."""

    span: int = SPAN
    interpret: object = None


DEFAULT = Settings()


def check(x, w, spec: Spec):
    """Raises Unsupported(reason) for calls that this kernel does not support."""
    if str(x.dtype) not in DTYPES:
        raise Unsupported(f"dtype {x.dtype}; allowed: {', '.join(DTYPES)}")
    if x.shape[-1] % DEPTH:
        raise Unsupported(f"embed {x.shape[-1]}; allowed: multiples of {DEPTH}")
    check_not_split()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def per_token(x, w, targets, spec: Spec) -> Tokens:
    """As `chunked_cross_entropy.per_token`."""
    tokens = forward(x.reshape(-1, x.shape[-1]), w.astype(x.dtype), targets.reshape(-1), spec)
    return jax.tree.map(lambda a: a.reshape(targets.shape), tokens)


def _per_token_forward(x, w, targets, spec):
    out = per_token(x, w, targets, spec)
    return out, (x, w, targets, out.lse)


per_token.defvjp(_per_token_forward, chunked.per_token_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed(x, w, targets, weights, spec: Spec) -> jax.Array:
    """As `chunked_cross_entropy.summed`, which it calls when differentiated."""
    return weighted_sums(per_token(x, w, targets, spec), targets, weights, w.shape[1], spec)


summed.defvjp(chunked.summed_forward, chunked.summed_backward)


def forward(x, w, targets, spec: Spec, settings: Settings = DEFAULT) -> Tokens:
    """Tokens [tokens]; x [tokens, embed], w [embed, vocab] of the same dtype, targets [tokens]."""
    tokens, vocab = x.shape[0], w.shape[1]
    x, w = pad_length(x, 0, ROWS), pad_length(w, 1, COLUMNS)
    targets = pad_length(indices(targets, vocab), 0, ROWS, -1)
    blocks = w.shape[1] // COLUMNS
    span = min(settings.span, blocks)
    spans = pl.cdiv(blocks, span)
    scratch = stream.ring(x.dtype, STAGES) | dict(
        target_part=plgpu.SMEM((CONSUMERS, PART), jnp.int32),
        target_ready=plgpu.Barrier(num_arrivals=CONSUMERS),
        stats_part=plgpu.SMEM((CONSUMERS, 3, PART), jnp.float32),
    )
    names = ("x", "w", "targets", "stats", *scratch)
    stats = plgpu.kernel(
        lambda *refs: _kernel(dict(zip(names, refs, strict=True)), spec, span, blocks, vocab),
        out_type=jax.ShapeDtypeStruct((spans, 3, x.shape[0]), jnp.float32),
        scratch_types=list(scratch.values()),
        # The last dimension varies fastest: thread blocks that run together share a span of w in
        # cache.
        grid=(spans, x.shape[0] // ROWS),
        grid_names=("span", "rows"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=settings.interpret,
    )(x, w, targets)
    lse, chosen, top = jnp.moveaxis(stats, 1, 0)[..., :tokens]
    # The target is in only one span; the others give 0.
    return Tokens(jax.nn.logsumexp(lse, 0), jnp.sum(chosen, 0), jnp.max(top, 0))


def _kernel(refs: dict, spec: Spec, span: int, blocks: int, vocab: int):
    warpgroup = jax.lax.axis_index("warpgroup")
    first = jax.lax.axis_index("span") * span
    count = jnp.minimum(jnp.int32(span), blocks - first)
    steps = refs["x"].shape[1] // DEPTH
    pl.when(warpgroup < CONSUMERS)(
        lambda: _compute(refs, spec, warpgroup, first, count, steps, vocab)
    )
    pl.when(warpgroup == CONSUMERS)(lambda: _load(refs, first, count, steps))


def _load(refs: dict, first, count, steps: int):
    """The loading warpgroup: loads the targets once, then both operands step by step."""
    plgpu.set_max_registers(REGISTERS["loading"], action="decrease")
    start = jax.lax.axis_index("rows") * ROWS
    rows = lambda i: pl.ds(start + i * PART, PART)
    for i in range(CONSUMERS):
        target = refs["targets"].at[rows(i)]
        plgpu.copy_gmem_to_smem(target, refs["target_part"].at[i], refs["target_ready"])

    def step(i, _):
        depth = pl.ds(jax.lax.rem(i, jnp.int32(steps)) * DEPTH, DEPTH)
        columns = pl.ds((first + jax.lax.div(i, jnp.int32(steps))) * COLUMNS, COLUMNS)
        stream.load(
            refs, i, lambda part: refs["x"].at[rows(part), depth], refs["w"].at[depth, columns]
        )

    jax.lax.fori_loop(jnp.int32(0), count * steps, step, None)


class _State(NamedTuple):
    """The state of the softmax, in base 2; [PART] each."""

    top: jax.Array
    total: jax.Array
    chosen: jax.Array


def _compute(refs: dict, spec: Spec, me, first, count, steps: int, vocab: int):
    """A computing warpgroup: computes its part of the tokens."""
    plgpu.set_max_registers(REGISTERS["computing"], action="increase")
    stream.open_ring(refs)
    plgpu.barrier_wait(refs["target_ready"])
    target = load_rows(refs["target_part"].at[me])

    def block(i, state: _State) -> _State:
        scores = stream.product(refs, me, i * steps, jnp.int32(steps))
        return _softmax(state, scores, target, spec, (first + i) * COLUMNS, vocab)

    number = lambda value: filled((PART,), value)
    state = _State(number(LOWEST), number(0.0), number(0.0))
    state = jax.lax.fori_loop(jnp.int32(0), count, block, state)
    stats = refs["stats_part"].at[me]
    stats[0] = (state.top + jnp.log2(state.total)) * (1 / LOG2_E)
    stats[1] = state.chosen * (1 / LOG2_E)
    stats[2] = state.top * (1 / LOG2_E)
    plgpu.commit_smem()
    rows = pl.ds(jax.lax.axis_index("rows") * ROWS + me * PART, PART)
    for i in range(3):
        out = refs["stats"].at[jax.lax.axis_index("span"), i, rows]
        plgpu.copy_smem_to_gmem(stats.at[i], out)
    plgpu.wait_smem_to_gmem(0)


def _softmax(state: _State, scores, target, spec: Spec, start, vocab: int) -> _State:
    """The softmax including the scores of the columns from `start` on."""
    cap = spec.logits_soft_cap
    s, factor = scores, LOG2_E  # the exponential applies the factor at no cost
    if cap is not None:
        s, factor = tanh(scores * (1 / cap)), cap * LOG2_E
    column = positions(s.shape, 1, start)
    if vocab % COLUMNS:
        s = jnp.where(column < vocab, s, -jnp.inf)
    chosen = jnp.where(column == across(target, s.shape), s, 0.0).sum(axis=1) * factor
    top = jnp.maximum(state.top, s.max(axis=1) * factor)
    total = jnp.exp2(s * factor - across(top, s.shape)).sum(axis=1)
    return _State(top, state.total * jnp.exp2(state.top - top) + total, state.chosen + chosen)
