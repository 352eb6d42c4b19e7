"""Problems and their answers; which targets of them count; how many tokens there are to learn."""

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


def everything(name, **changes):
    config = DataConfig(dataset=name, **changes)
    return documents(config) + documents(config, "validation")


def test_modular_problems_are_all_there_and_right():
    for name, operation in (("modular_division:7", "/"), ("modular_addition:6", "+")):
        found = [text.split() for text in everything(name)]
        p = int(name[-1])
        assert all(len(words) == 5 and words[1::2] == [operation, "="] for words in found)
        questions = {(int(a), int(b)): int(c) for a, _, b, _, c in found}
        assert len(questions) == len(found) == (p * (p - 1) if operation == "/" else p * p)
        for (a, b), c in questions.items():
            assert (b * c % p == a and b) if operation == "/" else c == (a + b) % p


def test_sums_have_the_digits_of_their_answer_lowest_first():
    found = everything("addition:3")
    assert 19_500 < len(found) == len(set(found)) and everything("addition:3") == found
    for text in found[::997]:
        a, b, answer = text.replace("=", "+").split("+")
        assert (len(a), len(b), len(answer)) == (3, 3, 4)
        assert int(a) + int(b) == int(answer[::-1])
    assert len(everything("addition:1")) == 100 and len(everything("addition:9")) > 19_900


def test_digits_written_out_are_those_of_the_image_data():
    config = ImageDataConfig(dataset="digits")
    images = open_images(config, "validation")
    percent = config.validation_percent
    found = documents(DataConfig("digit_pixels", validation_percent=percent), "validation")
    assert len(found) == len(images)
    for text, k in zip(found, range(len(images)), strict=True):
        mark, *pixels = text.split()
        assert mark == "=" and np.array_equal(np.int32(pixels), images[k]["image"].ravel())


def test_a_share_of_the_problems_may_be_held_out():
    for percent in (5, 50, 90):
        config = dataclasses.replace(DIVISION, validation_percent=percent)
        train, validation = documents(config), documents(config, "validation")
        assert len(validation) == 42 * percent // 100 and not set(train) & set(validation)


def test_numbers_are_words():
    tokenizer = load_tokenizer("numbers:97")
    assert tokenizer.vocab_size == 1 + 5 + 97
    ids = tokenizer.encode("12 / 34 = 96")
    assert len(ids) == 5 and ids.min() > 0 and ids.max() == tokenizer.vocab_size - 1
    assert tokenizer.decode([0, *ids, 0]) == "12 / 34 = 96"
    np.testing.assert_array_equal(tokenizer.token_bytes()[ids], [3, 2, 3, 2, 3])
    with pytest.raises(ConfigError, match=r"has no word '97': it knows the numbers up to 96 and"):
        tokenizer.encode("97 + 1")
    for spec in ("numbers:", "numbers:0", "numbers:-3", "numbers:x"):
        with pytest.raises(ConfigError, match="write numbers:N"):
            load_tokenizer(spec)


def test_names_that_say_no_problem():
    for name, message in (
        ("addition", "write addition:N with a number for N"),
        ("modular_division:x", "write modular_division:N"),
        ("modular_division:91", "modulus has to be a prime number"),
        ("modular_addition:1", "a modulus of at least 2, not 1"),
        ("addition:10", "numbers have 1 to 9 digits"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(DataConfig(dataset=name), "train")


def test_only_answers_count_and_no_problem_is_cut():
    loader = TextLoader(DIVISION, 0)
    batches = list(loader.evaluation_batches())
    mask = np.concatenate([b["loss_mask"] for b in batches])
    tokens = np.concatenate([b["tokens"] for b in batches])
    equals = loader.tokenizer.encode("=")[0]
    # The one target behind "=" counts: an answer is one token here.
    np.testing.assert_array_equal(mask, tokens == equals)
    assert mask.sum() == len(documents(DIVISION, "validation")) == 21
    # Two problems of six tokens fit into a row of 14; the rest is padding.
    segments = np.concatenate([b["segment_ids"] for b in batches])
    assert segments.max() == 2 and np.all(segments[:, 12:] == 0)
    # As many batches for a process that makes some of the rows.
    some = list(loader.evaluation_batches(rows=[1]))
    assert len(some) == len(batches)
    np.testing.assert_array_equal(some[0]["loss_mask"][0], batches[0]["loss_mask"][1])


def test_problems_that_cannot_be_asked():
    short = dataclasses.replace(DIVISION, sequence_length=5)
    with pytest.raises(ConfigError, match=r"6 tokens and does not fit into .*sequence_length=5"):
        next(iter(TextLoader(short, 0).evaluation_batches()))
    loose = dataclasses.replace(DIVISION, answer_after="= 3")
    with pytest.raises(ConfigError, match=r"answer_after== 3 is 2 tokens of .*numbers:7 and has"):
        next(iter(TextLoader(loose, 0).evaluation_batches()))


def seen(text_folder, unique_tokens, steps, seed=0):
    """The training documents that come in so many steps, one row of one document's length each."""
    config = DataConfig(
        dataset=f"text:{text_folder}", unique_tokens=unique_tokens, batch_size=1,
        sequence_length=64, passage_length=60, prefetch=0,
    )  # fmt: skip
    batches = TextLoader(config, seed).batches()
    tokens = np.concatenate([next(batches)["tokens"][0] for _ in range(steps)])
    return bytes(int(t) for t in tokens).split(b"\0")[1:-1]  # without the one cut at the end


def test_fewer_unique_tokens_are_a_part_of_more_and_come_again(text_folder):
    few, more = (seen(text_folder, limit, 60) for limit in (500, 1000))
    assert 500 <= sum(len(x) + 1 for x in set(few)) < 500 + 100
    assert 1000 <= sum(len(x) + 1 for x in set(more)) < 1000 + 100
    assert set(few) < set(more)
    counts = [few.count(x) for x in set(few)]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 5
    assert set(seen(text_folder, 500, 60, seed=1)) != set(few)
    with pytest.raises(ConfigError, match=r"unique_tokens=999999: the training data has \d+ tok"):
        seen(text_folder, 999999, 1)
