"""Schedules against their formulas; optimizers on what they may touch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.training.optimizer import (
    ENDLESS,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    _muon_dimensions,
    learning_rate_schedule,
    make_optimizer,
)
from genai_jax.training.schedule_notes import changed_schedules, cut_schedules

RULES = (
    ("^embed$", ("vocabulary", "embed")),
    ("^kernel$", ("layers", "embed", "mlp")),
    ("^out$", ("layers", "heads", "head_dim", "embed")),
    ("^scale$", ("layers", "embed")),
    ("^experts$", ("layers", "experts", "mlp", "embed")),
)
PARAMS = {
    name: 0.1 * jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate(
        dict(
            embed=(5, 4), kernel=(2, 4, 6), out=(2, 2, 3, 4), scale=(2, 4), experts=(2, 3, 6, 4)
        ).items()
    )
}


def test_schedules_follow_their_formulas():
    def at(steps, **changes):
        config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, **changes)
        schedule = learning_rate_schedule(config, 110)
        return [float(schedule(step)) for step in steps]

    for name in ("constant", "cosine", "linear", "rsqrt", "wsd"):
        np.testing.assert_allclose(at([0, 4, 9], schedule=name), [0.2, 1.0, 2.0], rtol=1e-5)
    assert at([10, 109], schedule="constant") == [2.0, 2.0]
    np.testing.assert_allclose(at([59, 109], schedule="cosine"), [1.1, 0.2], rtol=1e-5)
    np.testing.assert_allclose(at([59, 109], schedule="linear"), [1.1, 0.2], rtol=1e-5)
    np.testing.assert_allclose(at([10, 40], schedule="rsqrt"), [2.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(
        at([87, 98, 109], schedule="wsd", decay_fraction=0.2), [2.0, 1.1, 0.2], rtol=1e-5
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0, 1, 2, 9, 10, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_reaches_its_peak_and_its_last_value(name, warmup, steps):
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=warmup, schedule=name, decay_fraction=0.5
    )
    rates = np.array([learning_rate_schedule(config, steps)(step) for step in range(steps)])
    top = max(min(warmup, steps) - 1, 0)
    assert rates[top] == pytest.approx(2.0) and np.argmax(rates) == top
    if name not in ENDLESS and top < steps - 1:
        assert rates[-1] == pytest.approx(0.2)
    assert np.all(rates > 0) and np.all(np.diff(rates[top:]) <= 1e-6)


def test_a_schedule_that_the_length_of_a_run_cuts_or_changes_is_reported():
    flags = ("--optimizer.warmup_steps=3", "--vae.kl_warmup=20", "--task=vae")
    config = parse_run([*flags, "--train.steps=10"])
    line = "--vae.kl_warmup=20 goes beyond the end of the run at --train.steps=10"
    assert cut_schedules(config) == [line]
    assert cut_schedules(parse_run([*flags, "--train.steps=20"])) == []

    longer = parse_run([*flags, "--train.steps=19"])
    changed = lambda config, step, before: changed_schedules(
        make_task(config), config, step, before
    )
    assert changed(longer, 10, 10) == [
        "--optimizer.schedule=cosine now ends at step 19 instead of 10: the learning rate of the "
        "next step is 0.00055, not 0.0001"
    ]
    assert changed(longer, 10, 19) == changed(longer, 10, None) == []
    constant = parse_run([*flags, "--train.steps=19", "--optimizer.schedule=constant"])
    assert changed(constant, 10, 10) == []
    curriculum = ("--task=few_step", "--train.steps=200")
    growing = parse_run([*curriculum, "--optimizer.schedule=constant"])
    assert changed(growing, 100, 100) == [
        "--train.steps=200 instead of 100 changes the curriculum: the next step has 40 time "
        "intervals, not 160"
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name):
    rate = {"sgd": 0.5, "muon": 0.1}.get(name, 0.02)
    config = OptimizerConfig(name=name, learning_rate=rate, warmup_steps=0, weight_decay=0.0)
    optimizer = make_optimizer(config, 50, RULES)
    target = jax.tree.map(lambda x: x + 0.3, PARAMS)
    loss = lambda p: sum(
        jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True)
    )

    @jax.jit
    def run(params):
        def body(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 50, body, (params, optimizer.init(params)))[0]

    assert float(loss(run(PARAMS))) < 0.3 * float(loss(PARAMS))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_alone(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5, schedule="constant"
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    optimizer = make_optimizer(config, 10, RULES)
    update = jax.jit(optimizer.update)
    _, state = update(zeros, optimizer.init(PARAMS), PARAMS)
    updates, _ = update(zeros, state, PARAMS)  # the second: momentum must not gather decay
    for key in ("embed", "kernel", "out", "experts"):
        np.testing.assert_allclose(updates[key], -0.1 * 0.5 * PARAMS[key], rtol=1e-4)
    np.testing.assert_array_equal(updates["scale"], 0)


def test_muon_makes_every_layer_and_expert_of_a_stack_orthogonal_on_its_own():
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=0
    )
    grads = jax.tree.map(lambda x: 3 * x, PARAMS)
    optimizer = make_optimizer(config, 10, RULES)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    for layer in range(2):
        matrices = [updates["kernel"][layer], updates["out"][layer].reshape(6, 4)]
        for matrix in (*matrices, *updates["experts"][layer]):
            scale = 0.2 * max(matrix.shape) ** 0.5
            singular = np.linalg.svd(matrix, compute_uv=False) / scale
            # Five Newton-Schulz steps bring singular values near 1, not to it.
            assert np.all((singular > 0.6) & (singular < 1.3)), singular


def test_clipping_bounds_the_update():
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, warmup_steps=0, weight_decay=0, clip_norm=0.5, momentum=0
    )
    optimizer = make_optimizer(config, 10, RULES)
    updates, _ = optimizer.update(
        jax.tree.map(lambda x: 100 * x, PARAMS), optimizer.init(PARAMS), PARAMS
    )
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("axes", "sides"),
    [
        (("layers", "embed", "heads", "head_dim"), ((1,), (2, 3))),
        (("layers", "mlp", "embed"), ((1,), (2,))),
        (("layers", "embed", "inner"), ((1,), (2,))),
        (("layers", "inner", "heads", "head_dim"), ((1,), (2, 3))),
        (("vocabulary", "embed"), None),
        (("layers", None, "mlp"), None),
        (("layers", "embed"), None),
    ],
)
def test_muon_sees_matrices_of_the_stream_and_inside_of_mixers(axes, sides):
    found = _muon_dimensions(axes)
    assert (None if found is None else tuple(found)) == sides
