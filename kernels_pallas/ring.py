"""Ring attention (Liu, Zaharia & Abbeel 2023): a sequence split over the devices of a mesh axis.

Each device keeps its queries, and the keys travel around the ring: while a device attends to one
piece, the next one is already being sent. Partial results are combined by `merge`; in the backward
pass the gradients of keys and values travel with them. Under a causal mask, the first devices of a
contiguous split have little work and the last ones a lot. In "zigzag" order, device i of n holds
the pieces i and 2n - 1 - i of 2n, so that all devices have the same amount of work.

How two pieces relate under the mask is known at trace time for each pair of devices, so invisible
pairs cost nothing, full ones need no comparison, and every mask works. On a long ring all steps but
the first and the last are one loop, so that the program does not grow with the ring.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .attention import BACKENDS, resolve
from .masks import Causal, Full, Mask
from .merge import merge
from .scores import accumulator, sink_gradient
from .spec import Operands, Spec
from .validate import prepare

ORDERS = {"contiguous": 1, "zigzag": 2}  # pieces per device
UNROLLED = 4  # devices of the largest ring whose steps are unrolled


@dataclass(frozen=True)
class Ring:
    """The static part of a call."""

    axis_name: str
    size: int  # devices on the ring
    order: str
    spec: Spec
    backend: str

    @property
    def pieces(self) -> int:
        """Pieces per device."""
        return ORDERS[self.order]

    def start(self, device: int, piece: int, length: int) -> int:
        """Position of the first token of a device's piece; pieces are `length` long."""
        last = self.pieces * self.size - 1
        return (last - device if piece else device) * length


@dataclass(frozen=True)
class Pair:
    """The mask between a piece of queries and a piece of keys. Pieces without visible pairs have
    None instead."""

    mask: Mask
    q_offset: int


