import errno
import sys

import numpy as np
import pytest

from genai_jax import train_tokenizer
from genai_jax.config import ConfigError
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.sources import open_source
from genai_jax.data.text.tokenization import BOUNDARIES, load_tokenizer
from genai_jax.train_tokenizer import train_bpe

TEXT = "def f(x):\n    return 'naïve – 日本語 🙂'\t<|endoftext|>\n\n  twice  spaced\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def corpus(folder):
    path = folder / "corpus.txt"
    path.write_text("\n\n".join(f"line {i} of some text, return x + {i}" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def bpe(folder, corpus):
    source = open_source(DataConfig(dataset=f"text:{corpus}"), "train")
    path = str(folder / "bpe.json")
    train_bpe(source, 300, path)
    return path


@pytest.fixture(scope="module")
def sentencepiece_model(folder, corpus):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "sp"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return str(folder / "sp.model")


@pytest.fixture(params=["bytes", "bpe", "sentencepiece_model"])
def tokenizer(request):
    spec = "bytes" if request.param == "bytes" else request.getfixturevalue(request.param)
    return load_tokenizer(spec)


def test_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.boundary_id not in ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.boundary_id, *ids, tokenizer.boundary_id]) == TEXT


def test_empty_text_has_no_tokens(tokenizer):
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode([]) == ""


def test_fingerprint_depends_on_the_content(tokenizer, bpe, sentencepiece_model):
    specs = ["bytes", bpe, sentencepiece_model]
    assert len({load_tokenizer(spec).fingerprint() for spec in specs}) == 3
    assert tokenizer.fingerprint() == load_tokenizer(tokenizer.spec).fingerprint()
    assert len(tokenizer.fingerprint()) == 64


def test_bytes_keep_invalid_utf8_and_drop_nul():
    tokenizer = load_tokenizer("bytes")
    raw = b"caf\xe9 \xff\x80"
    ids = tokenizer.encode(raw.decode("utf-8", "surrogateescape"))
    assert bytes(ids.astype(np.uint8)) == raw
    assert tokenizer.decode(ids) == "caf\ufffd \ufffd\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "ab"


def test_bpe_compresses(bpe):
    assert len(load_tokenizer(bpe).encode("some text, return x")) < 12


@pytest.mark.parametrize("spec", ["words", "tok.txt", ""])
def test_unknown_kind(spec):
    with pytest.raises(ConfigError, match=r"is not a tokenizer: use bytes, numbers:N, a tok"):
        load_tokenizer(spec)


@pytest.mark.parametrize("spec", ["missing.json", "missing.model"])
def test_missing_file(spec):
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(spec)


@pytest.mark.parametrize("name", ["broken.json", "broken.model"])
def test_broken_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read") as error:
        load_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_the_token_that_ends_a_document(tmp_path, bpe, sentencepiece_model):
    from tokenizers import AddedToken, Tokenizer, models

    path = str(tmp_path / "plain.json")
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|go|>", "<|it|>")])
    tokenizer.save(path)
    with pytest.raises(ConfigError, match=r"--data.end_token; its special .*: <\|go\|>, <\|it\|>"):
        load_tokenizer(path)
    with pytest.raises(ConfigError, match=r"--data.end_token=<\|no\|> is not a token of"):
        load_tokenizer(path, "<|no|>")
    assert load_tokenizer(path, "<|it|>").boundary_id == 3
    assert load_tokenizer(sentencepiece_model, "<s>").boundary_id == 1
    with pytest.raises(ConfigError, match=r"special tokens are: <s>, </s>"):
        load_tokenizer(sentencepiece_model, "<end>")
    with pytest.raises(ConfigError, match="has a boundary of its own"):
        load_tokenizer("bytes", "</s>")
    for name in BOUNDARIES:
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        tokenizer.add_special_tokens([name])
        tokenizer.save(path)
        assert load_tokenizer(path).boundary_id == 1


@pytest.mark.parametrize("fixture", ["bpe", "sentencepiece_model"])
def test_missing_library(fixture, request, monkeypatch):
    spec = request.getfixturevalue(fixture)
    for name in ("tokenizers", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install -e .\.\[text\]"):
        load_tokenizer(spec)


def test_a_tokenizer_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    text, output = tmp_path / "text", tmp_path / "t.json"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"document {i} " * 20)
    output.write_text("the old one")

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_tokenizer, "write_text", full)
    flags = [f"--data.dataset=text:{text}", "--vocab_size=300", f"--output={output}"]
    with pytest.raises(ConfigError, match=r"cannot write to --output=.*t\.json: No space left"):
        train_tokenizer.main(flags)
    assert output.read_text() == "the old one"
    with pytest.raises(ConfigError, match=r"--vocab_size=2000000000: .* whole number from"):
        train_tokenizer.main([*flags, "--vocab_size=2000000000"])
