"""Dilated convolutions: how far back a stack of them sees."""

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers import load_mixer
from genai_jax.networks.sequence.mixers.protocol import TokenContext
from genai_jax.networks.sequence.transformer import Transformer


def test_each_layer_doubles_how_far_back_an_output_depends():
    """1 + 2 + 4 tokens before it, each of them, and no token after it."""
    config = TransformerConfig(
        num_layers=3, embed_dim=8, num_heads=1, mlp_dim=0, pattern="dilated1,dilated2,dilated4"
    )
    model, x = Transformer(config, 5), jax.random.normal(jax.random.key(0), (1, 12, 8))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 12), jnp.int32))
    read = lambda x: model.apply(params, x, method="from_embeddings")[0][0, 9].sum()
    seen = np.abs(jax.grad(read)(x)[0]).max(-1) > 0
    assert seen.tolist() == [2 <= t <= 9 for t in range(12)]


def test_a_layer_is_the_formula():
    config = TransformerConfig(num_layers=1, embed_dim=4, num_heads=1, use_bias=True)
    mixer = load_mixer("dilated2")(config=config)
    x = jax.random.normal(jax.random.key(0), (1, 5, 4))
    context = TokenContext(jnp.arange(5)[None])
    params = mixer.init(jax.random.key(1), x, context)["params"]
    y, _ = mixer.apply({"params": params}, x, context)
    now, earlier = params["now"], params["earlier"]
    for t in range(5):
        before = x[0, t - 2] if t >= 2 else np.zeros(4)
        u = np.einsum("e,egw->gw", x[0, t], now["kernel"]) + now["bias"]
        u = u + np.einsum("e,egw->gw", before, earlier["kernel"])
        gated = np.tanh(u[0]) / (1 + np.exp(-u[1]))
        want = gated @ params["out"]["kernel"] + params["out"]["bias"]
        np.testing.assert_allclose(y[0, t], want, atol=1e-5)
