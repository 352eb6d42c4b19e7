"""Fill in the middle: what is rearranged can be restored, and nothing is lost or said twice."""

import numpy as np
import pytest

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.data.text.fill_in_middle import FillInMiddle, Sentinels, arranged, restored
from genai_jax.data.text.loader import DataConfig, TextLoader
from genai_jax.data.text.packing import Packer
from genai_jax.data.text.tokenization import load_tokenizer
from tests.commands import TINY

TOKENIZER = load_tokenizer("bytes")
SENTINELS = Sentinels.after(TOKENIZER.vocab_size)
BOUNDARY = TOKENIZER.boundary_id


@pytest.mark.parametrize("ends", [True, False])
def test_a_rearranged_document_is_restored(ends):
    ids = np.array([BOUNDARY, *range(1, 40), *[BOUNDARY] * ends])
    whole = np.array([BOUNDARY, *range(1, 40), BOUNDARY])
    seen = set()
    for suffix_first in (0.0, 1.0):
        fill = FillInMiddle(1.0, suffix_first, SENTINELS, BOUNDARY, seed=1)
        for place in range(50):
            new = fill(ids, (place,))
            assert len(new) == len(whole) + 3 and new[0] == new[-1] == BOUNDARY
            np.testing.assert_array_equal(restored(new, SENTINELS, BOUNDARY), whole)
            np.testing.assert_array_equal(np.sort(new)[: len(whole)], np.sort(whole))
            marks = [int(np.flatnonzero(new == mark)[0]) for mark in SENTINELS]
            assert marks == sorted(marks)
            assert (marks[1] == marks[0] + 1) or not suffix_first
            seen.add(tuple(new))
    assert len(seen) > 60
    none = FillInMiddle(0.0, 0.5, SENTINELS, BOUNDARY, seed=1)
    assert none(ids, (0,)) is ids
    half = FillInMiddle(0.5, 0.5, SENTINELS, BOUNDARY, seed=1)
    assert 30 < sum(len(half(ids, (i,))) > len(ids) for i in range(100)) < 70


def test_sentinels_stand_for_no_bytes():
    ids = np.stack([[BOUNDARY, 1, 2, 3, BOUNDARY], [0, 4, 2, 1, 1]], 1)
    new = FillInMiddle(1.0, 0.0, SENTINELS, BOUNDARY, seed=0)(ids, (0,))
    assert new[:, 1].sum() == 8 and new.shape == (8, 2)
    cut = FillInMiddle(1.0, 0.0, SENTINELS, BOUNDARY, seed=0)(ids[:-1], (0,))
    assert cut[:, 1].sum() == 7 and cut[-1].tolist() == [BOUNDARY, 0]


@pytest.mark.parametrize("level", ["document", "context"])
def test_rows_hold_every_token_once(level, text_folder):
    def pieces(rate, batches):
        config = DataConfig(
            f"text:{text_folder}", 2, 32, fim_rate=rate, prefetch=0, passage_length=0,
            fim_level=level if rate else "document",
        )  # fmt: skip
        loader, found = TextLoader(config, seed=0), []
        iterator = loader.batches()
        for _ in range(batches):
            batch = next(iterator)
            ids, targets = batch["segment_ids"][0], batch["targets"][0]
            for segment in range(1, ids.max() + 1):
                inside = ids == segment
                piece = np.concatenate([batch["tokens"][0][inside][:1], targets[inside]])
                np.testing.assert_array_equal(batch["tokens"][0][inside], piece[:-1])
                assert list(batch["positions"][0][inside]) == list(range(inside.sum()))
                found.append(piece)
        iterator.close()
        return found

    plain = np.concatenate([p[1:] for p in pieces(0.0, 40)])
    filled = pieces(1.0, 40)
    if level == "context":  # each piece is whole
        marks = [np.isin(p, SENTINELS).sum() for p in filled]
        assert set(marks) <= {0, 3} and np.mean(marks) > 2
        assert all(p[-1] == BOUNDARY for p, n in zip(filled, marks, strict=True) if n)
        at = 0
        for piece in filled:
            piece = restored(piece, SENTINELS, BOUNDARY)[1:]
            if piece[-1] == BOUNDARY != plain[at + len(piece) - 1]:
                piece = piece[:-1]  # the end of a middle whose text was cut
            np.testing.assert_array_equal(piece, plain[at : at + len(piece)])
            at += len(piece)
    else:  # documents go on in the next row
        text = np.concatenate([p[1:] for p in filled])
        documents = np.split(text, np.flatnonzero(text == BOUNDARY) + 1)[:-1]
        whole = [restored(np.concatenate([[BOUNDARY], d]), SENTINELS, BOUNDARY) for d in documents]
        text = np.concatenate([d[1:] for d in whole])
        np.testing.assert_array_equal(text, plain[: len(text)])


@pytest.mark.parametrize(("size", "rows"), [(28, [28, 28]), (29, [28, 1])])
def test_a_document_that_just_fits_is_not_cut(size, rows):
    """28 tokens, their end, and three sentinels fill a row of 32."""
    fill = FillInMiddle(1.0, 0.5, SENTINELS, BOUNDARY, seed=0)
    document = np.array([BOUNDARY, *range(1, size + 1), BOUNDARY])
    packer = Packer(lambda _: document, [0], 1, 32, rearrange=fill, added=fill.added)
    for expected in rows:
        batch = packer.next_batch()
        targets = batch["targets"][batch["segment_ids"] == 1]
        assert targets[-1] == BOUNDARY and np.sum(targets == BOUNDARY) == 1
        assert np.sum((targets != BOUNDARY) & ~np.isin(targets, SENTINELS)) == expected


def test_a_boundary_within_a_text_does_no_harm():
    fill = FillInMiddle(1.0, 0.5, SENTINELS, BOUNDARY, seed=0)
    for size in range(20, 45):
        for inside in range(1, size):
            document = np.array([BOUNDARY, *range(1, size + 1), BOUNDARY])
            document[inside] = document[size] = BOUNDARY
            packer = Packer(lambda _, d=document: d, [0], 1, 32, rearrange=fill, added=fill.added)
            for _ in range(3):
                assert packer.next_batch()["segment_ids"].all()


def test_what_comes_before_a_middle():
    before = np.concatenate(arranged(np.array([1, 2]), np.array([3]), SENTINELS, False))
    assert before.tolist() == [SENTINELS.prefix, 1, 2, SENTINELS.suffix, 3, SENTINELS.middle]
    before = np.concatenate(arranged(np.array([1, 2]), np.array([3]), SENTINELS, True))
    assert before.tolist() == [*SENTINELS[:2], 3, SENTINELS.middle, 1, 2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["fim_level=context"], "--data.fim_level=context has no effect without --data.fim_rate"),
        (["fim_rate=0.5", "answer_after=x"], "rearranges text"),
        (["fim_rate=0.5", "fim_level=context", "sequence_length=4"], "no room for the 4 tokens"),
        (["fim_rate=1.5"], "--data.fim_rate=1.5"),
    ],
)
def test_flags_that_contradict_each_other_are_named(flags, said):
    with pytest.raises(ConfigError) as error:
        parse_run([*TINY, *(f"--data.{flag}" for flag in flags)])
    assert said in str(error.value) and "\n" not in str(error.value)
