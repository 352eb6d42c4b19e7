"""Words, windows, and co-occurrences against brute force; analogies as they are written."""

import collections

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.data.text.analogies import read_analogies
from genai_jax.data.text.word_contexts import Epochs, context_windows, cooccurrences, padded_batches
from genai_jax.data.text.words import (
    Corpus,
    as_ids,
    count_words,
    keep_probability,
    noise_distribution,
    split_words,
)

RNG = np.random.default_rng(0)
CORPUS = Corpus(RNG.integers(0, 7, 60).astype(np.int32), np.sort(RNG.integers(0, 5, 60)))


def test_words():
    text = "Don't print(x_1, 3.14, utf8); IT\u2019S na\u00efve -- 42 'quoted' \udcff __init__ 2to3"
    expected = ["don't", "print", "x", "utf8", "it's", "naïve", "quoted", "init", "2to3"]
    assert split_words(text) == expected
    assert split_words("3.14 + 15 = ... ''' _ _") == []


def test_the_vocabulary_is_by_frequency():
    counted = count_words(["b b a a c", "b d d"], 2, None)
    assert counted.words == ("b", "a", "d") and counted.counts.tolist() == [3, 2, 2]
    assert count_words(["b b a"], 1, 1).words == ("b",)
    corpus = as_ids(["a x b", "", "d b"], counted.words)
    assert corpus.ids.tolist() == [1, 0, 2, 0] and corpus.documents.tolist() == [0, 0, 2, 2]


def test_subsampling_and_noise():
    counts = np.array([9000, 900, 90, 10])
    kept = keep_probability(counts, 1e-3)
    np.testing.assert_allclose(kept, [(1e-3 / 0.9) ** 0.5, (1e-3 / 0.09) ** 0.5, (1 / 9) ** 0.5, 1])
    assert keep_probability(counts, 0).tolist() == [1] * 4
    noise = noise_distribution(np.array([16, 1, 81]), 0.75)
    np.testing.assert_allclose(noise, np.array([8, 1, 27]) / 36)


@pytest.mark.parametrize("window", [1, 3])
def test_windows_equal_brute_force(window):
    radius = RNG.integers(1, window + 1, 60)
    batch = context_windows(CORPUS, np.arange(60), window, radius)
    for i in range(60):
        near = [j for j in range(i - radius[i], i + radius[i] + 1) if j != i and 0 <= j < 60]
        expected = [CORPUS.ids[j] for j in near if CORPUS.documents[j] == CORPUS.documents[i]]
        there = batch["context_mask"][i] > 0
        assert batch["context"][i][there].tolist() == expected
        assert batch["word"][i] == CORPUS.ids[i]


def test_cooccurrences_equal_brute_force():
    window, expected = 4, collections.Counter()
    for i in range(60):
        for j in range(60):
            if 0 < abs(i - j) <= window and CORPUS.documents[i] == CORPUS.documents[j]:
                expected[int(CORPUS.ids[i]), int(CORPUS.ids[j])] += 1 / abs(i - j)
    cells = cooccurrences(CORPUS, 7, window)
    counted = dict(
        zip(zip(*(x.tolist() for x in cells[:2]), strict=True), cells.counts, strict=True)
    )
    assert counted.keys() == expected.keys()
    for pair, count in expected.items():
        assert counted[pair] == pytest.approx(count) == pytest.approx(counted[pair[::-1]])


def test_batches_are_passes_that_resume_and_divide():
    read = lambda places: {"place": places}
    make = lambda rows=range(4): Epochs(lambda epoch: (10 + epoch, read), 4, rows, 7)
    whole, halves = make(), [make([0, 2]), make([1, 3])]
    batches = [whole.next_batch()["place"] for _ in range(2)]
    assert len({*np.concatenate(batches)}) == 8  # the two that are left are dropped
    state = whole.get_state()
    assert state == {"epoch": 1, "batch": 0}
    batches += [whole.next_batch()["place"] for _ in range(3)]
    resumed = make()
    resumed.set_state(state)
    for expected in batches[2:]:
        np.testing.assert_array_equal(resumed.next_batch()["place"], expected)
    for expected in batches:
        even, odd = (half.next_batch()["place"] for half in halves)
        np.testing.assert_array_equal(np.stack([even, odd], 1).reshape(-1), expected)
    few = Epochs(lambda epoch: (3, read), 8, range(8), 0).next_batch()["place"]
    assert {*few.tolist()} == {0, 1, 2}


def test_held_out_batches_end_with_rows_that_do_not_count():
    read = lambda places: context_windows(CORPUS, places, 2)
    batches = [*padded_batches(read, 60, 16, range(16))]
    assert [batch["mask"].sum() for batch in batches] == [16, 16, 16, 12]
    assert not batches[-1]["context_mask"][12:].any()


def test_analogies():
    text = "# words\n: plural\nList lists\nstring strings\n\n: other\nking queen man woman\na b\n"
    assert read_analogies(text, "x") == [
        ("list", "lists", "string", "strings"), ("string", "strings", "list", "lists"),
        ("king", "queen", "man", "woman"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"--analogies=f: line 2 has 3 words"):
        read_analogies("a b c d\na b c\n", "--analogies=f")
    with pytest.raises(ConfigError, match="has no questions"):
        read_analogies(": plural\na b\n", "x")
