"""Maximal-update parametrization: the table of the paper, and what is equal at the base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.router import Router
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.transformer import PARTITION_RULES, Transformer, empty_state
from genai_jax.training.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from genai_jax.training.parametrization import fans, kind, learning_rate_factor
from genai_jax.training.sharding import logical_axes

GROWTH = {"embed": 4.0, "mlp": 4.0, "heads": 2.0, "kv_heads": 2.0, "head_dim": 2.0}
SHAPE = TransformerConfig(
    num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, activation="gelu",
    qk_norm=True,
)  # fmt: skip
AT_BASE = dict(parametrization="maximal_update", base_width=16)
WIDER_HEADS = dict(parametrization="maximal_update", base_width=4, base_head_dim=1)
MORE_HEADS = dict(parametrization="maximal_update", base_width=8)
DENSE = MoeConfig()
TOKENS = jnp.arange(24).reshape(2, 12) * 7 % 11


def test_the_sharding_table_says_what_every_parameter_is():
    kinds = {pattern: kind(axes) for pattern, axes in PARTITION_RULES}
    assert kinds == {
        "position_embed/embedding": "input",
        "embed/embedding": "input",
        r"\battention/query/kernel": "hidden",
        r"\battention/(key|value)/kernel": "hidden",
        r"\battention/out/kernel": "hidden",
        r"\battention/out/bias": "vector",
        r"\battention/query/bias": "vector",
        r"\battention/(key|value)/bias": "vector",
        r"\battention/(query|key)_norm/scale": "vector",
        r"\bcross_attention/query/kernel": "hidden",
        r"\bcross_attention/(key|value)/kernel": "hidden",
        r"\bcross_attention/out/kernel": "hidden",
        r"\bcross_attention/out/bias": "vector",
        r"\bcross_attention/query/bias": "vector",
        r"\bcross_attention/(key|value)/bias": "vector",
        r"\bcross_attention/(query|key)_norm/scale": "vector",
        "relative_bias/table": "vector",
        "mlp/router/kernel": "output",
        "mlp/router/bias": "vector",
        "mlp/experts/(up|gate)": "hidden",
        "mlp/experts/down": "hidden",
        "(mlp|shared)/(up|gate)/kernel": "hidden",
        "(mlp|shared)/down/kernel": "hidden",
        "mlp/(up|gate)/bias": "vector",
        "mlp/down/bias": "vector",
        r"layers/(block_\d+/)?\w+_norm/(scale|bias)": "vector",
        "final_norm/(scale|bias)": "vector",
        "head/kernel": "output",
    }
    assert fans(("layers", "heads", "head_dim", "embed")) == (("heads", "head_dim"), ("embed",))
    with pytest.raises(
        ConfigError, match=r"maximal-update .* has no rule .* axes \(None, 'features'\)"
    ):
        kind((None, "features"))


def test_factors_are_those_of_table_8():
    factor = lambda rule, *axes: learning_rate_factor(axes, GROWTH, rule)
    for axes in (("vocabulary", "embed"), ("layers", "embed"), ("embed", "vocabulary")):
        assert factor("sgd", *axes) == 4  # fan-out of an input and a bias, fan-in of an output
        assert factor("adam", *axes) == factor("muon", *axes) == 1
    for axes in (("layers", "embed", "mlp"), ("layers", "heads", "head_dim", "embed")):
        assert factor("sgd", *axes) == 1
        assert factor("adam", *axes) == 1 / 4
        assert factor("muon", *axes) == 1 / 2
    assert factor("sgd", "layers", "head_dim") == 2
    assert learning_rate_factor(("layers", "embed", "mlp"), {}, "adam") == 1


@functools.cache
def fresh(moe=DENSE, **changes):
    """(a small model, its initial parameters, its logits)."""
    model = Transformer(dataclasses.replace(SHAPE, **changes), 11, moe=moe)

    @jax.jit
    def run():
        params = model.init(jax.random.key(0), TOKENS, method="init_all")["params"]
        return params, model.apply({"params": params}, TOKENS, method="init_all")

    return model, *run()


@functools.cache
def gradients(**changes):
    """(initial parameters, gradients) of a small model."""
    model, params, _ = fresh(**changes)

    def loss(params):
        logits = model.apply({"params": params}, TOKENS, method="init_all")
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 3])

    return params, jax.jit(jax.grad(loss))(params)


def updates_of(optimizer: str, growth: dict):
    """(updates of a step without clipping, the shrinking that is weight decay among them)."""
    params, grads = gradients()
    axes = logical_axes(params, PARTITION_RULES)
    config = OptimizerConfig(name=optimizer, warmup_steps=0, clip_norm=0, learning_rate=0.1)
    tool = make_optimizer(config, 10, PARTITION_RULES, growth=growth)
    updates = jax.jit(lambda: tool.update(grads, tool.init(params), params)[0])()
    shrink = jax.tree.map(
        lambda x, a: -0.1 * 0.1 * x * (kind(a) != "vector"), params, axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    return updates, shrink


def test_at_the_base_width_both_are_the_same_function_bit_for_bit():
    jax.tree.map(np.testing.assert_array_equal, gradients(), gradients(**AT_BASE))
    jax.tree.map(np.testing.assert_array_equal, fresh()[1:], fresh(**AT_BASE)[1:])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_are_those_of_one_rate_times_the_factors(optimizer):
    plain, shrink = updates_of(optimizer, {})
    at_base, _ = updates_of(optimizer, dataclasses.replace(SHAPE, **AT_BASE).growth)
    jax.tree.map(np.testing.assert_array_equal, plain, at_base)
    wide, _ = updates_of(optimizer, GROWTH)
    rule = optimizer if optimizer in ("sgd", "muon") else "adam"

    def check(axes, one, other, decay):
        factor = learning_rate_factor(axes, GROWTH, rule)
        # Weight decay is the same at every width.
        np.testing.assert_allclose(other - decay, factor * (one - decay), rtol=2e-4, atol=1e-7)

    axes = logical_axes(plain, PARTITION_RULES)
    jax.tree.map(check, axes, plain, wide, shrink, is_leaf=lambda x: isinstance(x, tuple))


def test_outputs_are_divided_by_the_width():
    shape = dataclasses.replace(SHAPE, **MORE_HEADS)
    _, standard, _ = fresh()
    init = jax.jit(functools.partial(Transformer(shape, 11).init, method="init_all"))
    params = init(jax.random.key(0), TOKENS)["params"]
    ratio = params["head"]["kernel"] / standard["head"]["kernel"]
    np.testing.assert_allclose(ratio, 2**0.5, rtol=1e-5)
    others = [{k: v for k, v in p.items() if k != "head"} for p in (params, standard)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *others)

    def output(tied):
        model = Transformer(dataclasses.replace(shape, tie_embeddings=tied), 11)
        return model.apply({"params": params}, method="head_kernel")

    np.testing.assert_array_equal(output(tied=False), params["head"]["kernel"] / 2)
    np.testing.assert_array_equal(output(tied=True), params["embed"]["embedding"].T / 2)


def test_routers_are_outputs():
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    variables = {growth: Router(5, growth).init(jax.random.key(0), x) for growth in (1.0, 4.0)}
    kernels = [v["params"]["kernel"] for v in variables.values()]
    np.testing.assert_allclose(kernels[1], 2 * kernels[0], rtol=1e-5)
    one, four = (Router(5, growth).apply(v, x)[0] for growth, v in variables.items())
    np.testing.assert_allclose(four, one / 2, rtol=1e-5, atol=1e-6)
    shape = dataclasses.replace(SHAPE, **MORE_HEADS)
    model = Transformer(shape, 11, moe=MoeConfig(num_experts=3))
    init = jax.jit(functools.partial(model.init, method="init_all"))
    params = init(jax.random.key(0), TOKENS)["params"]
    spread = np.std(params["layers"]["mlp"]["router"]["kernel"])
    assert spread == pytest.approx((2 / 16) ** 0.5, rel=0.3)


def test_wider_heads_have_scores_of_one_over_head_dim():
    shape = TransformerConfig(num_heads=4, embed_dim=64, parametrization="maximal_update",
                              base_width=16, base_head_dim=4)  # fmt: skip
    assert shape.head_width == 16 and shape.attention_scale == 4**0.5 / 16
    heads = {"heads": 1, "kv_heads": 1, "head_dim": 4, "latent": 4}
    assert shape.growth == {"embed": 4, "mlp": 4, "inner": 4, **heads}
    more = dataclasses.replace(SHAPE, **MORE_HEADS)
    assert more.attention_scale is None
    heads = {"heads": 2, "kv_heads": 2, "head_dim": 1, "latent": 1}
    assert more.growth == {"embed": 2, "mlp": 2, "inner": 2, **heads}
    # In decoding as in training: queries and keys are normalized, so the scale alone differs.
    model = Transformer(dataclasses.replace(SHAPE, **WIDER_HEADS), 11)
    variables = {"params": fresh()[1]}
    state = empty_state(model.config, 2, 12, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    cached = jax.jit(model.apply)(variables, TOKENS, positions, state=state)[0]
    whole = jax.jit(model.apply)(variables, TOKENS)[0]
    np.testing.assert_allclose(cached, whole, atol=1e-5)
    other = jax.jit(Transformer(SHAPE, 11).apply)(variables, TOKENS)[0]
    assert not np.allclose(other, whole, atol=1e-3)


def test_a_base_that_flags_do_not_say():
    for changes, message in (
        (dict(base_width=8), r"base_width=8 is for parametrization=maximal_update"),
        (dict(parametrization="maximal_update"), r"needs `base_width`"),
        (MORE_HEADS | dict(head_dim=None), r"say what grows with the width"),
        (MORE_HEADS | dict(num_kv_heads=1), r"num_kv_heads=1 is not a multiple of the 2 times"),
        (MORE_HEADS | dict(base_width=3), r"num_heads=4 is not a multiple of the 5.33333 times"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SHAPE, **changes)
