"""Needles in haystacks: the texts, and the score of models that find all of them or none."""

import re

import numpy as np
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.data.text.needles import documents, haystacks
from genai_jax.data.text.tokenization import load_tokenizer
from genai_jax.tasks.language.evaluate_request import LanguageEvaluateRequest
from genai_jax.tasks.language.needle import lengths_of, needle_scores
from tests.commands import TINY

FACT = r"(\w+): (\d{3})\."


def test_documents_ask_for_the_facts_that_they_have():
    texts = documents(200)
    assert len(texts) == 10_000 and texts == documents(200)
    places, in_order = [], 0
    for text in texts[:200]:
        told, end = text.split(" ?")
        facts, asked = (re.findall(FACT, part) for part in (told, end))
        assert len(facts) == 4 and sorted(facts) == sorted(asked)
        assert end == "".join(f" {thing}: {number}." for thing, number in asked)
        in_order += facts == asked
        words_before = [
            len(re.sub(FACT, "", told[: m.start()]).split()) for m in re.finditer(FACT, told)
        ]
        places += [n / len(re.sub(FACT, "", told).split()) for n in words_before]
    assert min(places) == 0 and max(places) == 1 and 0.45 < np.mean(places) < 0.55
    assert in_order < 30  # of 200; one in 24 by chance


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_haystack_has_its_needle_at_the_depth(depth):
    tokenizer = load_tokenizer("bytes", None)
    hay = np.asarray(tokenizer.encode("the cat saw a red fox. " * 3 + "A dog."), np.int32)
    stacks = haystacks(tokenizer, hay, 150, depth, rows=3, seed=0)
    assert stacks.tokens.shape == stacks.targets.shape == (3, 150)
    np.testing.assert_array_equal(stacks.tokens[:, 1:], stacks.targets[:, :-1])
    for row in range(3):
        text = tokenizer.decode(stacks.targets[row])
        first, last = re.finditer(" " + FACT, text)
        assert first.groups() == last.groups() and last.end() == len(text) == 150
        assert text[: last.start()].endswith(" ?")
        hidden = tokenizer.decode(stacks.targets[row][stacks.is_answer[row]])
        assert hidden == f" {first[2]}."
        room = 150 - len(first[0]) - len(last[0]) - 2
        assert first.start() == round(depth * room)
    assert len({tokenizer.decode(row) for row in stacks.targets}) == 3


@pytest.fixture(scope="module")
def task(text_folder):
    return make_task(parse_run([*TINY, f"--data.dataset=text:{text_folder}"]))


def test_who_knows_all_answers_finds_all_and_who_errs_once_finds_none(task):
    everything = lambda batch: np.ones_like(batch["targets"], bool)
    found = needle_scores(everything, task.data, [128, 256], rows=2, limit=None)
    assert set(found.values()) == {1.0} and len(found) == 12
    assert "needle/128/0.25" in found and "needle/256" in found

    def all_but_the_last(batch):
        last = np.arange(batch["targets"].shape[1]) == batch["targets"].shape[1] - 1
        return np.broadcast_to(~last, batch["targets"].shape)

    found = needle_scores(all_but_the_last, task.data, [128], rows=2, limit=None)
    assert set(found.values()) == {0.0}


def test_a_model_is_asked_for_needles(task):
    import jax

    params, mutables = jax.jit(task.init)(jax.random.key(0))
    request = LanguageEvaluateRequest(workdir="w", needle_lengths="90", needles=2)
    found = task.report(params, mutables, None, request)
    assert found["needle/90"] == 0.0 and len(found) == 6
    assert task.report(params, mutables, None, LanguageEvaluateRequest(workdir="w")) == {}


def test_what_does_not_fit_is_refused(task):
    right = lambda batch: np.ones_like(batch["targets"], bool)
    with pytest.raises(ConfigError, match=r"=20 is too short: .* take up to 3\d tokens"):
        needle_scores(right, task.data, [20], rows=1, limit=None)
    with pytest.raises(ConfigError, match="the model reads at most 64 tokens"):
        needle_scores(right, task.data, [128], rows=1, limit=64)
    with pytest.raises(ConfigError, match=r"--data\.dataset=needles:5: the number of characters"):
        documents(5)
    with pytest.raises(ValueError, match="needles=3 has no effect"):
        LanguageEvaluateRequest(workdir="w", needles=3)
    for text in ("a", "12,", "-3", "1.5", "0", "1000000"):
        with pytest.raises(ValueError, match="is not a list of numbers of tokens from 1 to 999999"):
            lengths_of(text)
    numbers = make_task(
        parse_run([*TINY, "--data.dataset=repeats:9", "--data.tokenizer=numbers:9"])
    )
    with pytest.raises(ConfigError, match="needles are text"):
        needle_scores(right, numbers.data, [128], rows=1, limit=None)
