"""Synthetic problems and their answers, targets that count, and the number of unique tokens."""

import dataclasses

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.data.images.sources import open_images
from genai_jax.data.text.loader import DataConfig, TextLoader
from genai_jax.data.text.sources import open_source
from genai_jax.data.text.tokenization import load_tokenizer

DIVISION = DataConfig(
    dataset="modular_division:7", tokenizer="numbers:7", answer_after="=", batch_size=3,
    sequence_length=14, validation_percent=50, prefetch=0,
)  # fmt: skip


def documents(config, split="train"):
    source = open_source(config, split)
    return [source[i] for i in range(len(source))]


def all_documents(name, **changes):
    config = DataConfig(dataset=name, **changes)
    return documents(config) + documents(config, "validation")


def test_modular_problems_are_complete_and_correct():
    for name, operation in (("modular_division:7", "/"), ("modular_addition:6", "+")):
        problems = [text.split() for text in all_documents(name)]
        p = int(name[-1])
        assert all(len(words) == 5 and words[1::2] == [operation, "="] for words in problems)
        questions = {(int(a), int(b)): int(c) for a, _, b, _, c in problems}
        assert len(questions) == len(problems) == (p * (p - 1) if operation == "/" else p * p)
        for (a, b), c in questions.items():
            assert (b * c % p == a and b) if operation == "/" else c == (a + b) % p


def test_answers_of_sums_are_written_least_significant_digit_first():
    sums = all_documents("addition:3")
    assert 19_500 < len(sums) == len(set(sums)) and all_documents("addition:3") == sums
    for text in sums[::997]:
        a, b, answer = text.replace("=", "+").split("+")
        assert (len(a), len(b), len(answer)) == (3, 3, 4)
        assert int(a) + int(b) == int(answer[::-1])
    assert len(all_documents("addition:1")) == 100 and len(all_documents("addition:9")) > 19_900


def test_repeats_have_random_periods_and_no_symbol_twice_in_one():
    texts = documents(DataConfig(dataset="repeats:16", tokenizer="numbers:16"))
    periods = set()
    for text in texts[:200]:
        once, repeated = (part.split() for part in text.split(" = "))
        assert repeated == 3 * once and len(set(once)) == len(once)
        assert {int(symbol) for symbol in once} <= set(range(16))
        periods.add(len(once))
    assert periods == set(range(4, 13))


def test_digit_pixels_match_the_image_data():
    config = ImageDataConfig(dataset="digits")
    images = open_images(config, "validation")
    percent = config.validation_percent
    texts = documents(DataConfig("digit_pixels", validation_percent=percent), "validation")
    assert len(texts) == len(images)
    for text, k in zip(texts, range(len(images)), strict=True):
        mark, *pixels = text.split()
        assert mark == "=" and np.array_equal(np.int32(pixels), images[k]["image"].ravel())


def test_validation_percent_holds_out_problems():
    for percent in (5, 50, 90):
        config = dataclasses.replace(DIVISION, validation_percent=percent)
        train, validation = documents(config), documents(config, "validation")
        assert len(validation) == 42 * percent // 100 and not set(train) & set(validation)


def test_number_tokenizer_has_one_token_per_number():
    tokenizer = load_tokenizer("numbers:97")
    assert tokenizer.vocab_size == 1 + 5 + 97
    ids = tokenizer.encode("12 / 34 = 96")
    assert len(ids) == 5 and ids.min() > 0 and ids.max() == tokenizer.vocab_size - 1
    assert tokenizer.decode([0, *ids, 0]) == "12 / 34 = 96"
    np.testing.assert_array_equal(tokenizer.token_bytes()[ids], [3, 2, 3, 2, 3])
    with pytest.raises(ConfigError, match=r"does not know the word '97', only numbers up to 96"):
        tokenizer.encode("97 + 1")
    for spec in ("numbers:", "numbers:0", "numbers:-3", "numbers:x"):
        with pytest.raises(ConfigError, match="write numbers:N"):
            load_tokenizer(spec)


def test_invalid_problem_names_are_errors():
    for name, message in (
        ("addition", "write addition:N with a whole number N"),
        ("modular_division:x", "write modular_division:N"),
        ("modular_division:91", "the modulus must be a prime number"),
        ("modular_addition:1", "modular_addition:1: the modulus must be at least 2"),
        ("repeats:7", "the number of symbols must be from 8 to 10,000"),
        ("addition:10", "the number of digits must be from 1 to 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(DataConfig(dataset=name), "train")


def test_only_answers_count_and_problems_are_not_cut():
    loader = TextLoader(DIVISION, 0)
    batches = list(loader.evaluation_batches())
    mask = np.concatenate([b["loss_mask"] for b in batches])
    tokens = np.concatenate([b["tokens"] for b in batches])
    equals = loader.tokenizer.encode("=")[0]
    # Only the target after "=" counts: an answer is one token here.
    np.testing.assert_array_equal(mask, tokens == equals)
    assert mask.sum() == len(documents(DIVISION, "validation")) == 21
    # Two problems of six tokens fit into a row of 14; the rest is padding.
    segments = np.concatenate([b["segment_ids"] for b in batches])
    assert segments.max() == 2 and np.all(segments[:, 12:] == 0)
    # A process that makes only some of the rows gets as many batches.
    some = list(loader.evaluation_batches(rows=[1]))
    assert len(some) == len(batches)
    np.testing.assert_array_equal(some[0]["loss_mask"][0], batches[0]["loss_mask"][1])


def test_invalid_answer_settings_are_errors():
    short = dataclasses.replace(DIVISION, sequence_length=5)
    with pytest.raises(ConfigError, match=r"6 tokens and does not fit into .*sequence_length=5"):
        next(iter(TextLoader(short, 0).evaluation_batches()))
    two_tokens = dataclasses.replace(DIVISION, answer_after="= 3")
    with pytest.raises(ConfigError, match=r"answer_after== 3 must be one token of .*:7, not 2"):
        next(iter(TextLoader(two_tokens, 0).evaluation_batches()))


def documents_seen(text_folder, unique_tokens, steps, seed=0):
    """The documents seen in `steps` training steps, each with one row of about one document."""
    config = DataConfig(
        dataset=f"text:{text_folder}", unique_tokens=unique_tokens, batch_size=1,
        sequence_length=64, passage_length=60, prefetch=0,
    )  # fmt: skip
    batches = TextLoader(config, seed).batches()
    tokens = np.concatenate([next(batches)["tokens"][0] for _ in range(steps)])
    return bytes(int(t) for t in tokens).split(b"\0")[1:-1]  # without the last one, which is cut


def test_fewer_unique_tokens_are_a_subset_of_more_and_repeat(text_folder):
    few, more = (documents_seen(text_folder, limit, 60) for limit in (500, 1000))
    assert 500 <= sum(len(x) + 1 for x in set(few)) < 500 + 100
    assert 1000 <= sum(len(x) + 1 for x in set(more)) < 1000 + 100
    assert set(few) < set(more)
    counts = [few.count(x) for x in set(few)]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 5
    assert set(documents_seen(text_folder, 500, 60, seed=1)) != set(few)
    with pytest.raises(ConfigError, match=r"unique_tokens=999999: .* has only \d+ tokens"):
        documents_seen(text_folder, 999999, 1)
