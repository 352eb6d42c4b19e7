import json

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.data.text.packing import Packer


def make_documents(count, seed=0):
    """Documents of 0 to 20 tokens between boundaries 0, all the same token, which identifies it."""
    rng = np.random.default_rng(seed)
    return [np.pad(np.full(rng.integers(0, 20), i % 99 + 1), 1) for i in range(count)]


def make_packer(documents, rows=range(3), batch_size=3, length=7):
    return Packer(lambda i: documents[i] if i < len(documents) else None, rows, batch_size, length)


def all_batches(packer):
    return list(iter(packer.next_batch, None))


def counted(batch, name, row):
    return batch[name][row][batch["loss_mask"][row] > 0]


def test_shapes_and_types():
    batch = make_packer(make_documents(9)).next_batch()
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((3, 7), np.int32),
        "targets": ((3, 7), np.int32),
        "segment_ids": ((3, 7), np.int32),
        "positions": ((3, 7), np.int32),
        "loss_mask": ((3, 7), np.float32),
    }


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_every_token_is_input_once_and_target_once(length):
    documents = make_documents(31)
    batches = all_batches(make_packer(documents, length=length))
    for row in range(3):
        for name, part in [("tokens", slice(None, -1)), ("targets", slice(1, None))]:
            seen = np.concatenate([counted(batch, name, row) for batch in batches])
            expected = np.concatenate([document[part] for document in documents[row::3]])
            np.testing.assert_array_equal(seen, expected)


def test_a_segment_holds_one_document_and_positions_restart():
    for batch in all_batches(make_packer(make_documents(40))):
        for row in range(3):
            ids = batch["segment_ids"][row]
            assert set(ids) - {0} == set(range(1, ids.max() + 1))
            for segment in range(1, ids.max() + 1):
                inside = np.flatnonzero(ids == segment)
                np.testing.assert_array_equal(inside, np.arange(inside[0], inside[-1] + 1))
                np.testing.assert_array_equal(
                    batch["positions"][row][inside], np.arange(len(inside))
                )
                tokens = batch["tokens"][row][inside]
                assert len(set(tokens[tokens > 0])) <= 1
                assert not np.any(tokens[1:] == 0)  # the boundary only ever starts an input


def test_padding_is_zero_and_masked_out():
    documents = [np.array([0, 5, 6, 0]), np.array([0, 0])]
    (batch,) = all_batches(make_packer(documents, length=5))
    np.testing.assert_array_equal(batch["tokens"], [[0, 5, 6, 0, 0], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(batch["targets"], [[5, 6, 0, 0, 0], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(batch["segment_ids"][:2], [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(batch["loss_mask"], batch["segment_ids"] > 0)


def test_two_halves_of_the_rows_make_the_whole():
    documents = make_documents(50)
    whole = make_packer(documents, range(4), 4)
    halves = [make_packer(documents, range(2), 4), make_packer(documents, range(2, 4), 4)]
    for _ in range(5):
        parts = [half.next_batch() for half in halves]
        for name, array in whole.next_batch().items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


def test_resumes_after_every_batch():
    documents = make_documents(30)
    expected = all_batches(make_packer(documents))
    packer = make_packer(documents)
    for step in range(len(expected)):
        resumed = make_packer(documents)
        resumed.set_state(json.loads(json.dumps(packer.get_state())))
        rest = all_batches(resumed)
        assert len(rest) == len(expected) - step
        for a, b in zip(rest, expected[step:], strict=True):
            np.testing.assert_equal(a, b)
        packer.next_batch()


def test_a_state_of_other_rows_or_a_different_batch_size_is_an_error():
    documents = make_documents(8)
    state = make_packer(documents, range(4), 4).get_state()
    with pytest.raises(ConfigError, match="rows 0 to 3, but this process fills rows 0 to 1 of 2"):
        make_packer(documents, range(2), 2).set_state(state)
    with pytest.raises(ConfigError, match="rows 0 to 3, but this process fills rows 0 to 7 of 8"):
        make_packer(documents, range(8), 8).set_state(state)
