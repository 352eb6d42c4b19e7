"""Attention whose length may be split over the mesh axis `sequence`.

Without the axis this is `kernels_pallas.attention`. With it each device has a part of the queries
and of the keys, and they meet in one of two ways, inside one `jax.shard_map` that also splits the
batch and the heads as the sharding table says:

ring        keys and values go round the devices (`kernels_pallas.ring_attention`); works for any
            number of heads, and sends (n - 1) / n of all keys and values.
all_to_all  length is exchanged for heads, plain attention runs on the whole length with a share of
            the heads, and the result is exchanged back (Jacobs et al. 2023, DeepSpeed-Ulysses,
            section 3). The axis has to divide the query heads of a device. Where it does not divide
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
    free_axes,
    split_over,
    whole_axes,
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
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Attention of q [batch, length, heads, head_dim] to k and v [batch, kv_length, kv_heads, ...].

    Args:
      q: queries.
      k: keys; of another length than q they are not split, but whole on every device.
      v: values.
      mask: of `kernels_pallas`.
      parallel: how the sequence axis is used; None: not at all, every device has the whole length.
      order: of the tokens, as `token_order` says; "contiguous" for masks other than causal ones.
      segment_ids: None, [batch, length], or a pair of [batch, length] and [batch, kv_length].
      slopes: None, or those of ALiBi, [heads].
      scale: of the scores; 1 / sqrt(head_dim) if None.
      logits_soft_cap: tanh cap of the scores.
      backend: of `kernels_pallas`.

    Returns:
      [batch, length, heads, head_dim].

    Raises:
      ConfigError: a length or a number of heads that the axis does not divide.
    """
    if not (isinstance(segment_ids, tuple) or segment_ids is None):
        segment_ids = segment_ids, segment_ids
    shared = dict(mask=mask, scale=scale, logits_soft_cap=logits_soft_cap, backend=backend)
    if parallel is None or axis_size(SEQUENCE) == 1:
        return _plain(q, k, v, segment_ids, slopes, **shared)
    check_length(q.shape[1], parallel)
    batch = (*split_over("batch", q.shape[0]), *whole_axes())
    heads = split_over("kv_heads", k.shape[2])
    whole_keys = k.shape[1] != q.shape[1]
    if whole_keys:
        run = lambda *x: _plain(*x, **shared)
    elif parallel.sequence == "ring":
        run = lambda *x: _ring(*x, order=order, **shared)
    else:
        run = lambda *x: _all_to_all(*x, **shared)
    kv_length = None if whole_keys else SEQUENCE
    of_queries = PartitionSpec(batch, SEQUENCE, heads or None)
    of_keys = PartitionSpec(batch, kv_length, heads or None)
    of_ids = PartitionSpec()
    if segment_ids is not None:
        of_ids = PartitionSpec(batch, SEQUENCE), PartitionSpec(batch, kv_length)
    return jax.shard_map(
        run,
        in_specs=(of_queries, of_keys, of_keys, of_ids, PartitionSpec(heads or None)),
        out_specs=of_queries,
        axis_names=free_axes(),
        check_vma=False,
    )(q, k, v, segment_ids, None if slopes is None else jnp.asarray(slopes))


def _plain(q, k, v, segment_ids, slopes, **shared) -> jax.Array:
    bias = None if slopes is None else kernels_pallas.Alibi(slopes)
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
            f"{heads} query heads a device are not divisible by --mesh.sequence={size}, which "
            "--parallel.sequence=all_to_all needs; ring takes any number"
        )
    exchange = lambda a, split, joined: jax.lax.all_to_all(a, SEQUENCE, split, joined, tiled=True)
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
