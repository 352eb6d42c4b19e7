"""FLOP counts against shapes and against the compiler."""

import jax
import jax.numpy as jnp
import pytest

from genai_jax.networks.transformer import Transformer, TransformerConfig
from genai_jax.scaling.flops import transformer_forward_flops, transformer_training_flops

VOCABULARY, LENGTH = 512, 64


def forward_cost(config) -> float:
    """FLOPs a token by XLA's own count of the forward pass, layers unrolled, plain attention."""
    model = Transformer(config, VOCABULARY, backend="xla")
    tokens = jnp.zeros((2, LENGTH), jnp.int32)
    variables = jax.eval_shape(
        lambda rng: model.init(rng, tokens, method="init_all"), jax.random.key(0)
    )
    function = jax.jit(lambda v, t: model.apply(v, t, method="init_all"))
    return function.lower(variables, tokens).compile().cost_analysis()["flops"] / tokens.size


@pytest.mark.parametrize("changes", [{}, dict(num_kv_heads=1, activation="gelu", head_dim=48)])
def test_the_count_agrees_with_the_compiled_forward_pass(changes):
    config = TransformerConfig(
        num_layers=2, embed_dim=128, num_heads=2, scan_layers=False, **changes
    )
    parts = transformer_forward_flops(config, VOCABULARY, LENGTH)
    # The compiler computes all pairs, also those that the mask then hides.
    ours = parts["dense"] + 2 * parts["attention"] + parts["head"]
    assert forward_cost(config) == pytest.approx(ours, rel=0.03)


def test_training_is_six_times_parameters_and_tokens_plus_causal_attention():
    config = TransformerConfig(num_layers=3, embed_dim=64, num_heads=4, activation="gelu")
    matmul_parameters = 3 * 12 * 64**2 + 64 * VOCABULARY
    tokens = 8 * LENGTH
    expected = 6 * matmul_parameters * tokens + 6 * 3 * 64 * LENGTH * tokens
    assert transformer_training_flops(config, VOCABULARY, 8, LENGTH) == expected


def test_a_window_counts_its_width():
    config = TransformerConfig(num_layers=1, embed_dim=64, num_heads=4, window=7)
    assert transformer_forward_flops(config, 2, 1024)["attention"] == 4 * 64 * 8
