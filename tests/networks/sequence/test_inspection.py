"""What is handed out is what the network uses: attention weights, and the residual stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.networks.sequence.inspection import (
    attended,
    attention_weights,
    logit_lens,
    mixer_inputs,
    residual_stream,
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
        weights = weights_of(config, own, entered, params.get("relative_bias", {}).get("table"))
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert not np.triu(weights, 1).any() and (weights[:, 3, 1] > 0).all()
        np.testing.assert_allclose(attended(config, own, entered, weights), output, atol=2e-5)
        stacked.append(weights)
    if variant == "window":
        weights = jax.jit(lambda p: attention_weights(model, p, TOKENS))(params)
        np.testing.assert_allclose(weights, stacked, atol=1e-6)
        assert not np.tril(np.stack(stacked), -4).any()


@pytest.mark.parametrize("variant", CASES)
def test_the_lens_ends_with_what_the_network_predicts(variant):
    model, variables = make(**CASES[variant])
    params, layers = variables["params"], model.config.num_layers
    stream = jax.jit(lambda p: residual_stream(model, p, TOKENS))(params)
    assert stream.shape == (layers + 1, len(TOKENS), model.config.embed_dim)
    hidden = model.apply(variables, TOKENS[None])[0][0]
    normalized = model.apply(variables, stream[-1], method=lambda m, x: m.final_norm(x))
    np.testing.assert_allclose(normalized, hidden, atol=1e-5)
    moved = np.abs(np.diff(stream, axis=0)).max((1, 2))
    assert (moved > 1e-4).all()  # every layer in its own entry
    lens = jax.jit(lambda p: logit_lens(model, p, TOKENS))(params)
    assert lens.shape == (layers + 1, len(TOKENS), model.vocab_size)
    logits = model.apply(variables, TOKENS[None], method="init_all")[0]
    np.testing.assert_allclose(lens[-1], logits, atol=1e-4)


def test_layers_of_the_stream_are_in_order():
    """The stream after layer n is that of a network of n layers."""
    model, variables = make(**CASES["pattern"])
    stream = residual_stream(model, variables["params"], TOKENS)
    half = Transformer(dataclasses.replace(model.config, num_layers=2), model.vocab_size)
    params = variables["params"]
    layers = jax.tree.map(lambda x: x[:1], params["layers"])
    shorter = residual_stream(half, {**params, "layers": layers}, TOKENS)
    np.testing.assert_allclose(shorter, stream[:3], atol=1e-5)


def test_a_mixer_without_weights_is_refused():
    model, variables = make()
    config = dataclasses.replace(model.config)
    object.__setattr__(config, "pattern", "attention,my.module:Other")
    with pytest.raises(ConfigError, match=r"of the mixer attention, not of my\.module:Other"):
        attention_weights(Transformer(config, VOCABULARY), variables["params"], TOKENS)
