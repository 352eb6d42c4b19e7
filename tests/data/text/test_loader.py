import json
import threading

import numpy as np
import pytest

from genai_jax import train_tokenizer
from genai_jax.config import Config, ConfigError, parse
from genai_jax.data.text.loader import DataConfig, TextLoader
from genai_jax.data.text.packing import padding
from genai_jax.training.batches import merged_states


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = " ".join(str(rng.integers(1000)) for _ in range(rng.integers(1, 30)))
        (folder / f"{i:02}.txt").write_text(f"<{i}> {words}")
    return folder


@pytest.fixture
def config(corpus):
    return DataConfig(
        dataset=f"text:{corpus}", batch_size=4, sequence_length=16, validation_percent=25
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def changed(config, **changes):
    return Config({"data": config}).replace("data", **changes).data


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_flags():
    config, _ = parse(["--data.dataset=x", "--data.prefetch=0"], {"data": DataConfig})
    assert config.data == DataConfig(dataset="x", prefetch=0)
    for flag in ("batch_size=0", "validation_percent=100", "prefetch=-1", "sequence_length=0"):
        with pytest.raises(ConfigError):
            parse([f"--data.{flag}"], {"data": DataConfig})


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resumes_after_every_batch(config, prefetch):
    config = changed(config, prefetch=prefetch)
    iterator = TextLoader(config, 1).batches()
    states, batches = [], []
    for _ in range(8):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for step, state in enumerate(states):
        resumed = TextLoader(config, 1).batches()
        resumed.set_state(state)
        assert resumed.get_state() == state
        for expected in batches[step:]:
            assert_equal(next(resumed), expected)
        resumed.close()
    iterator.set_state(states[2])  # and backwards, on the iterator that ran ahead
    assert_equal(next(iterator), batches[2])
    iterator.close()


def test_order_depends_only_on_the_seed(config):
    a, b, c = (take(TextLoader(config, seed).batches(), 3) for seed in (1, 1, 2))
    for x, y in zip(a, b, strict=True):
        assert_equal(x, y)
    assert any((x["tokens"] != y["tokens"]).any() for x, y in zip(a, c, strict=True))


def test_each_epoch_has_every_document_in_a_different_order(config):
    config = changed(config, batch_size=1, sequence_length=64)
    loader = TextLoader(config, 0)
    iterator = loader.batches()
    documents, text = [], ""
    while len(documents) <= 60:
        row = next(iterator)
        text += "".join(chr(c) for c in row["targets"][0])
        documents = text.split("\0")
    epochs = documents[:30], documents[30:60]
    assert len(set(epochs[0])) == 30
    assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]
    iterator.close()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_processes_share_the_global_batch(config, split):
    whole = TextLoader(config, 3).batches(split)
    rows = (0, 3), (0, 1, 2)  # several processes may make the same row
    shares = [TextLoader(config, 3).batches(split, some) for some in rows]
    for _ in range(10):
        batch = next(whole)
        for some, share in zip(rows, shares, strict=True):
            assert_equal(next(share), {k: v[list(some)] for k, v in batch.items()})


def test_fewer_documents_than_rows(tmp_path):
    (tmp_path / "a.txt").write_text("tiny")
    config = DataConfig(dataset=f"text:{tmp_path}", batch_size=8, sequence_length=12)
    batch = next(TextLoader(config, 0).batches())
    assert batch["loss_mask"].all()
    assert batch["tokens"].tolist() == [[0, *b"tiny", 0, *b"tiny", 0, ord("t")]] * 8


def test_state_of_a_different_batch_size_is_an_error(config):
    state = TextLoader(config, 0).batches().get_state()
    with pytest.raises(ConfigError, match="same batch size"):
        TextLoader(changed(config, batch_size=2), 0).batches().set_state(state)


