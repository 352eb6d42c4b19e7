"""Bits per byte divides by the bytes of the documents, for every kind of tokenizer."""

import json

import numpy as np
import pytest

from genai_jax import evaluate
from genai_jax.components import parse_run
from genai_jax.data.text.sources import encode_document, open_source
from genai_jax.tasks.language.data import TextData
from tests.commands import TINY
from tests.tasks.runs import run_to

LINES = (
    "The Café serves ＦＵＬＬ width ﬁsh", "  twice  spaced\tand tabbed  ", "日本語 🙂 naïve – x²\r",
    "return x + 1  # CamelCase", "ÅNGSTRÖM ½ İstanbul ", "tail   \n\n", "<|endoftext|> </s> [SEP]",
)  # fmt: skip
DOCUMENTS = ["\n".join(LINES[i:] + LINES[:i]) * (1 + i % 3) for i in range(len(LINES))]
DOCUMENTS += ["\u00a0\u3000 \t", "e\u0301" * 40, "\ufeffmark", "a" * 300]


def json_tokenizer(kind: str, path: str):
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )  # fmt: skip

    special = dict(special_tokens=["[SEP]", "[UNK]"], show_progress=False)
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=90, **special)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), replace])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, unk_token="[UNK]", **special)
    elif kind == "fallback":  # as converted from SentencePiece
        units = [f"<0x{i:02X}>" for i in range(256)]
        vocabulary = {u: i for i, u in enumerate(["[SEP]", "[UNK]", *units, *"▁abcdefghi"])}
        tokenizer = Tokenizer(
            models.BPE(vocabulary, [], unk_token="[UNK]", byte_fallback=True, fuse_unk=True)
        )
        prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
        trainer = None
    elif kind == "words":  # drops spaces, and what it does not know is one token
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Strip(), normalizers.StripAccents(), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=20, **special)
    else:  # byte_level, and with a normalizer or a leading space
        tokenizer = Tokenizer(models.BPE())
        if kind == "byte_level_nfc":
            tokenizer.normalizer = normalizers.NFC()
        spaced = kind == "byte_level_space"
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, **special)
    if trainer:
        tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.save(path)
    return path


def sentencepiece_model(kind: str, prefix: str):
    import sentencepiece

    sentences = iter([line for text in DOCUMENTS for line in text.splitlines() if line.strip()])
    fallback = kind == "sentencepiece_bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=prefix, minloglevel=2, hard_vocab_limit=False,
        model_type="bpe" if fallback else "unigram", vocab_size=330 if fallback else 60,
        byte_fallback=fallback, character_coverage=0.98,
    )  # fmt: skip
    return f"{prefix}.model"


BY_ID = ("bytes", "byte_level")
KINDS = (
    *BY_ID, "byte_level_nfc", "byte_level_space", "wordpiece", "unigram", "fallback", "words",
    "sentencepiece_bpe", "sentencepiece_unigram",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(params=KINDS)
def flags(request, folder, tmp_path):
    spec = kind = request.param
    if kind.startswith("sentencepiece"):
        spec = sentencepiece_model(kind, str(tmp_path / kind))
    elif kind != "bytes":
        spec = json_tokenizer(kind, str(tmp_path / f"{kind}.json"))
    return (
        f"--data.dataset=text:{folder}", f"--data.tokenizer={spec}", "--data.batch_size=3",
        "--data.sequence_length=32", "--data.validation_percent=60",
    ), kind  # fmt: skip


def test_the_counted_bytes_are_those_of_the_held_out_documents(flags):
    flags, kind = flags
    data = TextData(parse_run(flags))
    source = open_source(data.config, "validation")
    size = sum(len(encode_document(source[i])) for i in range(len(source)))
    assert (data.tokenizer.token_bytes() is not None) == (kind in BY_ID)
    assert ("target_bytes" in data.batch_spec) == (kind not in BY_ID)
    batches = list(data.held_out(-1))
    counted = [np.asarray(data.target_bytes(batch) * batch["loss_mask"]) for batch in batches]
    assert sum(map(np.sum, counted)) == size and min(map(np.min, counted)) >= 0
    assert all(set(batch) == set(data.batch_spec) for batch in batches)
    for text in DOCUMENTS if kind not in BY_ID else ():
        ids, sizes = data.tokenizer.encode_with_sizes(text)
        np.testing.assert_array_equal(ids, data.tokenizer.encode(text))
        assert sizes.sum() == len(text.encode()) * bool(len(ids))


def test_evaluate_reports_them(folder, tmp_path, capsys):
    spec = json_tokenizer("wordpiece", str(tmp_path / "t.json"))
    flags = (f"--data.dataset=text:{folder}", f"--data.tokenizer={spec}", *TINY)
    run_to(tmp_path / "run", 1, *flags, "--train.accumulate=2", "--eval.batches=0")
    capsys.readouterr()
    assert evaluate.main([f"--workdir={tmp_path / 'run'}"]) == 0
    scores = json.loads(capsys.readouterr().out)
    source = open_source(parse_run(flags).data, "validation")
    assert scores["bytes"] == sum(len(encode_document(source[i])) for i in range(len(source)))
    bits = scores["loss"] * scores["tokens"] / np.log(2)
    assert scores["bits_per_byte"] == pytest.approx(bits / scores["bytes"])
