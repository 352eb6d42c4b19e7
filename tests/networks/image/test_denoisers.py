"""What the DiT and the U-Net have in common, on signals, images and video."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.networks.image import dit, unet
from genai_jax.training.optimizer import _is_matrix
from genai_jax.training.sharding import logical_axes, path_name
from tests.networks.cases import (
    CHANNELS_OUT,
    NETWORKS,
    NOISE,
    SPACES,
    TOLD,
    arguments,
    inputs,
    outputs,
    random_params,
    shapes_of,
)

RULES = {"dit": dit.PARTITION_RULES, "unet": unet.PARTITION_RULES}
TOLDS = {
    "nothing": {},
    "labels": dict(label_sizes=TOLD["label_sizes"]),
    "text": dict(vocab_size=TOLD["vocab_size"]),
    "step_size": dict(uses_step_size=True),
    "everything": TOLD,
}

both = pytest.mark.parametrize("network", NETWORKS)


@both
def test_a_fresh_network_puts_out_exactly_zero(network):
    model = NETWORKS[network](told=TOLD)
    out, _ = jax.jit(model.init_with_output)(jax.random.key(0), *arguments("image"))
    assert not np.any(out)


@both
@pytest.mark.parametrize("kind", SPACES)
def test_signals_images_and_video_keep_their_shape(network, kind):
    model = NETWORKS[network](told=TOLD)
    out = outputs(model, random_params(model, *arguments(kind)), *arguments(kind))
    assert out.shape == (*inputs(kind).shape[:-1], CHANNELS_OUT) and out.dtype == jnp.float32
    assert np.isfinite(out).all() and np.std(out) > 1e-3


def loss_of(model, arguments):
    def loss(params):
        out = model.apply({"params": params}, *arguments)
        return jnp.mean(jnp.square(out - 1))

    return loss


@both
def test_unrolling_and_recomputing_change_neither_output_nor_gradient(network):
    model = NETWORKS[network](told=TOLD)
    scan = "scan_layers" if network == "dit" else "scan_blocks"
    given = arguments("image")
    params = random_params(model, *given)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(model, given)))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient)), "a parameter without use"
    for changes in ({scan: False}, {"remat": "full"}):
        other = loss_of(model.clone(config=dataclasses.replace(model.config, **changes)), given)
        traced = jax.jit(jax.value_and_grad(other)).trace(params)
        program = str(traced.jaxpr)
        assert ("remat" in program or "checkpoint" in program) == ("remat" in changes)
        other_loss, other_gradient = traced.lower().compile()(params)
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, atol=1e-4 * max(1, float(jnp.abs(b).max()))
            ),
            other_gradient,
            gradient,
        )


def test_joint_text_streams_are_refused_for_video():
    model = NETWORKS["dit"](told=TOLD, text_mode="joint")
    with pytest.raises(ValueError, match="joint text streams are for images and signals"):
        shapes_of(model, *arguments("video"))


@both
def test_dropout_acts_where_an_rng_is_given(network):
    model = NETWORKS[network](dropout=0.5)
    x = inputs("signal")
    params = random_params(model, x, NOISE)
    drop = jax.jit(lambda key: model.apply({"params": params}, x, NOISE, rngs={"dropout": key}))
    first, again, other = (drop(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(outputs(model, params, x), outputs(model, params, x))
    assert np.abs(first - outputs(model, params, x)).max() > 1e-3


@both
def test_half_precision_is_for_the_matmuls_alone(network):
    model = NETWORKS[network](told=TOLD).clone(dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *arguments("image"))
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@both
@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("told", TOLDS.values(), ids=TOLDS)
def test_every_parameter_has_a_sharding_rule_that_knows_what_is_a_matrix(network, kind, told):
    variants = [{}]
    if network == "dit":
        variants.append(dict(positions="rope", qk_norm=True))
        variants += [dict(text_mode="joint", qk_norm=True)] if kind != "video" else []
    for changes in variants:
        shapes = shapes_of(NETWORKS[network](told=told, **changes), *arguments(kind))
        axes = logical_axes(shapes, RULES[network])  # raises where no rule fits

        def check(path, leaf, axes):
            name = path[-1].key
            if name in ("bias", "scale"):
                assert not _is_matrix(axes), path_name(path)
            elif name == "kernel":
                assert _is_matrix(axes), path_name(path)

        jax.tree_util.tree_map_with_path(check, shapes, axes)
