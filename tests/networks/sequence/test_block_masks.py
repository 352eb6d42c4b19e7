"""Masks of blocks: which blocks are skipped follows from which pairs are allowed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from genai_jax.networks.sequence.block_masks import BlockCausal, TwoStreams

LENGTH = 12


@pytest.mark.parametrize(
    "mask", [BlockCausal(1), BlockCausal(4), *(TwoStreams(LENGTH, b) for b in (1, 3, 4, 12))]
)
def test_ranges_and_kinds_cover_what_is_allowed(mask):
    size = 2 * LENGTH
    ids = np.arange(size)
    allowed = mask.allowed(ids[:, None], ids[None])
    assert allowed.any(1).all()  # every token sees at least itself
    parts = [(a, min(a + n, size)) for n in (1, 4, 5) for a in range(0, size, n)]
    for queries in parts:
        seen = np.flatnonzero(allowed[slice(*queries)].any(0))
        start, stop = mask.key_range(*queries, size)
        assert start <= seen[0] and seen[-1] < stop <= size, queries
    kinds = {"full": lambda x: x.all(), "skipped": lambda x: not x.any(), "partial": lambda x: True}
    for queries, keys in itertools.product(parts, parts):
        kind = mask.block_kind(*queries, *keys)
        assert kinds[kind](allowed[slice(*queries), slice(*keys)]), (queries, keys, kind)


def test_two_streams_by_their_definition():
    mask, n = TwoStreams(6, 2), 6
    block = lambda i: i % n // 2
    for q, k in itertools.product(range(12), range(12)):
        if q < n and k < n:
            expected = block(q) == block(k)
        elif q < n:
            expected = block(k) < block(q)
        else:
            expected = k >= n and block(k) <= block(q)
        assert mask.allowed(np.array(q), np.array(k)) == expected, (q, k)


def test_all_cpu_kernels_agree():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2 * LENGTH, 1, 8))
    mask, names = TwoStreams(LENGTH, 4), kernels_pallas.backends("cpu")
    results = [kernels_pallas.attention(q, k, v, mask=mask, backend=b) for b in names]
    assert len(results) > 1
    for other in results[1:]:
        assert float(jnp.max(jnp.abs(other - results[0]))) < 1e-5
