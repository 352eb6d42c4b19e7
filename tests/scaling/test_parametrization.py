"""Maximal-update parametrization: the table of the paper, and what is equal at the base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.networks.transformer import PARTITION_RULES, Transformer, TransformerConfig
from genai_jax.scaling.parametrization import fans, kind, learning_rate_factor
from genai_jax.training.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from genai_jax.training.sharding import logical_axes, path_name

GROWTH = {"embed": 4.0, "mlp": 4.0, "heads": 2.0, "kv_heads": 2.0, "head_dim": 2.0}
BASE = dict(num_layers=2, embed_dim=16, num_heads=2, head_dim=8, activation="gelu")
BATCH = {
    "tokens": jnp.arange(24).reshape(2, 12) % 11,
    "targets": (jnp.arange(24).reshape(2, 12) * 7) % 11,
    "positions": jnp.broadcast_to(jnp.arange(12), (2, 12)),
    "segment_ids": jnp.ones((2, 12), jnp.int32),
    "loss_mask": jnp.ones((2, 12)),
}


def test_the_sharding_table_says_what_every_parameter_is():
    kinds = {pattern: kind(axes) for pattern, axes in PARTITION_RULES}
    assert kinds == {
        "position_embed/embedding": "input",
        "embed/embedding": "input",
        "attention/query/kernel": "hidden",
        "attention/(key|value)/kernel": "hidden",
        "attention/out/kernel": "hidden",
        "attention/query/bias": "vector",
        "attention/(key|value)/bias": "vector",
        "attention/(query|key)_norm/scale": "vector",
        "mlp/router/kernel": "output",
        "mlp/experts/(up|gate)": "hidden",
        "mlp/experts/down": "hidden",
        "(mlp|shared)/(up|gate)/kernel": "hidden",
        "(mlp|shared)/down/kernel": "hidden",
        "mlp/(up|gate)/bias": "vector",
        "(attention/out|mlp/down)/bias": "vector",
        r"layers/\w+_norm/(scale|bias)": "vector",
        "final_norm/(scale|bias)": "vector",
        "head/kernel": "output",
    }
    assert fans(("layers", "heads", "head_dim", "embed")) == (("heads", "head_dim"), ("embed",))
    with pytest.raises(ConfigError, match=r"no maximal-update .* axes \(None, 'features'\)"):
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
def first_updates(optimizer: str, **changes):
    """(initial parameters, updates of one step, logits, parameter -> kind) of a small model."""
    config = TransformerConfig(**{**BASE, **dict(changes)})
    model = Transformer(config, 11)
    optimizer_config = OptimizerConfig(name=optimizer, warmup_steps=0, clip_norm=0)

    @jax.jit
    def run():
        params = model.init(jax.random.key(0), BATCH["tokens"], method="init_all")["params"]

        def loss(params):
            logits = model.apply({"params": params}, BATCH["tokens"], method="init_all")
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["targets"][..., None], 2)
            return -jnp.mean(picked), logits

        grads, logits = jax.grad(loss, has_aux=True)(params)
        axes = logical_axes(params, PARTITION_RULES)
        tool = make_optimizer(optimizer_config, 10, axes, growth=config.growth)
        return params, tool.update(grads, tool.init(params), params)[0], logits

    params, updates, logits = jax.device_get(run())
    return params, updates, logits, logical_axes(params, PARTITION_RULES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_at_the_base_width_both_are_the_same_bit_for_bit(optimizer):
    maximal = dict(parametrization="maximal_update", base_width=16, base_head_dim=8)
    here = first_updates(optimizer)
    there = first_updates(optimizer, **maximal)
    jax.tree.map(np.testing.assert_array_equal, here[:3], there[:3])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_away_from_the_base_differ_by_the_table_alone(optimizer):
    # Heads and tied embeddings: no multiplier at the base of a fourth of this width changes what
    # Adam's and Lion's first step is, a sign; Muon's is orthogonal, Adafactor's of unit size.
    if optimizer == "sgd":
        pytest.skip("its updates follow the gradient, which multipliers change")
    decay = 1e-3 * 0.1  # learning rate x weight decay: the same in both
    wide = dict(parametrization="maximal_update", base_width=4, base_head_dim=2)
    params, updates, _, axes = first_updates(optimizer)
    other, scaled, _, _ = first_updates(optimizer, **wide)
    rule = optimizer if optimizer == "muon" else "adam"

    def check(path, update, other_update, p, q, axes):
        shrink = decay if kind(axes) != "vector" else 0.0
        factor = learning_rate_factor(axes, {"embed": 4, "mlp": 4, "heads": 1, "kv_heads": 1,
                                             "head_dim": 4}, rule)  # fmt: skip
        a, b = update + shrink * p, (other_update + shrink * q) / factor
        size = lambda x: np.sqrt(np.mean(np.square(x)))
        assert size(b) == pytest.approx(size(a), rel=0.05), path_name(path)

    leaves = lambda tree: [leaf for _, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    of_axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, u), v, p, q, a in zip(
        jax.tree_util.tree_flatten_with_path(updates)[0],
        leaves(scaled), leaves(params), leaves(other), of_axes, strict=True,
    ):  # fmt: skip
        check(path, u, v, p, q, a)
