"""How the arrays of a call are passed to the kernels: padded, split into blocks, and named.

Both kernels run on the grid (batch, kv_heads, groups, visits); a query head is
kv_head * groups + group. Arrays are [batch, heads, length, head_dim], padded with zeros to whole
blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..padding import pad_length
from ..spec import Operands, Spec
from .visits import KEY_STEP, LANES, Blocks, Visits


class Plan(NamedTuple):
    """Everything static about one kernel call."""

    spec: Spec
    blocks: Blocks
    visits: Visits
    groups: int
    q_length: int  # without padding, like the next two
    kv_length: int
    k_start: int = 0  # the first key of this call, if the keys are split over several calls
    interpret: object = False

    @property
    def padded(self) -> int | None:
        """kv_length if the last key block is padded, for `tile.hidden`."""
        return self.kv_length if self.kv_length % self.blocks.k else None


class Here(NamedTuple):
    """The place of a step in the grid."""

    batch: Any
    head: Any  # query head
    group: Any  # which of the query heads that share the key head
    visit: Any


def here(plan: Plan) -> Here:
    """Call it at the top of a kernel: the plain interpreter cannot evaluate it inside `pl.when`."""
    batch, kv_head, group, visit = (pl.program_id(axis) for axis in range(4))
    return Here(batch, head(kv_head, group, plan), group, visit)


def head(n, g, plan: Plan):
    return n * plan.groups + g


def cost(x: Operands, plan: Plan, matmuls: int) -> pl.CostEstimate:
    """The cost of a kernel for the compiler, which does not look into it: each tile of queries and
    keys takes part in this many matmuls."""
    batch, heads, _, head_dim = x.q.shape
    pairs = batch * heads * plan.visits.runs * plan.blocks.sub_q * KEY_STEP
    return pl.CostEstimate(
        flops=2 * matmuls * pairs * head_dim,
        transcendentals=pairs,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in (x.q, x.q, x.k, x.v)) * matmuls // 2,
    )


def scalars(x: Operands, plan: Plan) -> dict:
    """The arrays of the call that are read from SMEM, one number at a time."""
    named = dict(q_block=plan.visits.q_block, k_block=plan.visits.k_block, flags=plan.visits.flags)
    if x.q_offset is not None:
        named["q_offset"] = x.q_offset.astype(jnp.int32)
    for name in ("slopes", "sinks"):
        if getattr(x, name) is not None:
            named[name] = getattr(x, name).astype(jnp.float32)
    return {name: jnp.asarray(a) for name, a in named.items()}


def query_spec(shape: tuple[int, int], plan: Plan, row: bool = False):
    """A query block of [batch, heads, length, head_dim]; row: of [batch, heads, 1, length]."""

    def index(b, n, g, s, q_block, *_):
        at = (0, q_block[s]) if row else (q_block[s], 0)
        return (b, head(n, g, plan), *at)

    return pl.BlockSpec((1, 1, *shape), index)


def key_spec(shape: tuple[int, int], plan: Plan):
    """A key block of [batch, kv_heads, length, head_dim]."""
    return pl.BlockSpec((1, 1, *shape), lambda b, n, g, s, q, k_block, *_: (b, n, k_block[s], 0))


def segment_specs(plan: Plan) -> dict:
    """The blocks of the segment ids, [batch, 1, length]."""
    return dict(
        q_segments=pl.BlockSpec((1, 1, plan.blocks.q), lambda b, n, g, s, q, *_: (b, 0, q[s])),
        k_segments=pl.BlockSpec((1, 1, plan.blocks.k), lambda b, n, g, s, q, k, *_: (b, 0, k[s])),
    )


def segment_arrays(x: Operands, plan: Plan) -> dict:
    """The segment ids as rows; {} if the call has none. Padded queries get a separate id."""
    if x.q_segment_ids is None:
        return {}
    rows = lambda ids, block: pad_length(ids.astype(jnp.int32)[:, None], 2, block)
    return dict(
        q_segments=rows(x.q_segment_ids, plan.blocks.q),
        k_segments=rows(x.kv_segment_ids, plan.blocks.k),
    )


def q_start(refs: dict, plan: Plan, at: Here):
    """Position of the first query of the block of this grid step."""
    start = refs["q_block"][at.visit] * plan.blocks.q
    if plan.spec.q_offset is None:
        return start + refs["q_offset"][at.batch]
    return start + plan.spec.q_offset


def compiler_params(plan: Plan, sequential_groups: bool):
    """sequential_groups: the query heads of a key head add to the same output."""
    return pltpu.CompilerParams(
        dimension_semantics=(
            "parallel",
            "parallel",
            "arbitrary" if sequential_groups else "parallel",
            "arbitrary",
        ),
        disable_bounds_checks=True,  # every block is full, because the arrays are padded
        vmem_limit_bytes=vmem_limit(),
    )


def forward_bytes(blocks: Blocks, head_dim: int, itemsize: int, segments: bool) -> int:
    """The approximate VMEM of the forward kernel."""
    wide = _lanes(head_dim)
    moving = 2 * itemsize * wide * (2 * blocks.q + 2 * blocks.k) + _rows(blocks.q)
    kept = 4 * blocks.q * (2 * LANES + wide) + 4 * blocks.q * blocks.k
    return moving + kept + segments * (_rows(blocks.q) + _rows(blocks.k) + 4 * blocks.q * LANES)


def backward_bytes(blocks: Blocks, head_dim: int, itemsize: int, segments: bool, keys: int) -> int:
    """The approximate VMEM of the backward kernel for the gradients of this many keys."""
    wide = _lanes(head_dim)
    moving = 2 * itemsize * wide * (3 * blocks.q + 2 * blocks.k) + 2 * _rows(blocks.q)
    kept = 4 * blocks.q * head_dim + 2 * 4 * blocks.q * blocks.k
    gradients = (
        2 * keys * wide * (4 + 2 * itemsize)
    )  # the sums, and the double buffers of both outputs
    return moving + kept + gradients + segments * (_rows(blocks.q) + 2 * _rows(blocks.k))


def _lanes(width: int) -> int:
    return -(-width // LANES) * LANES


def _rows(length: int) -> int:
    """Bytes of a double buffer with one number per element; a row takes eight sublanes."""
    return 2 * 8 * 4 * length


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may use; the rest is left to the compiler."""
    return vmem_capacity() * 3 // 4


def vmem_capacity() -> int:
    """Bytes of VMEM of the device to compile for; the smallest known size if it is unknown."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # no TPU: the interpreter
        return 16 << 20
