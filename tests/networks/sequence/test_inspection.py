"""The attention weights that are handed out are those that the network uses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.networks.sequence.inspection import (
    attended,
    attention_weights,
    mixer_inputs,
    weights_of,
)
from genai_jax.networks.sequence.transformer import Transformer
from tests.networks.sequence.test_transformer import VARIANTS, VOCABULARY, make

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, 7), jnp.int32)
CASES = {name: x for name, x in VARIANTS.items() if x} | {
    "pattern": dict(
        pattern="attention,attention", num_layers=4, remat="full", base_head_dim=2,
        parametrization="maximal_update", base_width=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", CASES)
def test_the_output_of_every_attention_follows_from_its_weights(variant):
    model, variables = make(**CASES[variant])
    params, config = variables["params"], model.config
    layers = jax.jit(lambda p: mixer_inputs(model, p, TOKENS))(params)
    assert len(layers) == config.num_layers
    stacked = []
    for own, entered, output in layers:
        weights = weights_of(config, own, entered)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert not np.triu(weights, 1).any() and (weights[:, 3, 1] > 0).all()
        np.testing.assert_allclose(attended(config, own, entered, weights), output, atol=2e-5)
        stacked.append(weights)
    if variant == "window":
        weights = jax.jit(lambda p: attention_weights(model, p, TOKENS))(params)
        np.testing.assert_allclose(weights, stacked, atol=1e-6)
        assert not np.tril(np.stack(stacked), -4).any()


def test_a_mixer_without_weights_is_refused():
    model, variables = make()
    config = dataclasses.replace(model.config)
    object.__setattr__(config, "pattern", "attention,my.module:Other")
    with pytest.raises(ConfigError, match=r"the mixer my\.module:Other has no attention weights"):
        attention_weights(Transformer(config, VOCABULARY), variables["params"], TOKENS)
