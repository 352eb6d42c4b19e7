"""Sources and targets from one text: lengths, what they restore, and what is left of the text."""

import collections

import numpy as np
import pytest

from genai_jax.data.text.noise import Noise, hide_spans, infill, permute_sentences, restore_spans
from genai_jax.data.text.source_target import Corruption, Halves, Lengths

FIRST, COUNT, END = 300, 600, 900


def text_of(length, seed=0):
    return np.random.default_rng(seed).integers(1, 256, length).astype(np.int32)


def test_lengths_of_the_t5_paper():
    """Raffel et al. 2020: 512 tokens of input need 568 of text and leave 114 of target."""
    noise = Noise(0.15, 3)
    assert noise.counts(568) == (85, 28)
    assert noise.lengths(568) == (512, 114)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 17, 568])
@pytest.mark.parametrize("noise", [Noise(0.15, 3), Noise(0.5, 1), Noise(0.9, 10)])
def test_source_and_target_restore_the_text(length, noise):
    ids = text_of(length)
    for seed in range(5):
        source, target = hide_spans(ids, noise, FIRST, END, np.random.default_rng(seed))
        assert (len(source), len(target)) == noise.lengths(length)
        np.testing.assert_array_equal(restore_spans(source, target, FIRST, COUNT, END), ids)
        spans = noise.counts(length)[1]
        own = lambda x: [int(i) for i in x if FIRST <= i < END]
        assert own(source) == own(target) == [FIRST + i for i in range(spans)]
        assert length < 2 or len(source) + len(target) == length + 2 * spans + 2


def test_spans_are_anywhere_and_have_their_mean_length():
    noise, rng = Noise(0.25, 3), np.random.default_rng(0)
    lengths, places = [], collections.Counter()
    for _ in range(300):
        _, target = hide_spans(np.arange(40), noise, FIRST, END, rng)
        starts = np.flatnonzero(target >= FIRST)
        lengths += list(np.diff(starts) - 1)
        places.update(target[target < 40].tolist())
    assert np.mean(lengths) == pytest.approx(10 / 3, rel=1e-6)
    assert set(places) == set(range(1, 40)) and {1, 2, 3, 4, 5} <= set(lengths)


def test_a_target_that_lacks_spans_or_repeats_them_restores_the_rest():
    source = np.array([1, FIRST, 2, FIRST + 1, 3, END])
    target = np.array([FIRST + 1, 8, 9, FIRST + 7, 5])
    assert restore_spans(source, target, FIRST, COUNT, END).tolist() == [1, 2, 8, 9, 3]


@pytest.mark.parametrize("length", [1, 2, 30, 400])
def test_infilling_keeps_the_order_of_what_it_keeps(length):
    ids, noise = np.arange(1, length + 1), Noise(0.3, 3)
    gaps = []
    for seed in range(20):
        source = infill(ids, noise, 1000, length, np.random.default_rng(seed))
        kept = source[source != 1000]
        assert len(source) <= length and len(kept) == length - noise.counts(length)[0]
        assert np.all(np.diff(kept) > 0)
        gaps.append(np.sum(source == 1000))
    if length == 400:  # one gap for each 3 tokens, those of length 0 among them
        assert np.mean(gaps) == pytest.approx(120 / 3, rel=0.1)


def test_sentences_are_permuted_whole():
    ids = np.array([5, 6, 9, 7, 9, 9, 8])  # 9 ends a sentence
    seen = set()
    for seed in range(300):
        mixed = permute_sentences(ids, ids == 9, np.random.default_rng(seed))
        seen.add(tuple(mixed.tolist()))
    assert len(seen) == 24 and tuple(ids.tolist()) in seen
    assert all(sorted(x) == sorted(ids.tolist()) and "5, 6, 9" in str(x) for x in seen)


def packed_row():
    """Documents of 5 and of 4 tokens, and padding."""
    segments = np.repeat([1, 2, 0], [5, 4, 3]).astype(np.int32)
    targets = np.arange(10, 22).astype(np.int32) * (segments > 0)
    tokens = np.roll(targets, 1) * (segments > 0)
    return {
        "tokens": tokens, "targets": targets, "segment_ids": segments,
        "positions": np.array([*range(5), *range(4), 0, 0, 0], np.int32),
        "loss_mask": (segments > 0).astype(np.float32),
    }  # fmt: skip


def test_halves_keep_every_target_once():
    row = packed_row()
    halves = Halves(Lengths(6, 12))(row, (0, 0, 0))
    for name in ("tokens", "targets", "loss_mask"):
        np.testing.assert_array_equal(halves[name], row[name])
    assert halves["segment_ids"].tolist() == [1, 1, 2, 2, 2, 3, 3, 4, 4, 0, 0, 0]
    assert halves["positions"].tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 0, 0]
    assert halves["source_tokens"].tolist() == [10, 11, 15, 16, 0, 0]
    assert halves["source_segment_ids"].tolist() == [2, 2, 4, 4, 0, 0]


def test_a_corrupted_row_has_the_text_of_its_documents_and_depends_on_its_place():
    noise, row = Noise(0.3, 2), packed_row()
    corrupt = lambda ids, rng: hide_spans(ids, noise, FIRST, END, rng)
    rewrite = Corruption(corrupt, Lengths(*noise.lengths(12)), 0, (7, 1))
    rows = [rewrite(row, (0, place, 0)) for place in (3, 3, 4)]
    for name, array in rows[0].items():
        np.testing.assert_array_equal(array, rows[1][name])
    assert not np.array_equal(rows[0]["source_tokens"], rows[2]["source_tokens"])
    for out in rows:
        real = out["segment_ids"] > 0
        source = out["source_tokens"][out["source_segment_ids"] > 0]
        restored = restore_spans(source, out["targets"][real], FIRST, COUNT, END)
        np.testing.assert_array_equal(restored, row["targets"][:9])
        assert out["tokens"][0] == 0
        np.testing.assert_array_equal(out["tokens"][1:][real[1:]], out["targets"][:-1][real[1:]])
    empty = rewrite({**row, "segment_ids": row["segment_ids"] * 0}, (0, 0, 0))
    assert not any(array.any() for array in empty.values())