def ring_attention(
    q,
    k,
    v,
    *,
    axis_name,
    order="contiguous",
    mask=Causal(),  # noqa: B008 (frozen)
    bias=None,
    segment_ids=None,
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    backend="auto",
    return_lse=False,
):
    """`attention` over a sequence split along mesh axis `axis_name`; call it in jax.shard_map.

    q, k, v      this device's part, [batch, length, heads, head_dim] and kv_heads, of equal length
    axis_name    the mesh axis, of n devices
    order        "contiguous": device i holds the i-th part; "zigzag": it holds parts i and
                 2n - 1 - i of 2n, in this order, as `zigzag` arranges them; balances causal masks
    bias         None or Alibi(slopes)
    segment_ids  None or this device's ints [batch, length], or a pair of them
    backend      "auto" or one that returns the log-sum-exp, chosen for one pair of pieces

    Other arguments and results as in `attention`; positions are those of the whole sequence.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; allowed: {', '.join(ORDERS)}")
    operands, spec = prepare(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        segment_ids=segment_ids,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
    )
    _check(operands, order)
    operands = jax.tree.map(jnp.asarray, operands)
    piece = _query_piece(_key_piece(operands, 0, ORDERS[order]), 0, ORDERS[order])
    name, _ = resolve(backend, piece._replace(sinks=None), spec, needs_lse=True)
    ring = Ring(axis_name, _size(axis_name), order, spec, name)
    out, lse = _ring(operands, ring)
    return (out, lse) if return_lse else out


def zigzag(x, size: int, axis: int = 1):
    """A whole array reordered so that its equal parts on `size` devices are in zigzag order.

    ValueError unless 2 * size divides the axis. `zigzag(positions)` are the positions to embed.
    """
    return jnp.take(x, _zigzag_order(x.shape[axis], size), axis=axis)


def unzigzag(x, size: int, axis: int = 1):
    """Undoes `zigzag`."""
    return jnp.take(x, np.argsort(_zigzag_order(x.shape[axis], size)), axis=axis)


def _zigzag_order(length: int, size: int) -> np.ndarray:
    """[length]: the position of the token at each index after reordering."""
    if length % (2 * size):
        raise ValueError(
            f"length {length} on {size} devices in zigzag order; allowed: multiples of {2 * size}"
        )
    parts = np.arange(length).reshape(2 * size, -1)
    return np.stack([parts[:size], parts[size:][::-1]], axis=1).ravel()


def _size(axis_name) -> int:
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name is {axis_name!r}; allowed: a manual axis of an enclosing jax.shard_map"
        ) from None


def _check(x: Operands, order: str):
    q_length, kv_length = x.q.shape[1], x.k.shape[1]
    if x.bias is not None:
        raise ValueError("bias is an array; allowed in ring attention: None or Alibi(slopes)")
    if q_length != kv_length:
        raise ValueError(f"q_length {q_length} and kv_length {kv_length} per device; must be equal")
    if q_length % ORDERS[order]:
        raise ValueError(f"length {q_length} per device in {order} order; allowed: even lengths")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ring(x: Operands, ring: Ring):
    return _forward(x, ring)[0]


def _forward(x: Operands, ring: Ring):
    """((out, lse), residuals): one pass of the keys around the ring."""
    batch, q_length, heads, _ = x.q.shape
    dtype = accumulator(x.q.dtype)
    out = jnp.zeros(x.q.shape, dtype)
    lse = jnp.full((batch, heads, q_length), -jnp.inf, dtype)
    if x.sinks is not None:
        lse = jnp.broadcast_to(x.sinks.astype(dtype)[:, None], lse.shape)

    def turn(carry, step: Step):
        seen, keys = carry
        here = x._replace(k=keys[0], v=keys[1], kv_segment_ids=keys[2], sinks=None)
        if not step.last:
            keys = _pass_on(keys, ring)
        # A piece is sent while the previous one is attended to, not earlier: otherwise the compiler
        # sends all of them first.
        return jax.lax.optimization_barrier((_see(here, seen, ring, step), keys))

    seen, _ = _round(turn, ((out, lse), (x.k, x.v, x.kv_segment_ids)), ring)
    out, lse = seen
    out = out.astype(x.q.dtype)
    return (out, lse), (x, out, lse)


class Step(NamedTuple):
    """A step of a pass: its index, the indices it may have as known at trace time, and the number
    of steps."""

    index: int | jax.Array
    among: range
    count: int

    @property
    def first(self) -> bool:
        return 0 in self.among

    @property
    def last(self) -> bool:
        return self.count - 1 in self.among


def _round(turn, carry, ring: Ring):
    """turn(carry, step) for every step of a pass."""
    single = lambda i: Step(i, range(i, i + 1), ring.size)
    if ring.size <= UNROLLED:
        for i in range(ring.size):
            carry = turn(carry, single(i))
        return carry
    between = range(1, ring.size - 1)
    carry = turn(carry, single(0))
    body = lambda i, carry: turn(carry, Step(i, between, ring.size))
    carry = jax.lax.fori_loop(between.start, between.stop, body, carry)
    return turn(carry, single(ring.size - 1))


def _see(x: Operands, seen, ring: Ring, step: Step):
    """`seen`, the (out, lse) of all queries, merged with the keys of this step."""
    parts = []
    for i in range(ring.pieces):
        out, lse = _rows(seen[0], i, ring.pieces, 1), _rows(seen[1], i, ring.pieces, 2)
        queries = _query_piece(x, i, ring.pieces)
        for j in range(ring.pieces):
            operands = _key_piece(queries, j, ring.pieces)

            def attend(pair, operands=operands, before=(out, lse)):
                if pair is None:
                    return before
                new = BACKENDS[ring.backend].run(operands, _spec(ring, pair))
                return merge(*before, *new)

            out, lse = _by_device(ring, step, i, j, operands, attend)
        parts.append((out, lse))
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 2)


def _backward(ring: Ring, residuals, cotangents):
    """Another pass around the ring: dq stays, dk and dv travel with their keys and return."""
    x, out, lse = residuals
    dout, dlse = cotangents
    dtype = accumulator(x.q.dtype)
    product = out.astype(dtype) * dout.astype(dtype)
    delta = jnp.swapaxes(product.sum(-1), 1, 2) - dlse
    zeros = lambda a: jnp.zeros(a.shape, dtype)
    dq, dslopes = zeros(x.q), None if x.slopes is None else zeros(x.slopes)

    def turn(carry, step: Step):
        (dq, dslopes), keys, grads = carry
        here = x._replace(k=keys[0], v=keys[1], kv_segment_ids=keys[2], sinks=None)
        if not step.last:
            keys = _pass_on(keys, ring)
        if not step.first:  # sent while the next gradients are computed, also in a loop
            grads = _pass_on(grads, ring)
        added = _pull(here, dout, lse, delta, ring, step)
        added, keys = jax.lax.optimization_barrier((added, keys))
        dslopes = None if dslopes is None else dslopes + added.slopes
        return (dq + added.q, dslopes), keys, (grads[0] + added.k, grads[1] + added.v)

    keys, grads = (x.k, x.v, x.kv_segment_ids), (zeros(x.k), zeros(x.v))
    (dq, dslopes), _, grads = _round(turn, ((dq, dslopes), keys, grads), ring)
    grads = _pass_on(grads, ring)
    dsinks = None if x.sinks is None else sink_gradient(x.sinks, lse, delta)
    gradients = Operands(dq, *grads, slopes=dslopes, sinks=dsinks)
    return (jax.tree.map(lambda a, like: a.astype(like.dtype), gradients, _differentiable(x)),)


def _pull(x: Operands, dout, lse, delta, ring: Ring, step: Step) -> Operands:
    """Gradients of the arrays that x holds at this step, summed over its pairs of pieces."""
    dtype = accumulator(x.q.dtype)
    by_pair = []
    for i in range(ring.pieces):
        rows = functools.partial(_rows, index=i, pieces=ring.pieces)
        cotangents = rows(dout, axis=1), rows(lse, axis=2), rows(delta, axis=2)
        queries = _query_piece(x, i, ring.pieces)
        for j in range(ring.pieces):
            operands = _key_piece(queries, j, ring.pieces)

            def gradients(pair, operands=operands, cotangents=cotangents):
                like = _differentiable(operands)
                if pair is None:
                    return jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), like)
                backend = BACKENDS[ring.backend]
                got = backend.gradients(operands, _spec(ring, pair), *cotangents)
                return jax.tree.map(lambda a: a.astype(dtype), got)

            by_pair.append(_by_device(ring, step, i, j, operands, gradients))
    return _add_pieces(by_pair, ring.pieces)


_ring.defvjp(_forward, _backward)


def _add_pieces(by_pair: list[Operands], pieces: int) -> Operands:
    """The gradients of whole arrays from those of pairs of pieces, ordered (queries, keys)."""
    at = lambda i, j: by_pair[i * pieces + j]
    every = range(pieces)
    dq = [sum(at(i, j).q for j in every) for i in every]
    dk = [sum(at(i, j).k for i in every) for j in every]
    dv = [sum(at(i, j).v for i in every) for j in every]
    slopes = None if by_pair[0].slopes is None else sum(g.slopes for g in by_pair)
    return Operands(*(jnp.concatenate(parts, 1) for parts in (dq, dk, dv)), slopes=slopes)


def _differentiable(x: Operands) -> Operands:
    return Operands(x.q, x.k, x.v, slopes=x.slopes, sinks=x.sinks)


def _rows(a, index: int, pieces: int, axis: int):
    """Part `index` of `pieces` equal parts of a along `axis`."""
    size = a.shape[axis] // pieces
    return jax.lax.slice_in_dim(a, index * size, (index + 1) * size, axis=axis)


def _query_piece(x: Operands, index: int, pieces: int) -> Operands:
    ids = x.q_segment_ids
    return x._replace(
        q=_rows(x.q, index, pieces, 1),
        q_segment_ids=None if ids is None else _rows(ids, index, pieces, 1),
    )


def _key_piece(x: Operands, index: int, pieces: int) -> Operands:
    ids = x.kv_segment_ids
    return x._replace(
        k=_rows(x.k, index, pieces, 1),
        v=_rows(x.v, index, pieces, 1),
        kv_segment_ids=None if ids is None else _rows(ids, index, pieces, 1),
    )


def _pass_on(arrays, ring: Ring):
    """Sends each device's arrays to the next device."""
    to_next = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, ring.axis_name, to_next), arrays)


