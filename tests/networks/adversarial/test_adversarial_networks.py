"""Generators and critics: shapes, modulation, fading, projection, spectral normalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.networks.adversarial import critic, generator
from genai_jax.networks.adversarial.critic import Critic, CriticConfig
from genai_jax.networks.adversarial.generator import Generator, GeneratorConfig, ModulatedConv
from genai_jax.networks.layers.convolution import Conv, convolve, downsample, upsample
from genai_jax.networks.layers.dense import Dense
from genai_jax.training.sharding import logical_axes

SHAPE = (8, 12, 2)
LABELS = np.array([[0], [2], [1]], np.int32)


def random(shapes, scale=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: scale * rng.normal(size=x.shape).astype(np.float32), shapes)


def random_generator(kind: str, grows: bool):
    """A generator with random parameters, and latents."""
    config = GeneratorConfig(network=kind, latent_dim=5, base_height=2, channels=4)
    network = Generator(config, SHAPE, (3,), grows)
    z = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    params = random(jax.eval_shape(network.init, jax.random.key(0), z, LABELS)["params"])
    return network, params, z


@pytest.mark.parametrize("kind", generator.NETWORKS)
def test_a_generator_uses_its_labels_and_fades_in_its_last_block(kind):
    network, params, z = random_generator(kind, grows=True)

    @jax.jit
    def generate(params, z, labels, fade, key):
        styles = network.apply({"params": params}, z, labels, method="styles")
        rngs = {"noise": key}
        return network.apply({"params": params}, styles, fade, method="synthesize", rngs=rngs)

    key = jax.random.key(0)
    images = generate(params, z, LABELS, 1.0, key)
    assert images.shape == (3, *SHAPE) and images.dtype == jnp.float32
    assert np.abs(images[1] - generate(params, z, LABELS * 0, 1.0, key)[1]).max() > 1e-4
    noise_effect = np.abs(images - generate(params, z, LABELS, 1.0, jax.random.key(1))).max()
    assert (noise_effect > 1e-4) == (kind == "style")
    small = generate(params, z, LABELS, 0.0, key)  # the output of the previous block, upsampled
    np.testing.assert_allclose(small, upsample(downsample(small, (2, 2)), (2, 2)), atol=1e-5)
    assert np.abs(images - small).max() > 1e-3


@pytest.mark.parametrize("kind", generator.NETWORKS)
def test_a_generator_of_small_images_has_the_first_layers_of_a_larger_one(kind):
    small = GeneratorConfig(network=kind, latent_dim=5, base_height=2, channels=8)
    large = GeneratorConfig(network=kind, latent_dim=5, base_height=2, channels=4)
    shapes = [
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 5)))["params"]
        for network in (Generator(small, (4, 6, 2)), Generator(large, SHAPE, (), True))
    ]
    before, after = ({jax.tree_util.keystr(p): x.shape for p, x in jax.tree.leaves_with_path(s)}
                     for s in shapes)  # fmt: skip
    assert before.items() <= after.items() and len(before) < len(after)


def test_a_modulated_convolution_is_a_convolution_with_a_kernel_per_example():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 4, 5)).astype(np.float32)
    style = rng.normal(size=(3, 6)).astype(np.float32)
    network = ModulatedConv(7)
    params = random(jax.eval_shape(network.init, jax.random.key(0), x, style)["params"])
    y = network.apply({"params": params}, x, style)
    scales = style @ params["style"]["kernel"] + params["style_bias"]
    for i in range(3):
        kernel = params["kernel"] * scales[i][:, None]
        kernel = kernel / np.sqrt(np.sum(np.square(kernel), (0, 1, 2)) + 1e-8)
        np.testing.assert_allclose(y[i : i + 1], convolve(x[i : i + 1], kernel), atol=1e-5)


@pytest.mark.parametrize("kind", critic.NETWORKS)
def test_a_critic_uses_its_labels_and_fades_in_its_first_block(kind):
    config = CriticConfig(kind, base_height=2, channels=4, spectral_norm=True, minibatch_std=True)
    network = Critic(config, SHAPE, (3,), grows=True)
    x = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, LABELS)
    variables = random(shapes)
    judge = jax.jit(network.apply)
    verdicts = judge(variables, x, LABELS, 1.0)
    assert verdicts.shape == (3,) and verdicts.dtype == jnp.float32
    other = judge(variables, x, LABELS * 0, 1.0)
    assert float(verdicts[0]) == float(other[0])  # its label is 0 in both
    assert abs(float(verdicts[1] - other[1])) > 1e-6
    coarse = upsample(downsample(x, (2, 2)), (2, 2))
    faded, of_coarse = (judge(variables, image, LABELS, 0.0) for image in (x, coarse))
    np.testing.assert_allclose(faded, of_coarse, atol=1e-6)
    axes = logical_axes(shapes["params"], critic.PARTITION_RULES)
    assert axes["block_8"]["skip" if kind == "residual" else "conv"]["kernel"][-1] == "features"


@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_spectral_normalization_is_by_the_largest_singular_value(layer):
    x = np.eye(6, dtype=np.float32)
    if layer == "dense":
        network = Dense((4,), spectral_norm=True)
    else:
        x, network = x[:, None, None, :], Conv(4, (3, 3), spectral_norm=True)
    variables = network.init(jax.random.key(0), x)
    start = variables["spectral"]["vector"]
    step = jax.jit(lambda v: network.apply(v, x, mutable="spectral")[1])
    for _ in range(200):
        variables = {**variables, **step(variables)}
    assert np.abs(variables["spectral"]["vector"] - start).max() > 1e-3
    kernel = variables["params"]["kernel"]
    norm = np.linalg.svd(kernel.reshape(-1, 4), compute_uv=False)[0]
    y = network.apply(variables, x)
    expected = kernel if layer == "dense" else convolve(x, kernel)
    if layer == "conv":
        expected = expected + variables["params"]["bias"]
    np.testing.assert_allclose(y, expected / norm, atol=1e-4)
    # Gradients include the division: scaling the kernel changes nothing.

    def loss(kernel):
        params = {**variables["params"], "kernel": kernel}
        return jnp.sum(jnp.sin(network.apply({**variables, "params": params}, x)))

    assert abs(float(jnp.vdot(jax.grad(loss)(kernel), kernel))) < 1e-4


@pytest.mark.parametrize(("shape", "base"), [((10, 10, 1), 4), ((8, 6, 3), 2), ((4, 4, 1), 8)])
def test_sizes_that_do_not_halve_are_errors(shape, base):
    with pytest.raises(ValueError, match=rf"^base_height={base}: doubling it does not lead to"):
        GeneratorConfig(base_height=base).check_shape(shape)


def test_a_network_that_grows_must_start_below_its_full_height():
    with pytest.raises(ValueError, match=r"^base_height=8 must be below 8, the height that the"):
        CriticConfig(base_height=8).check_shape((8, 8, 1), grows=True)
