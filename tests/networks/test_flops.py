"""FLOP counts against shapes and against the compiler."""

import sys

import jax
import jax.numpy as jnp
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.flops import count_flops
from genai_jax.networks.image.dit import Dit, DitConfig
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.flops import (
    inactive_parameters,
    transformer_forward_flops,
    transformer_training_flops,
)
from genai_jax.networks.sequence.mixers.attention import mean_keys
from genai_jax.networks.sequence.transformer import Transformer
from tests.conftest import ROOT

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
    # Eight keys a query, less what the first queries do not have; the diagonal counts half.
    assert transformer_forward_flops(config, 2, 1024)["attention"] == 4 * 64 * (8 - 64 / 2048)
    assert mean_keys(64, 64) == 32 and mean_keys(64, 1) == pytest.approx(1, abs=0.01)
    exact = sum(min(i + 1, 20) for i in range(64)) / 64
    assert mean_keys(64, 20) == pytest.approx(exact - 20 / 128)


def test_counting_the_products_of_a_jaxpr():
    x, w = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    product = 2 * 3 * 4 * 5
    assert count_flops(lambda x, w: jnp.sin(x @ w), x, w) == product
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))
    assert count_flops(gradient, x, w) == 3 * product
    looped = lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w @ w.T), None), x, None, length=7)
    assert count_flops(looped, x) == 7 * 2 * product
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w.T, lambda x: x, x)
    assert count_flops(jax.jit(branch), x) == 2 * product
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 6))
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=layout)
    # In either direction three windows of four meet 3 pixels, the last one 2 and the padding.
    assert count_flops(conv, image, kernel) == 2 * 2 * 3 * 6 * 11**2
    up = lambda x, k: jax.lax.conv_transpose(x, k, (2, 2), "SAME", dimension_numbers=layout)
    cost = jax.jit(up).lower(image, kernel).compile().cost_analysis()["flops"]
    assert count_flops(up, image, kernel) == cost
    with pytest.raises(ValueError, match="runs an unknown number of times"):
        count_flops(
            lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), w.T @ w
        )


def test_a_transformer_of_images_counts_within_three_percent_of_the_compiler():
    model = Dit(DitConfig(num_layers=2, embed_dim=128, num_heads=2, scan_layers=False), 3)
    x, t = jnp.zeros((2, 16, 16, 3)), jnp.zeros(2)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t)
    plain = model.clone(backend="xla")
    cost = jax.jit(plain.apply).lower(params, x, t).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    assert count_flops(plain.apply, params, x, t) == pytest.approx(cost["flops"], rel=0.03)


# Flagfile -> flags that make a layer's products outweigh what it does to each of its numbers, which
# the compiler counts and we do not.
COUNTED = {
    "quickstart/diffusion": ("--unet.channels=48",),
    "quickstart/vae": (
        "--ladder_vae.stages=4x1,8x1",
        "--ladder_vae.channels=256",
        "--ladder_vae.bottleneck=1",
    ),
    "quickstart/gan": (),
    "quickstart/classifier": ("--classifier.channels=48",),
    "normalizing_flow/digits": (),
    "code_prior/autoencoder": (),
}


@pytest.mark.parametrize("flagfile", COUNTED)
def test_what_a_task_counts_is_what_the_compiler_counts(flagfile, monkeypatch):
    counted = []

    def record(function, *shapes):
        counted.append((function, shapes, count_flops(function, *shapes)))
        return counted[-1][-1]

    path = ROOT / "experiments" / f"{flagfile}.flags"
    config = parse_run([f"--flagfile={path}", "--data.batch_size=4", *COUNTED[flagfile]])
    task = make_task(config)
    for owner in (task, getattr(task, "model", task)):  # one of them counts
        module = sys.modules[type(owner).__module__]
        if hasattr(module, "count_flops"):
            monkeypatch.setattr(module, "count_flops", record)
    assert task.flops_per_step()["flops_per_step"] >= 3 * sum(flops for *_, flops in counted) > 0
    for function, shapes, flops in counted:
        cost = jax.jit(function).lower(*shapes).compile().cost_analysis()
        assert flops == pytest.approx(cost["flops"], rel=0.03)


def test_of_experts_those_count_that_a_token_chooses():
    config = TransformerConfig(num_layers=2, embed_dim=128, num_heads=2, scan_layers=False)
    moe = MoeConfig(
        num_experts=4, experts_per_token=2, expert_dim=96, shared_experts=1, capacity_factor=1.0
    )
    parts = transformer_forward_flops(config, VOCABULARY, LENGTH, moe)
    model = Transformer(config, VOCABULARY, backend="xla", moe=moe)
    tokens = jnp.zeros((2, LENGTH), jnp.int32)
    variables = jax.eval_shape(
        lambda rng: model.init(rng, tokens, method="init_all"), jax.random.key(0)
    )
    apply = lambda v, t: model.apply(v, t, method="init_all")
    # With a capacity factor of 1 the experts compute as many rows as there are choices. The slots
    # are counted by a triangular matmul: [choices, choices] by [choices, experts], in each layer.
    choices = 2 * LENGTH
    counting = 2 * 2 * choices**2 * 4 / LENGTH
    ours = parts["dense"] + 2 * parts["attention"] + parts["head"] + counting
    assert count_flops(apply, {"params": variables["params"]}, tokens) / tokens.size == ours
    experts = 2 * 3 * 128 * 96
    assert inactive_parameters(config, moe) == 2 * experts
    assert inactive_parameters(config, MoeConfig()) == 0
