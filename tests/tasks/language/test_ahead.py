"""Heads for tokens further ahead: what they are trained on, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.sequence.ahead import shifted_targets
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.tasks.protocol import StepInfo
from genai_jax.training.sharding import logical_axes
from tests.commands import TINY


def test_targets_further_ahead_stay_in_their_document():
    targets = jnp.array([[1, 2, 3, 4, 5, 0]])
    ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    mask = jnp.array([[1.0, 1, 1, 1, 1, 0]])
    later, counts = shifted_targets(targets, mask, ids, 1)
    assert later[0, :5].tolist() == [2, 3, 4, 5, 0]
    assert counts.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert shifted_targets(targets, mask, ids, 2)[1].tolist() == [[1, 0, 0, 0, 0, 0]]


def test_the_loss_of_a_head_is_that_of_the_token_after_the_next():
    config = parse_run([*TINY, "--data.batch_size=2", "--language_model.ahead=2"])
    task, plain = LanguageModel(config), LanguageModel(config.replace("language_model", ahead=0))
    params, _ = jax.jit(task.init)(jax.random.key(0))
    logical_axes(params, task.partition_rules)
    batch = jax.tree.map(jnp.asarray, next(iter(task.data.held_out(1))))
    info = StepInfo(jax.random.key(1), jnp.int32(0))

    def loss(params, task):
        output = task._loss(params, {}, batch, info)
        return output.loss, output.metrics

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (total, metrics), gradient = run(params, task)
    (alone, _), _ = run({"model": params["model"]}, plain)
    mean = (metrics["ahead_2/nll"] + metrics["ahead_3/nll"]) / 2
    np.testing.assert_allclose(total, alone + 0.3 * mean, rtol=1e-6)
    assert all(np.any(g) for g in jax.tree.leaves(gradient))

    hidden, _ = task._hidden(params, batch)
    further = task._heads.apply({"params": params["ahead"]["head_0"]}, hidden)
    logits = task.model.apply({"params": params["model"]}, further, method="logits")
    log_probs, total, count = np.asarray(jax.nn.log_softmax(logits)), 0.0, 0
    ids, tokens = np.asarray(batch["segment_ids"]), np.asarray(batch["targets"])
    for row in range(2):
        for t in range(tokens.shape[1] - 1):
            if ids[row, t] and ids[row, t] == ids[row, t + 1]:
                total -= log_probs[row, t, tokens[row, t + 1]]
                count += 1
    np.testing.assert_allclose(metrics["ahead_2/nll"], total / count, rtol=1e-5)
    before, after = (t.flops_per_step()["flops_per_step"] for t in (plain, task))
    sizes = [a.size for p, a in jax.tree_util.tree_leaves_with_path(params["ahead"])
             if "kernel" in jax.tree_util.keystr(p)]  # fmt: skip
    heads = 2 * params["model"]["head"]["kernel"].size
    assert after - before == 6 * task.tokens_per_step() * (sum(sizes) + heads)


def test_a_weight_without_heads_is_refused():
    with pytest.raises(
        ConfigError, match=r"ahead_weight=0\.1 has no effect without --language_mod"
    ):
        parse_run([*TINY, "--language_model.ahead_weight=0.1"])