def test_merged_states_of_processes_equal_the_global_state(config):
    whole = TextLoader(config, 3).batches()
    shares = [TextLoader(config, 3).batches("train", rows) for rows in ((0, 2), (1,), (2, 3))]
    for iterator in (whole, *shares):
        take(iterator, 3)
    state = merged_states([share.get_state() for share in shares])
    assert state == whole.get_state()
    other = TextLoader(config, 3).batches("train", (1, 2, 3))  # other rows continue from it
    other.set_state(json.loads(json.dumps(state)))
    assert_equal(next(other), {k: v[1:] for k, v in next(whole).items()})


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluation_covers_every_token_once(config, batch_size):
    loader = TextLoader(changed(config, batch_size=batch_size), 0)
    batches = list(loader.evaluation_batches())
    source = loader._open("validation").source
    for row in range(batch_size):
        seen = np.concatenate([b["targets"][row][b["loss_mask"][row] > 0] for b in batches])
        documents = [source[i] for i in range(row, len(source), batch_size)]
        assert bytes(seen.astype(np.uint8)).decode() == "".join(d + "\0" for d in documents)
    for a, b in zip(batches, loader.evaluation_batches(), strict=True):
        assert_equal(a, b)


def test_evaluation_stops_at_max_batches(config):
    loader = TextLoader(config, 0)
    batches = list(loader.evaluation_batches())
    assert len(batches) > 3
    for limit in (0, 2, len(batches), 1000):
        limited = list(loader.evaluation_batches(limit))
        assert len(limited) == min(limit, len(batches))
        for a, b in zip(limited, batches, strict=False):
            assert_equal(a, b)


@pytest.mark.parametrize("limit", [-1, 2, 1000])
@pytest.mark.parametrize("batch_size", [4, 32])
def test_evaluation_has_equally_many_batches_on_every_process(config, batch_size, limit):
    config = changed(config, batch_size=batch_size)
    whole = list(TextLoader(config, 0).evaluation_batches(limit))
    share = batch_size // 4
    shares = [
        list(TextLoader(config, 0).evaluation_batches(limit, range(i * share, (i + 1) * share)))
        for i in range(4)
    ]
    assert [len(share) for share in shares] == [len(whole)] * 4
    for batch, *parts in zip(whole, *shares, strict=True):
        assert_equal(batch, {k: np.concatenate([part[k] for part in parts]) for k in batch})
    if batch_size == 32 and limit == -1:  # ten documents: most rows have none
        assert_equal(shares[3][0], padding(8, 16))


def test_close_stops_the_thread(config):
    before = threading.active_count()
    iterator = TextLoader(config, 0).batches()
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    iterator.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
    unclosed = TextLoader(config, 0).batches()
    next(unclosed)
    del unclosed
    assert threading.active_count() == before


def test_errors_in_the_thread_propagate(config, monkeypatch):
    loader = TextLoader(config, 0)
    monkeypatch.setattr(loader.tokenizer, "encode", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.batches())


def test_fingerprint(config, tmp_path):
    first = TextLoader(config, 0).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert (first["train_documents"], first["validation_documents"]) == (30, 10)
    assert first == TextLoader(config, 5).fingerprint()
    (tmp_path / "a.txt").write_text("tiny")
    other = TextLoader(changed(config, dataset=f"text:{tmp_path}"), 0).fingerprint()
    assert other["validation"] is None and other["sha256"] != first["sha256"]


def test_train_tokenizer_command(corpus, tmp_path, capsys, config):
    output = str(tmp_path / "new" / "tok.json")
    flags = [f"--data.dataset=text:{corpus}", "--vocab_size=280", f"--output={output}"]
    assert train_tokenizer.main(flags) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "280 tokens" in out and "bytes per token" in out
    loader = TextLoader(changed(config, tokenizer=output), 0)
    batch = next(loader.batches())
    assert loader.tokenizer.vocab_size == 280 and batch["tokens"].max() < 280
    assert (batch["tokens"][:, 0] == loader.tokenizer.boundary_id).all()


def test_train_tokenizer_help_and_errors(corpus, capsys):
    assert train_tokenizer.main(["--help"]) == 0
    assert "--vocab_size" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"does not end in \.json"):
        train_tokenizer.main([f"--data.dataset=text:{corpus}", "--output=tok"])
    with pytest.raises(ConfigError):
        train_tokenizer.main(["--vocab_size=256"])
    with pytest.raises(ConfigError, match="is not UTF-8"):
        train_tokenizer.main([f"--data.dataset=text:{corpus}", "--output=\udcff.json"])
    for flag in ("tokenizer", "batch_size", "answer_after"):  # would have no effect
        with pytest.raises(ConfigError, match=f"--data.{flag} is not a flag of this command"):
            train_tokenizer.main([f"--data.{flag}=1"])
