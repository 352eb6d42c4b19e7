"""Mistakes in a task are one line each, before the first step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genai_jax.config import ConfigError
from genai_jax.tasks.protocol import ArraySpec, LossOutput, Mean, Phase, Rows
from genai_jax.training import validate

PHASE = Phase("fit", ("model",), lambda *_: None, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        (PHASE, "phases\\(\\) returned a Phase"),
        ([PHASE], "returned a list"),
        ((PHASE._replace(trains="model"),), r"trains 'model'; it has to be a tuple .*\('model',\)"),
        ((PHASE, PHASE), "phase fit is there 2 times"),
        ((PHASE._replace(every=0),), "phase fit has every=0"),
        ((PHASE._replace(optimizer_of="fat"),), "optimizer of 'fat', which is not one of"),
    ],
)
def test_phases(phases, said):
    with pytest.raises(ConfigError, match=said):
        validate.check_phases(phases)
    assert validate.check_phases((PHASE,)) == (PHASE,)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (jnp.float32(0), "loss of phase fit returned a "),
        (LossOutput(jnp.zeros(3), {}, ()), r"loss has shape \(3,\); it has to be a scalar"),
        (LossOutput(jnp.float32(0), {"x": jnp.zeros(2)}, ()), r"x has shape \(2,\)"),
        (LossOutput(jnp.float32(0), {}, {"new": 0}), "returned mutables .*new"),
    ],
)
def test_losses(output, said):
    with pytest.raises(ConfigError, match=said):
        validate.check_loss(PHASE, output, ())
    validate.check_loss(PHASE, LossOutput(jnp.float32(0), {}, ()), ())


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": jnp.zeros(4)}, "loss is a .*; it has to be a Mean or Rows"),
        ({"loss": Mean(jnp.float32(0), jnp.ones(4))}, r"loss.total has shape \(\).* 4 rows"),
        ({"x": Rows(jnp.zeros((3, 2)), jnp.ones(4))}, r"x.values has shape \(3, 2\)"),
        (None, "example_metrics returned None"),
    ],
)
def test_metrics(metrics, said):
    with pytest.raises(ConfigError, match=said):
        validate.check_example_metrics(metrics, 4)
    validate.check_example_metrics({"loss": Mean(jnp.zeros(4), jnp.ones(4))}, 4)


def test_batches_and_specs():
    spec = {"x": ArraySpec((8, 2), jnp.float32, ("batch", None))}
    validate.check_batch({"x": np.zeros((4, 2))}, spec, 4)
    with pytest.raises(ConfigError, match=r"entries y; batch_spec has x"):
        validate.check_batch({"y": np.zeros((4, 2))}, spec, 4)
    with pytest.raises(ConfigError, match=r"x has shape \(4, 3\); batch_spec asks for \(4, 2\)"):
        validate.check_batch({"x": np.zeros((4, 3))}, spec, 4)
    with pytest.raises(ConfigError, match=r"'mlpp' is not a logical axis .* did you mean 'mlp'"):
        validate.check_rules(((".*kernel", ("mlpp", None)),))
    validate.check_rules(((".*kernel", ("mlp", "head_dim", ...)),))


def test_a_loss_is_checked_where_it_is_traced():
    from genai_jax.training.step import TrainState, make_step

    phase = PHASE._replace(loss=lambda params, mutables, batch, info: jnp.float32(0))
    params = {"model": jnp.zeros(2)}
    state = TrainState(
        jnp.int32(0), params, (), {"fit": phase.optimizer.init(params)}, {}, jax.random.key(0)
    )
    with pytest.raises(ConfigError, match=r"the loss of phase fit returned a .*LossOutput"):
        jax.eval_shape(make_step((phase,)), state, {"x": jnp.zeros(4)})