def _spec(ring: Ring, pair: Pair) -> Spec:
    return replace(ring.spec, mask=pair.mask, q_offset=pair.q_offset)


def _by_device(ring: Ring, step: Step, i: int, j: int, x: Operands, function):
    """function(pair) for this device's piece i of queries and its piece j of keys at this step.

    The pair depends on the device and the step; devices and steps with equal pairs share a branch.
    """
    length, devices = x.q.shape[1], range(ring.size)
    pairs = [
        [_pair(ring, d, (d - s) % ring.size, i, j, length, x) for d in devices] for s in step.among
    ]
    kinds = list(dict.fromkeys(itertools.chain(*pairs)))
    if len(kinds) == 1:
        return function(kinds[0])
    branches = jnp.asarray([[kinds.index(pair) for pair in row] for row in pairs])
    branch = branches[step.index - step.among.start, jax.lax.axis_index(ring.axis_name)]
    return jax.lax.switch(branch, [functools.partial(function, kind) for kind in kinds])


def _pair(ring: Ring, q_device, k_device, i, j, length: int, x: Operands) -> Pair | None:
    q_start = ring.start(q_device, i, length)
    k_start = ring.start(k_device, j, length)
    kind = ring.spec.mask.block_kind(q_start, q_start + length, k_start, k_start + length)
    if kind == "skipped":
        return None
    if kind == "full" and x.slopes is None:
        return Pair(Full(), 0)
    return Pair(Full() if kind == "full" else ring.spec.mask.shifted(k_start), q_start - k_start)
