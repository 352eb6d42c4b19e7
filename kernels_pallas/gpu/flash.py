"""Flash attention on Hopper: supported calls, block sizes, and the custom gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .. import tuning
from ..device import device_kind
from ..partition import DIMENSIONS, over_mesh
from ..scores import sink_gradient
from ..spec import Operands, Spec, Unsupported
from .backward import KEYS, KEYS_AND_VALUES, QUERIES, VALUES, Role, backward
from .backward import scratch as backward_scratch
from .forward import forward
from .forward import scratch as forward_scratch
from .plan import SHARED_MEMORY, Blocks, Plan, shared_memory
from .schedule import schedule

HEAD_DIMS = (64, 96, 128, 192, 256)  # others are zero-padded to the next of these
DTYPES = ("bfloat16", "float16")  # the tensor core rounds float32 to 10 bits of mantissa
QUERY, KEY, ROWS = DIMENSIONS["q"], DIMENSIONS["k"], "bhl"

# Names in the tuning table, where q are our rows, k our columns and ahead our stages.
KERNELS = dict(
    forward="flash_attention_forward",
    queries="flash_attention_backward_queries",
    keys="flash_attention_backward_keys",
)

# Blocks by head dim for cases not in the tuning table: as many columns as registers allow.
UNTUNED = dict(
    forward={64: (128, 3), 96: (128, 2), 128: (128, 2), 192: (64, 3), 256: (64, 2)},
    queries={64: (128, 3), 96: (64, 3), 128: (64, 3), 192: (64, 2), 256: (64, 2)},
    keys={64: (64, 4), 96: (64, 3), 128: (64, 3), 192: (64, 2), 256: (64, 2)},
)


@dataclass(frozen=True)
class Settings:
    """How the kernels run a call; None: from the tuning table.

    forward, queries, keys: blocks of the forward pass, of the gradient of queries, and of the
    gradients of keys and values. interpret: as in `plgpu.kernel`.
    """

    forward: Blocks | None = None
    queries: Blocks | None = None
    keys: Blocks | None = None
    interpret: object = None


def check(x: Operands, spec: Spec, settings: Settings | None = None):
    """Raises Unsupported(reason) for calls that these kernels do not support."""
    head_dim = x.q.shape[3]
    if str(x.q.dtype) not in DTYPES:
        raise Unsupported(f"dtype {x.q.dtype}; allowed: {', '.join(DTYPES)}")
    if head_dim > HEAD_DIMS[-1] or head_dim % 8:
        raise Unsupported(f"head_dim {head_dim}; allowed: multiples of 8 up to {HEAD_DIMS[-1]}")
    if x.bias is not None:
        raise Unsupported("bias is an array; allowed: None or Alibi(slopes)")
    _check_shared_memory(x, spec, settings or Settings())


def _check_shared_memory(x: Operands, spec: Spec, settings: Settings):
    wide = jax.ShapeDtypeStruct((1, 1, 1, _padded_head_dim(x.q.shape[3])), x.q.dtype)
    padded = x._replace(q=wide)
    needs = {"forward": forward_scratch(padded, _blocks("forward", x, spec, settings))}
    for role in _roles(x, spec, wide.shape[3]):
        needs[role.side] = backward_scratch(padded, role, _blocks(role.side, x, spec, settings))
    for which, scratch in needs.items():
        needed = shared_memory(scratch)
        if needed > SHARED_MEMORY:
            raise Unsupported(
                f"{which} {_blocks(which, x, spec, settings)} at head_dim {wide.shape[3]} need "
                f"{needed} bytes of shared memory; allowed: {SHARED_MEMORY}"
            )


def attention(x: Operands, spec: Spec, settings: Settings | None = None):
    """(out like x.q, lse [batch, heads, q_length]). x [batch, length, heads, head_dim]."""
    settings = settings or Settings()
    check(x, spec, settings)
    out, lse = _attention(_prepared(x), spec, settings)
    return jnp.swapaxes(out, 1, 2)[..., : x.q.shape[3]], lse


def gradients(
    x: Operands, spec: Spec, dout, lse, delta, settings: Settings | None = None
) -> Operands:
    """The gradients of x's arrays, None for those without one.

    x [batch, length, heads, head_dim]; dout like x.q; lse and delta float32 [batch, heads,
    q_length]: the log-sum-exp, possibly over more keys than x holds, and the sum of out * dout
    minus the gradient of lse. The gradient of sinks is not computed here: it is -sum(exp(sink -
    lse) * delta), once for all keys.
    """
    settings = settings or Settings()
    check(x, spec, settings)
    head_dim = x.q.shape[3]
    prepared = _prepared(x._replace(sinks=None))
    dout = _heads_major(dout.astype(x.q.dtype))
    grads = _gradients(prepared, spec, dout, lse, delta, settings)
    public = {name: jnp.swapaxes(getattr(grads, name), 1, 2)[..., :head_dim] for name in "qkv"}
    slopes = None if x.slopes is None else grads.slopes.astype(x.slopes.dtype)
    return Operands(**public, slopes=slopes)


def _prepared(x: Operands) -> Operands:
    """`x` heads-major, as `over_mesh` splits it. The kernels swap the axes back, and the compiler
    removes both swaps. Head dims are padded; slopes and sinks are float32."""
    number = lambda a: None if a is None else a.astype(jnp.float32)
    offset = x.q_offset
    if offset is not None:
        offset = jnp.broadcast_to(offset, x.q.shape[:1]).astype(jnp.int32)
    return x._replace(
        q=_heads_major(x.q),
        k=_heads_major(x.k),
        v=_heads_major(x.v),
        slopes=number(x.slopes),
        sinks=number(x.sinks),
        q_offset=offset,
    )


def _heads_major(a):
    """[batch, length, heads, head_dim] -> [batch, heads, length, padded head_dim]."""
    missing = _padded_head_dim(a.shape[3]) - a.shape[3]
    return jnp.pad(jnp.swapaxes(a, 1, 2), ((0, 0), (0, 0), (0, 0), (0, missing)))


def _length_major(x: Operands) -> Operands:
    swap = lambda a: jnp.swapaxes(a, 1, 2)
    return x._replace(q=swap(x.q), k=swap(x.k), v=swap(x.v))


def _padded_head_dim(head_dim: int) -> int:
    return next(d for d in HEAD_DIMS if d >= head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(x: Operands, spec: Spec, settings: Settings):
    def run(x):
        x = _length_major(x)
        out, lse = forward(x, _plan("forward", x, spec, settings))
        return jnp.swapaxes(out, 1, 2), lse

    return over_mesh(run, x, (), (QUERY, ROWS))


def _forward(x: Operands, spec: Spec, settings: Settings):
    out, lse = _attention(x, spec, settings)
    return (out, lse), (x, out, lse)


def _backward(spec: Spec, settings: Settings, residuals, cotangents):
    x, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
    grads = _gradients(x, spec, dout.astype(x.q.dtype), lse, delta, settings)
    dsinks = None
    if x.sinks is not None:
        dsinks = sink_gradient(x.sinks, lse, delta)
    return (grads._replace(sinks=dsinks),)


_attention.defvjp(_forward, _backward)


def _gradients(x: Operands, spec: Spec, dout, lse, delta, settings: Settings) -> Operands:
    """As `gradients`, with all arrays as returned by `_prepared`."""

    def run(x, dout, lse, delta):
        x, dout, grads = _length_major(x), jnp.swapaxes(dout, 1, 2), {}
        for role in _roles(x, spec, x.q.shape[3]):
            plan = _plan(role.side, x, spec, settings, role.rows_are_keys)
            grads |= backward(x, dout, lse, delta, role, plan)
        public = (jnp.swapaxes(grads[name], 1, 2) for name in "qkv")
        return *public, *((grads["slopes"],) if x.slopes is not None else ())

    more = ((QUERY, dout), (ROWS, lse), (ROWS, delta))
    results = (QUERY, KEY, KEY, *(("bh",) if x.slopes is not None else ()))
    dq, dk, dv, *dslopes = over_mesh(run, x._replace(sinks=None), more, results)
    return Operands(q=dq, k=dk, v=dv, slopes=dslopes[0].sum(0) if dslopes else None)


def _roles(x: Operands, spec: Spec, head_dim: int) -> tuple[Role, ...]:
    """The calls of the backward kernel. Registers hold the gradients of keys and values together up
    to head_dim 128; at 128, with at most one feature that needs additional registers."""
    features = x.slopes, x.q_segment_ids, spec.logits_soft_cap
    extras = sum(feature is not None for feature in features)
    together = head_dim < 128 or (head_dim == 128 and extras <= 1)
    return (QUERIES, KEYS_AND_VALUES) if together else (QUERIES, KEYS, VALUES)


def _plan(which: str, x: Operands, spec: Spec, settings: Settings, keys: bool = False) -> Plan:
    """x [batch, length, heads, head_dim]; keys: whether rows are keys."""
    q_length, kv_length = x.q.shape[1], x.k.shape[1]
    blocks = _blocks(which, x, spec, settings)
    visits = schedule(
        spec.mask, blocks.rows, blocks.columns, q_length, kv_length, spec.q_offset, keys
    )
    return Plan(
        spec=spec,
        blocks=blocks,
        schedule=visits,
        groups=x.q.shape[2] // x.k.shape[2],
        kv_length=kv_length,
        k_padded=kv_length % (blocks.rows if keys else blocks.columns) != 0,
        interpret=settings.interpret,
    )


def _blocks(which: str, x: Operands, spec: Spec, settings: Settings) -> Blocks:
    """x [batch, length, heads, head_dim]."""
    chosen = getattr(settings, which)
    if chosen:
        return chosen
    head_dim, length = x.q.shape[3], x.k.shape[1]
    kind = tuning.mask_kind(spec.mask)
    dtype = str(x.q.dtype)
    row = tuning.lookup(KERNELS[which], device_kind(), dtype, head_dim, length, kind)
    if row and row.head_dim == head_dim:
        return Blocks(row.q, row.k, row.ahead)
    return Blocks(128, *UNTUNED[which][_padded_head_dim(head_dim)])
