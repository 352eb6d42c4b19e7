"""n-gram and hidden Markov models through the commands that all families have."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genai_jax
from genai_jax import evaluate, sample, train
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.training.evaluation import Evaluator

SMALL = (
    "--data.batch_size=4", "--data.sequence_length=32", "--train.progress=false",
)  # fmt: skip
KINDS = {
    "ngram": ("--task=ngram", "--ngram.order=3", "--ngram.max_entries=3000"),
    "hmm": ("--task=hmm", "--hmm.states=4", "--hmm.iterations=3"),
}


@pytest.fixture(scope="module")
def runs(text_folder, tmp_path_factory):
    """Kind -> a run of it."""
    opened = {}
    for kind, flags in KINDS.items():
        workdir = tmp_path_factory.mktemp(kind)
        common = (*SMALL, f"--data.dataset=text:{text_folder}", f"--workdir={workdir}")
        assert train.main([*common, *flags, "--train.steps=60"]) == 0
        opened[kind] = genai_jax.load(workdir)
    return opened


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_decoding_token_by_token(kind, runs):
    run = runs[kind]
    task, batch = run.task, next(run.held_out(1))
    batch = {name: x[batch["segment_ids"][:, 0] > 0] for name, x in batch.items()}
    params = run.params
    expected, correct = jax.jit(task.target_scores)(params, batch)
    step = jax.jit(task.decoder().step(params))
    state = task.decoder().empty_state(len(batch["tokens"]), 0)
    for t in range(batch["tokens"].shape[1]):
        at = slice(t, t + 1)
        if (batch["positions"][:, at] == 0).any() and t:
            break  # another document, which begins a state of its own
        lengths = jnp.ones(len(batch["tokens"]), jnp.int32)
        logits, state = step(batch["tokens"][:, at], batch["positions"][:, at], lengths, state)
        log_probs, read = np.asarray(jax.nn.log_softmax(logits)), t + 1
        chosen = np.take_along_axis(log_probs, batch["targets"][:, at], 1)[:, 0]
        np.testing.assert_allclose(chosen, expected[:, t], atol=1e-5)
        np.testing.assert_array_equal(log_probs.argmax(1) == batch["targets"][:, t], correct[:, t])
    assert read > 10
    # Several tokens at once, padded, give what the same tokens give one after another.
    empty = task.decoder().empty_state(len(batch["tokens"]), 0)
    wide = step(batch["tokens"], batch["positions"], lengths * read, empty)
    np.testing.assert_allclose(jax.nn.log_softmax(wide[0]), log_probs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands(kind, runs, capsys):
    workdir = runs[kind].workdir
    assert evaluate.main([f"--workdir={workdir}"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["loss_unit"] == "nats per token" and 1 < scores["bits_per_byte"] < 4.5
    logged = runs[kind].metrics()[-1]
    assert logged["eval/bits_per_byte"] == pytest.approx(scores["bits_per_byte"], rel=1e-5)
    ask = [f"--workdir={workdir}", "--prompt=the ca", "--max_tokens=20", "--num_samples=2"]
    assert sample.main([*ask, "--temperature=0.5", "--top_k=5"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\nthe ca") == 2
    assert sample.main([*ask, "--temperature=0.5", "--top_k=5"]) == 0
    assert capsys.readouterr().out == shown


def test_batching_does_not_change_what_is_scored(runs):
    run = runs["ngram"]
    flags = run.config.to_flags(leave_out=["data.batch_size"]).splitlines()
    other = make_task(parse_run([*flags, "--data.batch_size=3"]))
    scores = Evaluator(other)(run.params, {}, other.data.held_out(-1))
    assert scores["loss"] == pytest.approx(run.evaluate()["loss"], rel=1e-5)


def test_longer_n_grams_predict_better(text_folder):
    bits = {}
    for order in (3, 5):
        shape = (f"--ngram.order={order}", "--ngram.max_entries=100000", "--data.batch_size=8")
        task = make_task(parse_run([*SMALL, "--task=ngram", *shape]))
        source = task.data.train()
        params = task.fit([next(source) for _ in range(500)])
        source.close()
        params = jax.tree.map(jnp.asarray, params)
        bits[order] = Evaluator(task)(params, {}, task.data.held_out(6))["bits_per_byte"]
    assert bits[5] < bits[3] - 0.1


def test_what_cannot_be(text_folder):
    data = f"--data.dataset=text:{text_folder}"
    with pytest.raises(ConfigError, match=r"--ngram.order=0"):
        parse_run(["--task=ngram", "--ngram.order=0"])
    with pytest.raises(ConfigError, match=r"--hmm.states=0"):
        parse_run(["--task=hmm", "--hmm.states=0"])
    with pytest.raises(ConfigError, match=r"not one of|should be one of"):
        parse_run(["--task=ngram", "--ngram.smoothing=laplace"])
    task = make_task(parse_run([*SMALL, data, "--task=ngram", "--ngram.max_entries=40"]))
    said = r"--ngram.max_entries=40: there are \d+ distinct n-grams of order 2; allow as many"
    with pytest.raises(ConfigError, match=said):
        task.fit(task.data.held_out(2))
    with pytest.raises(ConfigError, match=r"the batches have no targets to count"):
        task.fit([])
