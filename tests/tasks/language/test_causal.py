"""The task as a whole: scores with a closed form, and text that comes back out."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.tasks.language.causal import LanguageModel, LanguageRequest
from genai_jax.tasks.language.sampling import TokenSampler
from genai_jax.training.evaluation import Evaluator
from tests.commands import TINY


@pytest.fixture(scope="module")
def task(text_folder):
    return LanguageModel(parse_run([*TINY, f"--data.dataset=text:{text_folder}"]))


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(lambda rng: task.init(rng)[0])(jax.random.key(0))


def test_a_uniform_model_scores_eight_bits_a_target(task, params):
    head = {"kernel": 0 * params["model"]["head"]["kernel"]}
    uniform = {"model": params["model"] | {"head": head}}
    scores = Evaluator(task)(uniform, {}, task.data.held_out(-1))
    assert scores["perplexity"] == pytest.approx(256, rel=1e-5)
    # Every byte is a target, and so is the end of each document.
    documents = task.data.record()["validation_documents"]
    assert scores["tokens"] == scores["bytes"] + documents
    assert scores["bits_per_byte"] == pytest.approx(8 * scores["tokens"] / scores["bytes"])


def test_the_score_does_not_depend_on_how_the_text_is_batched(task, params, text_folder):
    changed = [*TINY, f"--data.dataset=text:{text_folder}", "--data.batch_size=3"]
    other = LanguageModel(parse_run([*changed, "--language_model.loss_chunk=5"]))
    a = Evaluator(task)(params, {}, task.data.held_out(-1))
    b = Evaluator(other)(params, {}, other.data.held_out(-1))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["tokens"] == b["tokens"]


def test_samples_begin_with_their_prompts_and_end_at_the_stop(task, params):
    request = LanguageRequest(prompt="né", num_samples=2, max_tokens=12, seed=4)
    texts = task.sample(params, {}, request).texts
    assert len(texts) == 2 and texts[0] != texts[1] and all(t.startswith("né") for t in texts)
    assert task.sample(params, {}, request).texts == texts
    stop = texts[0][4]
    cut = task.sample(params, {}, dataclasses.replace(request, stop=stop)).texts
    assert cut[0] == "né" + texts[0][2:].split(stop)[0]


@pytest.mark.parametrize("suffix_first", [0, 1])
def test_a_gap_is_filled_between_prompt_and_suffix(suffix_first, text_folder, monkeypatch):
    """In the order of the training data; what the model writes stands in between."""
    data = [f"--data.dataset=text:{text_folder}", "--data.fim_rate=0.5"]
    flags = [*TINY, *data, f"--data.fim_suffix_first={suffix_first}"]
    task = LanguageModel(parse_run(flags))
    pre, suf, mid = task.data.sentinels
    prefix, suffix = [*b"def "], [*b"():"]
    tokenizer, seen, written = task.data.tokenizer, [], []
    boundary = tokenizer.boundary_id
    before = (
        [pre, suf, *suffix, mid, *prefix] if suffix_first else [pre, *prefix, suf, *suffix, mid]
    )
    plain = TokenSampler.__call__

    def call(self, params, prompts, *rest):
        seen.extend(prompts)
        written.append(plain(self, params, prompts, *rest))
        return written[0]

    monkeypatch.setattr(TokenSampler, "__call__", call)
    params = jax.jit(lambda rng: task.init(rng)[0])(jax.random.key(0))
    request = LanguageRequest(prompt="def ", suffix="():", num_samples=2, max_tokens=5)
    texts = task.sample(params, {}, request).texts
    assert [ids.tolist() for ids in seen] == [[boundary, *before]] * 2
    for row, end, text in zip(written[0].tokens, written[0].lengths, texts, strict=True):
        middle = [i for i in row[len(before) + 1 : end] if i != boundary]
        assert text == "def " + tokenizer.decode(np.array(middle)) + "():" and middle
    assert texts[0] != texts[1]


def test_what_cannot_be_embedded_is_named(task, params):
    for inputs in (3, ["a", 3]):
        with pytest.raises(ConfigError, match=re.escape(f"a list of texts, not {inputs}")):
            task.embed(params, {}, inputs)


def test_what_cannot_fill_a_gap_is_named(task, params):
    with pytest.raises(
        ConfigError, match=r"^--suffix=\):: the model was trained without --data.fim"
    ):
        task.sample(params, {}, LanguageRequest(suffix="):"))
    for name in ("prompt_file", "stop"):
        with pytest.raises(ValueError, match=f"^{name}=x has no effect with suffix=y"):
            LanguageRequest(suffix="y", **{name: "x"})


def test_greedy_sampling_refuses_what_only_randomness_uses():
    for name, value in (("seed", 1), ("top_k", 3), ("top_p", 0.5)):
        with pytest.raises(ValueError, match=f"{name}={value} has no effect with temperature=0"):
            LanguageRequest(temperature=0, **{name: value})
    with pytest.raises(ValueError, match="too small to divide by; 0 takes the likeliest"):
        LanguageRequest(temperature=1e-45)
    with pytest.raises(ValueError, match="exclude each other"):
        LanguageRequest(prompt="a", prompt_file="b")


def test_learned_positions_bound_the_length(text_folder):
    flags = [*TINY, "--transformer.positions=learned", "--transformer.max_length=31"]
    with pytest.raises(ConfigError, match=r"sequence_length=32 is longer .*max_length=31"):
        LanguageModel(parse_run([*flags, f"--data.dataset=text:{text_folder}"]))


def test_batches_have_the_shapes_that_the_task_promises(task):
    batches = task.data.train()
    batch = next(batches)
    batches.close()
    for name, shape in task.data.batch_spec.items():
        assert batch[name].shape == shape.shape and batch[name].dtype == shape.dtype
    assert np.all(batch["loss_mask"] == 1)


def test_an_answer_is_right_if_all_of_its_tokens_are():
    flags = (*TINY, "--data.dataset=addition:2", "--data.answer_after==")
    task = LanguageModel(parse_run(flags))
    params = jax.jit(lambda rng: task.init(rng)[0])(jax.random.key(0))
    batch = next(task.data.held_out(1))
    # Sums of three digits, three in a row, of which the end of the row is padding.
    ids, counted = batch["segment_ids"], batch["loss_mask"] > 0
    assert ids.max() == 3 and counted.sum() == 3 * 3 * ids.shape[0]
    hidden, _ = task.model.apply(
        {"params": params["model"]}, batch["tokens"], batch["positions"], ids
    )
    logits = task.model.apply({"params": params["model"]}, hidden, method="logits")
    likeliest = np.argmax(logits, -1).astype(np.int32)
    first = counted & (batch["tokens"] == ord("="))
    right = (ids == 1) | ((ids == 2) & ~first)  # all of one answer, two thirds of the next
    batch["targets"] = np.where(right, likeliest, (likeliest + 1) % 256)
    scores = Evaluator(task)(params, {}, [batch])
    assert scores["answers"] == 3 * ids.shape[0]
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["accuracy"] == pytest.approx(5 / 9)
