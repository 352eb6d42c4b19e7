"""Attention whose length may be split over the mesh axis `sequence`.

Without the axis this is `kernels_pallas.attention`. With it each device has a part of the queries
and of the keys, and they meet in one of two ways, inside one `jax.shard_map` that also splits the
batch and the heads as the sharding table says:

ring        keys and values are passed around the devices (`kernels_pallas.ring_attention`); works
            for any number of heads, and sends (n - 1) / n of all keys and values.
all_to_all  length is exchanged for heads, plain attention runs on the whole length with a share of
            the heads, and the result is exchanged back (Jacobs et al. 2023, DeepSpeed-Ulysses,
            section 3). The axis must divide the query heads of a device. Where it does not divide
            its key heads, each is repeated as often as it takes, which costs that much more to
            send: 8 key heads over 16 devices are sent twice.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import kernels_pallas
from genai_jax.config import ConfigError
from genai_jax.networks.parallel.axes import (
    SEQUENCE,
    ParallelConfig,
    axis_size,
    check_length,
    describe_axis,
    free_axes,
    size_one_axes,
    split_over,
)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: kernels_pallas.Mask,
    parallel: ParallelConfig | None,
    order: str = "contiguous",
    segment_ids=None,
    slopes: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Attention of q [batch, length, heads, head_dim] to k and v [batch, kv_length, kv_heads, ...].

    Args:
      q: queries.
      k: keys. If their length is not that of q they are not split: every device has all of them.
      v: values.
      mask: which keys a query sees.
      parallel: how the sequence axis is used; None leaves the whole length on every device.
      order: order of the tokens, see `token_order`; "contiguous" unless the mask is causal.
      segment_ids: None, [batch, length], or a pair of [batch, length] and [batch, kv_length].
      slopes: slopes of ALiBi, [heads], or None.
      bias: what is added to the scores, [1, heads, length, kv_length], in place of slopes; not for
        use with the sequence axis.
      scale: factor of the scores; 1 / sqrt(head_dim) if None.
      logits_soft_cap: tanh cap of the scores.
      backend: backend of `kernels_pallas`.

    Returns:
      [batch, length, heads, head_dim].

    Raises:
      ConfigError: the axis does not divide the length or the number of heads.
    """
    if not (isinstance(segment_ids, tuple) or segment_ids is None):
        segment_ids = segment_ids, segment_ids
    shared = dict(mask=mask, scale=scale, logits_soft_cap=logits_soft_cap, backend=backend)
    if parallel is None or axis_size(SEQUENCE) == 1:
        return _plain(q, k, v, segment_ids, slopes, bias, **shared)
    if bias is not None:
        raise ConfigError(
            f"{describe_axis(SEQUENCE)}: attention with a learned bias of positions "
            "needs whole sequences on a device"
        )
    check_length(q.shape[1], order if parallel.sequence == "ring" else "contiguous")
    batch = (*split_over("batch", q.shape[0]), *size_one_axes())
    heads = split_over("kv_heads", k.shape[2])
    whole_keys = k.shape[1] != q.shape[1]
    if whole_keys:
        attend = lambda *x: _plain(*x, **shared)
    elif parallel.sequence == "ring":
        attend = lambda *x: _ring(*x, order=order, **shared)
    else:
        attend = lambda *x: _all_to_all(*x, **shared)
    kv_length = None if whole_keys else SEQUENCE
    query_spec = PartitionSpec(batch, SEQUENCE, heads or None)
    key_spec = PartitionSpec(batch, kv_length, heads or None)
    id_spec = PartitionSpec()
    if segment_ids is not None:
        id_spec = PartitionSpec(batch, SEQUENCE), PartitionSpec(batch, kv_length)
    return jax.shard_map(
        attend,
        in_specs=(query_spec, key_spec, key_spec, id_spec, PartitionSpec(heads or None)),
        out_specs=query_spec,
        axis_names=free_axes(),
        check_vma=False,
    )(q, k, v, segment_ids, None if slopes is None else jnp.asarray(slopes))


def _plain(q, k, v, segment_ids, slopes, bias=None, **shared) -> jax.Array:
    bias = bias if slopes is None else kernels_pallas.Alibi(slopes)
    return kernels_pallas.attention(q, k, v, segment_ids=segment_ids, bias=bias, **shared)


def _ring(q, k, v, segment_ids, slopes, **shared) -> jax.Array:
    bias = None if slopes is None else kernels_pallas.Alibi(slopes)
    return kernels_pallas.ring_attention(
        q, k, v, axis_name=SEQUENCE, segment_ids=segment_ids, bias=bias, **shared
    )


def _all_to_all(q, k, v, segment_ids, slopes, **shared) -> jax.Array:
    size, heads, kv_heads = jax.lax.axis_size(SEQUENCE), q.shape[2], k.shape[2]
    if heads % size:
        raise ConfigError(
            f"{heads} query heads per device are not divisible by {describe_axis(SEQUENCE)}, as "
            "all-to-all attention needs; ring attention works for any number"
        )
    exchange = lambda a, split, merge: jax.lax.all_to_all(a, SEQUENCE, split, merge, tiled=True)
    # Equal shares of the heads keep to their key heads: lcm(kv_heads, size) divides heads.
    repeats = math.lcm(kv_heads, size) // kv_heads
    q, *kv = (exchange(a, 2, 1) for a in (q, *(jnp.repeat(a, repeats, 2) for a in (k, v))))
    if segment_ids is not None:
        gather = lambda ids: jax.lax.all_gather(ids, SEQUENCE, axis=1, tiled=True)
        segment_ids = jax.tree.map(gather, segment_ids)
    if slopes is not None:
        share = heads // size
        slopes = jax.lax.dynamic_slice_in_dim(slopes, jax.lax.axis_index(SEQUENCE) * share, share)
    return exchange(_plain(q, *kv, segment_ids, slopes, **shared), 1, 2)
