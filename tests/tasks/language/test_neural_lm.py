"""The neural language model of a fixed window, against a loop in numpy and against decoding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genai_jax
from genai_jax import evaluate, sample, train
from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.sequence.fixed_window import FixedWindow

CONTEXT, WIDTH = 3, 4


def by_loop(params, tokens, positions):
    """y = b + W x + U tanh(d + H x), a position at a time, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = np.zeros((*tokens.shape, len(p["output_bias"])))
    for i, t in np.ndindex(*tokens.shape):
        x = np.zeros((CONTEXT, WIDTH))
        for back in range(min(CONTEXT, positions[i, t] + 1)):
            x[back] = p["embed"]["embedding"][tokens[i, t - back]]
        x = x.reshape(-1)
        hidden = np.tanh(p["hidden"]["bias"] + x @ p["hidden"]["kernel"])
        rows[i, t] = p["output_bias"] + hidden @ p["output"]["kernel"]
        if "direct" in p:
            rows[i, t] += x @ p["direct"]["kernel"]
    return rows - np.log(np.sum(np.exp(rows), -1, keepdims=True))


@pytest.fixture(scope="module")
def run(text_folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("neural_lm")
    flags = (
        "--task=neural_lm", f"--neural_lm.context={CONTEXT}", f"--neural_lm.embed_dim={WIDTH}",
        "--neural_lm.hidden_dim=16", "--neural_lm.direct", "--data.batch_size=4",
        "--data.sequence_length=32", f"--data.dataset=text:{text_folder}", "--train.steps=80",
        "--optimizer.learning_rate=0.03", "--optimizer.warmup_steps=0", "--train.progress=false",
        f"--workdir={workdir}",
    )  # fmt: skip
    assert train.main(flags) == 0
    return genai_jax.load(workdir)


def test_scores_equal_a_loop_and_documents_are_apart(run):
    """Packed rows and their padding, of which the loop sees only a document at a time."""
    source = run.task.data.train()
    batches = [*run.held_out(), *(next(source) for _ in range(8))]
    source.close()
    batch = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert (batch["segment_ids"] == 0).any() and batch["segment_ids"].max() > 1
    scores, _ = jax.jit(run.task.target_scores)(run.params, batch)
    expected = by_loop(run.params["model"], batch["tokens"], batch["positions"])
    chosen = np.take_along_axis(expected, batch["targets"][..., None], -1)[..., 0]
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(scores)[real], chosen[real], atol=1e-4)


def test_decoding_equals_the_full_pass(run):
    """Token by token, and all at once with padding, which does not enter the state."""
    batch = next(run.held_out(1))
    tokens = batch["tokens"][:2, :9]
    positions = np.broadcast_to(np.arange(9), tokens.shape)
    expected = by_loop(run.params["model"], tokens, positions)
    step = jax.jit(run.task.decoder().step(run.params))
    state, one = run.task.decoder().empty_state(2, 0), jnp.ones(2, jnp.int32)
    for t in range(9):
        at = slice(t, t + 1)
        logits, state = step(tokens[:, at], positions[:, at], one, state)
        np.testing.assert_allclose(jax.nn.log_softmax(logits), expected[:, t], atol=1e-5)
    empty = run.task.decoder().empty_state(2, 0)
    padded = np.pad(tokens, ((0, 0), (0, 4)), constant_values=7)
    places = np.broadcast_to(np.arange(13), padded.shape)
    logits, padded_state = step(padded, places, 9 * one, empty)
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected[:, 8], atol=1e-5)
    np.testing.assert_array_equal(padded_state, state)


def test_a_window_is_all_that_it_sees():
    model = FixedWindow(11, 2, 3, 5, direct=True)
    contexts = jnp.array([[[1, 2], [1, 11], [11, 11]]])
    logits, _ = jax.jit(lambda key: model.init_with_output(key, contexts))(jax.random.key(0))
    assert logits.shape == (1, 3, 11)
    # What is not there is zeros: without any token, only the biases are left, which begin as 0.
    np.testing.assert_array_equal(logits[0, 2], 0)


def test_the_commands(run, capsys):
    assert evaluate.main([f"--workdir={run.workdir}"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["loss_unit"] == "nats per token" and scores["bits_per_byte"] < 3
    ask = [f"--workdir={run.workdir}", "--prompt=the ca", "--max_tokens=20", "--num_samples=2"]
    assert sample.main(ask) == 0
    assert capsys.readouterr().out.count("\nthe ca") == 2


def test_what_cannot_be():
    with pytest.raises(ConfigError, match=r"--neural_lm.context=0"):
        parse_run(["--task=neural_lm", "--neural_lm.context=0"])
