"""Experts that choose their tokens: against a loop, and what does not depend on what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.losses.router import router_losses
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.expert_choice import choose
from genai_jax.networks.experts.mixture import MixtureOfExperts
from genai_jax.networks.experts.router import chosen_sums
from tests.commands import TINY

EMBED, HIDDEN, LENGTH = 8, 12, 10
X = jax.random.normal(jax.random.key(0), (2, LENGTH, EMBED))
REAL = jnp.arange(LENGTH) < jnp.array([[LENGTH], [6]])
CONFIG = MoeConfig(num_experts=4, experts_per_token=2, routing="expert_choice", shared_experts=1)
LAYER = MixtureOfExperts(CONFIG, HIDDEN)


@functools.cache
def params():
    found = jax.jit(LAYER.init)(jax.random.key(2), X)["params"]
    return found | {"router": jax.tree.map(lambda k: 3 * k, found["router"])}


@jax.jit
def run(x, real):
    out, written = LAYER.apply({"params": params()}, x, real, mutable=["router"])
    return out, written["router"]["sums"]


def silu(x):
    return x / (1 + np.exp(-x))


def by_loops(x, real):
    """Token by token and expert by expert, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params())
    mlp = lambda x, up, gate, down: (x @ up * silu(x @ gate)) @ down
    shared = (p["shared"][name]["kernel"] for name in ("up", "gate", "down"))
    out = mlp(x, *shared)
    for row in range(len(x)):
        tokens = x[row][real[row]]
        logits = tokens @ p["router"]["kernel"]
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        taken = int(np.ceil(len(tokens) * 2 / 4))
        for e in range(4):
            kernels = [p["experts"][name][e] for name in ("up", "gate", "down")]
            for t in np.argsort(-scores[:, e])[:taken]:
                out[row, np.flatnonzero(real[row])[t]] += scores[t, e] * mlp(tokens[t], *kernels)
    return out


def test_it_is_the_loop_over_experts_and_tokens():
    want = by_loops(np.asarray(X, np.float64), np.asarray(REAL))
    out, sums = run(X, REAL)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_array_equal(sums.load, 5 + 3)  # every expert takes half of both rows
    logits = np.asarray(X, np.float64) @ np.asarray(params()["router"]["kernel"], np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    reached = set()
    for row, count in enumerate((10, 6)):
        best = np.argsort(-scores[row, :count], 0)[: count // 2]
        reached |= {(row, int(t)) for t in best.ravel()}
    assert sums.tokens == 16
    loss, metrics = router_losses(jax.tree.map(lambda a: a[None], sums), CONFIG)
    assert metrics["moe/largest_load"] == 1
    assert metrics["moe/dropped"] == pytest.approx(1 - len(reached) / 16)
    assert loss == pytest.approx(CONFIG.router_z_loss * float(metrics["moe/router_z"]))


def test_padding_and_other_rows_change_nothing():
    out, _ = run(X, REAL)
    other, _ = run(X.at[1, 6:].set(9.0).at[0].set(-1.0), REAL)
    np.testing.assert_array_equal(other[1, :6], out[1, :6])
    short, _ = run(X[:, :6], REAL[:, :6])
    np.testing.assert_allclose(short[1], out[1, :6], atol=1e-6)


def test_scores_have_gradients():
    def loss(kernel):
        changed = params() | {"router": {"kernel": kernel}}
        return jnp.sum(jnp.sin(LAYER.apply({"params": changed}, X, REAL)))

    gradient = jax.jit(jax.grad(loss))(params()["router"]["kernel"])
    assert np.isfinite(gradient).all() and np.all(np.any(gradient != 0, 0))


def test_an_expert_takes_what_a_row_has():
    config = MoeConfig(num_experts=2, experts_per_token=1, routing="expert_choice")
    logits = jnp.zeros((1, 6, 2)).at[0, :, 0].set(jnp.arange(6.0))
    chosen = choose(logits, jnp.array([[True] * 3 + [False] * 3]), config)
    assert chosen.place.shape == (1, 2, 3)
    assert set(chosen.place[0, 0, :2].tolist()) == {1, 2}
    assert np.count_nonzero(chosen.weight) == 4  # ceil(3 / 2) for each


def test_tokens_that_no_expert_chose_are_reported():
    config = MoeConfig(num_experts=2, experts_per_token=1, routing="expert_choice", score="sigmoid")
    logits = jnp.arange(4.0)[None, :, None] * jnp.ones(2)  # both prefer the last two
    real = jnp.ones((1, 4), bool)
    sums = chosen_sums(logits, choose(logits, real, config), real)
    _, metrics = router_losses(jax.tree.map(lambda a: a[None], sums), config)
    assert metrics["moe/dropped"] == 0.5


MOE = ("--moe.num_experts=4", "--moe.routing=expert_choice")


def test_bidirectional_models_train_with_experts(text_folder):
    flags = [*TINY, f"--data.dataset=text:{text_folder}", *MOE, "--task=masked_language_model"]
    task = make_task(parse_run(flags))
    params, mutables = jax.jit(task.init)(jax.random.key(0))
    batch = next(iter(task.data.train()))
    (phase,) = task.phases(params)

    @jax.jit
    def loss(params, batch):
        from genai_jax.tasks.protocol import StepInfo

        return phase.loss(params, mutables, batch, StepInfo(jax.random.key(1), 0))

    found = loss(params, batch)
    assert np.isfinite(found.loss) and found.metrics["moe/largest_load"] == 1
    assert found.loss > found.metrics["nll"]  # the norm of the router's logits
    assert task.flops_per_step()["inactive_parameters"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*MOE], "--moe.routing=expert_choice: an expert would choose among later tokens"),
        ([*MOE, "--moe.capacity_factor=2"], "--moe.capacity_factor=2.0 is for"),
        ([*MOE, "--moe.balance_rate=0.1"], "--moe.balance_rate=0.1 is for"),
        (["--moe.routing=expert_choice"], "needs experts"),
        (
            [*MOE, "--task=discrete_diffusion", "--discrete_diffusion.block_size=4"],
            "among tokens of later blocks",
        ),
    ],
)
def test_what_does_not_fit_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        make_task(parse_run([*TINY, *flags]))
