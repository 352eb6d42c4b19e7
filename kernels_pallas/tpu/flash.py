"""Flash attention on TPU: supported calls, block sizes, and the custom gradient of both kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .. import tuning
from ..device import device_kind
from ..partition import DIMENSIONS, over_mesh
from ..scores import sink_gradient
from ..spec import Operands, Spec, Unsupported
from .backward import backward
from .forward import forward
from .layout import Plan, backward_bytes, forward_bytes, vmem_limit
from .visits import LANES, Blocks, visits

HEAD_DIM_LIMIT = 256
QUERY, KEYS, ROWS = DIMENSIONS["q"], DIMENSIONS["k"], "bhl"
DTYPES = ("float32", "bfloat16", "float16")
SMEM_BYTES = 768 << 10  # out of 1 MiB, for the lists of visits
UNTUNED = {"forward": Blocks(512, 1024, 256), "backward": Blocks(512, 512, 256)}
FLOAT32 = Blocks(
    256, 512, 256
)  # a float32 product is six of the matrix unit's products: a long program


@dataclass(frozen=True)
class Settings:
    """How the kernels run a call; None: from the tuning table.

    forward, backward: blocks of each kernel.
    key_gradients: bytes of VMEM for the gradients of keys and values in the backward pass.
    interpret: as in `pallas_call`.
    """

    forward: Blocks | None = None
    backward: Blocks | None = None
    key_gradients: int | None = None
    interpret: object = False


def check(x: Operands, spec: Spec, settings: Settings | None = None):
    """Raises Unsupported(reason) for calls that these kernels do not support; x as in
    `attention`."""
    head_dim = x.q.shape[3]
    if str(x.q.dtype) not in DTYPES:
        raise Unsupported(f"dtype {x.q.dtype}; allowed: {', '.join(DTYPES)}")
    if head_dim > HEAD_DIM_LIMIT or head_dim % 8:
        raise Unsupported(f"head_dim {head_dim}; allowed: multiples of 8 up to {HEAD_DIM_LIMIT}")
    if x.bias is not None:
        raise Unsupported("bias is an array; allowed: None or Alibi(slopes)")
    major = jax.eval_shape(_heads_major, x)
    for which in UNTUNED:
        _check_visits(which, major, spec, settings or Settings())


def _check_visits(which: str, x: Operands, spec: Spec, settings: Settings):
    """Checks that the blocks fit VMEM and that the list of visits fits SMEM."""
    count = len(_plan(_blocks(which, x, spec, settings), x, spec, settings).visits.flags)
    if 3 * 4 * count > SMEM_BYTES:
        raise Unsupported(
            f"{which} visits {count} blocks at q_length {x.q.shape[2]} and kv_length "
            f"{x.k.shape[2]}, listed in {12 * count} bytes; allowed: {SMEM_BYTES}"
        )


def attention(x: Operands, spec: Spec, settings: Settings | None = None):
    """(out like x.q, lse float32 [batch, heads, q_length]). x [batch, length, heads, head_dim]."""
    out, lse = heads_major_attention(_heads_major(x), spec, settings or Settings())
    return jnp.swapaxes(out, 1, 2).astype(x.q.dtype), lse


def gradients(
    x: Operands, spec: Spec, dout, lse, delta, settings: Settings | None = None
) -> Operands:
    """The gradients of the arrays of x, like x; None for segment ids and q_offset.

    x, dout   [batch, length, heads, head_dim]
    lse       float32 [batch, heads, q_length]; may include keys that x does not hold, whose part of
              the gradients is then left out (ring attention sums the parts)
    delta     float32 like lse: sum(out * dout) over head_dim, minus the gradient of lse
    """
    major = _heads_major(x)
    dout = jnp.swapaxes(dout, 1, 2).astype(major.q.dtype)
    grads = heads_major_gradients(major, spec, settings or Settings(), dout, lse, delta)
    public = lambda a: jnp.swapaxes(a, 1, 2).astype(x.q.dtype)
    return grads._replace(q=public(grads.q), k=public(grads.k), v=public(grads.v))


def _heads_major(x: Operands) -> Operands:
    """x with q, k, v [batch, heads, length, head_dim] in a dtype that the matrix unit multiplies,
    and q_offset [batch]."""
    # The matrix unit has no float16; float32 holds all of its values.
    dtype = jnp.float32 if x.q.dtype == jnp.float16 else x.q.dtype
    major = lambda a: jnp.swapaxes(a, 1, 2).astype(dtype)
    x = x._replace(q=major(x.q), k=major(x.k), v=major(x.v))
    if x.q_offset is not None:
        x = x._replace(q_offset=jnp.broadcast_to(x.q_offset, x.q.shape[:1]))
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def heads_major_attention(x: Operands, spec: Spec, settings: Settings):
    """`attention` of arrays [batch, heads, length, head_dim], q_offset [batch]; not float16."""

    def run(x):
        return forward(x, _plan(_blocks("forward", x, spec, settings), x, spec, settings))

    return over_mesh(run, x, (), (QUERY, ROWS))


def _forward(x: Operands, spec: Spec, settings: Settings):
    # Named for rematerialization policies: if these two are saved, the kernel does not run again.
    out, lse = checkpoint_name(heads_major_attention(x, spec, settings), "attention")
    return (out, lse), (x, out, lse)


def _backward(spec: Spec, settings: Settings, residuals, cotangents):
    x, out, lse = residuals
    dout, dlse = cotangents
    product = out.astype(jnp.float32) * dout.astype(jnp.float32)
    delta = jnp.sum(product, axis=-1) - dlse
    return (heads_major_gradients(x, spec, settings, dout.astype(x.q.dtype), lse, delta),)


heads_major_attention.defvjp(_forward, _backward)


def heads_major_gradients(
    x: Operands, spec: Spec, settings: Settings, dout, lse, delta
) -> Operands:
    """`gradients` of heads-major arrays."""
    run = lambda *arrays: _by_keys(*arrays, spec, settings)
    more = ((QUERY, dout), (ROWS, lse), (ROWS, delta))
    results = (QUERY, KEYS, KEYS, *(("bh",) if x.slopes is not None else ()))
    dq, dk, dv, *dslopes = over_mesh(run, x, more, results)
    dsinks = None
    if x.sinks is not None:
        dsinks = sink_gradient(x.sinks, lse, delta).astype(x.sinks.dtype)
    dslopes = dslopes[0].sum(0).astype(x.slopes.dtype) if dslopes else None
    return Operands(q=dq, k=dk, v=dv, slopes=dslopes, sinks=dsinks)


def _by_keys(x: Operands, dout, lse, delta, spec: Spec, settings: Settings):
    """`backward`, in calls with as many keys as VMEM holds gradients for."""
    kv_length = x.k.shape[2]
    blocks = _blocks("backward", x, spec, settings)
    budget = settings.key_gradients or vmem_limit() - _bytes("backward", blocks, x, keys=0)
    per_key = backward_bytes(blocks, x.k.shape[3], x.k.dtype.itemsize, False, 1)
    per_key -= backward_bytes(blocks, x.k.shape[3], x.k.dtype.itemsize, False, 0)
    size = max(budget // per_key // blocks.k, 1) * blocks.k
    if size >= kv_length:
        plan = _plan(blocks, x, spec, settings)
        return backward(x, dout, lse, delta, plan, x.q.dtype)
    parts = []
    for start in range(0, kv_length, size):
        stop = min(start + size, kv_length)
        plan = _plan(blocks, x, spec, settings, start, stop)
        part = _with_keys(x, start, stop)
        parts.append(backward(part, dout, lse, delta, plan, jnp.float32))
    dq, dk, dv, *dslopes = zip(*parts, strict=True)
    dq = sum(dq).astype(x.q.dtype)
    return dq, jnp.concatenate(dk, 2), jnp.concatenate(dv, 2), *(sum(a) for a in dslopes)


def _with_keys(x: Operands, start: int, stop: int) -> Operands:
    """The call restricted to the keys [start, stop)."""
    ids = x.kv_segment_ids
    return x._replace(
        k=x.k[:, :, start:stop],
        v=x.v[:, :, start:stop],
        kv_segment_ids=None if ids is None else ids[:, start:stop],
    )


def _plan(blocks: Blocks, x: Operands, spec: Spec, settings: Settings, start=0, stop=None) -> Plan:
    """The plan for the keys [start, stop) of x."""
    q_length, kv_length = x.q.shape[2], x.k.shape[2]
    stop = kv_length if stop is None else stop
    return Plan(
        spec=spec,
        blocks=blocks,
        visits=visits(spec.mask, blocks, q_length, kv_length, spec.q_offset, start, stop),
        groups=x.q.shape[1] // x.k.shape[1],
        q_length=q_length,
        kv_length=stop,
        k_start=start,
        interpret=settings.interpret,
    )


def _blocks(which: str, x: Operands, spec: Spec, settings: Settings) -> Blocks:
    """The requested blocks (Unsupported if they exceed VMEM), else the table's, reduced to fit."""
    q_length, kv_length = x.q.shape[2], x.k.shape[2]
    asked = getattr(settings, which)
    blocks = _fit(asked or _tuned(which, x, spec), q_length, kv_length)
    needed, limit = _bytes(which, blocks, x), vmem_limit()
    while not asked and needed > limit and blocks.k > LANES:
        half = Blocks(blocks.q, blocks.k // 2 // LANES * LANES, blocks.sub_q, blocks.ahead)
        blocks = half if half.k >= half.q else _fit(half, half.k, kv_length)
        needed = _bytes(which, blocks, x)
    if needed > limit and settings.interpret is False:
        raise Unsupported(
            f"{which} blocks {blocks.q}x{blocks.k} at head_dim {x.q.shape[3]} need about "
            f"{needed >> 20} MiB of VMEM; allowed: {limit >> 20} MiB"
        )
    return blocks


def fits(which: str, blocks: Blocks, x: Operands) -> bool:
    """Whether `which` ("forward", "backward") fits VMEM with these blocks; x in any layout."""
    return _bytes(which, blocks, x) <= vmem_limit()


def _bytes(which: str, blocks: Blocks, x: Operands, keys: int | None = None) -> int:
    """Bytes of VMEM. keys: how many to hold gradients for; None: one block, the minimum."""
    args = (blocks, x.q.shape[3], x.q.dtype.itemsize, x.q_segment_ids is not None)
    if which == "forward":
        return forward_bytes(*args)
    return backward_bytes(*args, keys=blocks.k if keys is None else keys)


def _tuned(which: str, x: Operands, spec: Spec) -> Blocks:
    head_dim, length = x.q.shape[3], x.k.shape[2]
    kind = tuning.mask_kind(spec.mask)
    name = f"flash_attention_{which}"
    dtype = str(x.q.dtype)
    row = tuning.lookup(name, device_kind(), dtype, head_dim, length, kind)
    if row is None or row.dtype != dtype:
        return FLOAT32 if dtype == "float32" else UNTUNED[which]
    return Blocks(row.q, row.k, row.sub_q, bool(row.ahead))


def _fit(blocks: Blocks, q_length: int, kv_length: int) -> Blocks:
    """The blocks, reduced so that in a short call only the last block is padded."""

    def shrink(block, length):
        step, count = min(LANES, block), -(-length // block)
        return min(-(-length // (count * step)) * step, block)

    q, step = shrink(blocks.q, q_length), min(LANES, blocks.sub_q)
    sub_q = next(s for s in range(min(blocks.sub_q, q), 0, -step) if q % s == 0)
    return Blocks(q, shrink(blocks.k, kv_length), sub_q, blocks.ahead)
