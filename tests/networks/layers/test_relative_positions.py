"""Buckets of relative positions against the numbers of T5's formula, and both ways to a bias."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.networks.layers.relative_positions import RelativeTable, bucket_of


def by_hand(distance, buckets, furthest, both_sides):
    """One distance at a time, in float64; Raffel et al. 2020, section 2.1."""
    first = 0
    if both_sides:
        buckets //= 2
        first = buckets if distance > 0 else 0
        back = abs(distance)
    else:
        back = max(-distance, 0)
    exact = buckets // 2
    if back < exact:
        return first + back
    share = math.log(back / exact) / math.log(furthest / exact)
    return first + min(exact + int(share * (buckets - exact) + 1e-9), buckets - 1)


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20)])
def test_buckets(buckets, furthest, both_sides):
    distances = np.arange(-300, 301)
    expected = [by_hand(d, buckets, furthest, both_sides) for d in distances]
    np.testing.assert_array_equal(bucket_of(distances, buckets, furthest, both_sides), expected)
    # A key after the query is at least 1 away, so that the first of its buckets stays empty.
    assert len(set(expected)) == buckets - both_sides


def test_the_matrix_of_a_sequence_has_the_bias_of_each_query_and_key():
    params = {"params": {"table": np.random.default_rng(0).normal(size=(8, 3))}}
    whole = RelativeTable(8, 20, False, 3).apply(params, 11)
    one_by_one = whole.of_queries(jnp.arange(11)[None], 11, 20)
    np.testing.assert_array_equal(whole.matrix, one_by_one)
    seen_by_both = RelativeTable(8, 20, True, 3).apply(params, 11).matrix
    distance = np.arange(11) - np.arange(11)[:, None]
    expected = jnp.asarray(whole.table)[bucket_of(distance, 8, 20, True)]
    np.testing.assert_array_equal(seen_by_both[0], np.moveaxis(np.asarray(expected), -1, 0))
