"""How often tokens are chosen and replaced, and how long spans are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.tasks.language.corruption import corrupt, span_mask

SHAPE = (64, 2048)


def run_lengths(chosen: np.ndarray) -> np.ndarray:
    """Lengths of the runs of chosen positions that do not touch the ends of a row."""
    lengths = []
    for row in chosen:
        edges = np.flatnonzero(np.diff(row.astype(int)))
        starts, stops = edges[~row[edges]], edges[row[edges]]
        stops = stops[stops > starts[0]]
        lengths += [stop - start for start, stop in zip(starts, stops, strict=False)]
    return np.array(lengths)


@pytest.mark.parametrize(("rate", "span"), [(0.15, None), (0.15, 3.8), (0.5, 2.0), (0.7, 10.0)])
def test_rate_and_mean_length_of_spans(rate, span):
    chosen = np.asarray(span_mask(jax.random.key(0), SHAPE, rate, span))
    mean = 1 / (1 - rate) if span is None else span
    assert chosen.mean() == pytest.approx(rate, rel=0.04)
    # Stationary: the first position as often as any other.
    many = span_mask(jax.random.key(1), (20_000, 1), rate, span)
    assert np.asarray(many).mean() == pytest.approx(rate, abs=0.015)
    lengths = run_lengths(chosen)
    assert lengths.mean() == pytest.approx(mean, rel=0.04)
    # Geometric: the share of runs that go on is the same after any length.
    for k in (1, 2):
        assert (lengths > k).sum() / (lengths >= k).sum() == pytest.approx(1 - 1 / mean, abs=0.03)


@pytest.mark.parametrize("span", [None, 4.0])
def test_the_three_fates_of_a_chosen_token(span):
    tokens = jax.random.randint(jax.random.key(0), SHAPE, 0, 50)
    counts = jnp.arange(SHAPE[1]) % 10 != 0
    seen = corrupt(
        jax.random.key(1), tokens, jnp.broadcast_to(counts, SHAPE), mask_id=99, known=50,
        rate=0.3, span=span, mask_fraction=0.8, random_fraction=0.1,
    )  # fmt: skip
    new, chosen, tokens = (np.asarray(x) for x in (seen.tokens, seen.chosen, tokens))
    assert not chosen[:, ::10].any() and chosen.mean() == pytest.approx(0.27, abs=0.01)
    np.testing.assert_array_equal(new[~chosen], tokens[~chosen])
    masked, same = new[chosen] == 99, new[chosen] == tokens[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert same.mean() == pytest.approx(0.1 + 0.1 / 50, abs=0.01)
    assert new[chosen][~masked].max() < 50
    # Neighbors in a span share their fate; tokens chosen one by one do not.
    pairs = chosen[:, 1:] & chosen[:, :-1]
    left, right = (new[:, :-1] == 99)[pairs], (new[:, 1:] == 99)[pairs]
    assert (left == right).mean() == pytest.approx(1.0 if span else 0.8**2 + 0.2**2, abs=0.01)
