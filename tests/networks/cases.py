"""Tiny denoising networks, their inputs, and random parameters for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.networks.image.conditioning import Condition
from genai_jax.networks.image.dit import Dit, DitConfig
from genai_jax.networks.image.unet import Unet, UnetConfig

BATCH, CHANNELS, CHANNELS_OUT = 2, 2, 3
SPACES = {"signal": (8,), "image": (8, 8), "video": (3, 8, 8)}
LABEL_SIZES, VOCABULARY = (3, 2), 7

CONDITION = Condition(
    labels=jnp.array([[0, 1], [2, 0]]),
    tokens=jnp.array([[1, 2, 3, 4], [5, 6, 1, 2]]),
    token_mask=jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool),
)
NOISE = jnp.array([10.0, 700.0])
STEP_SIZE = jnp.array([0.125, 0.5])

# All that a network can be told.
TOLD = dict(label_sizes=LABEL_SIZES, vocab_size=VOCABULARY, uses_step_size=True)


def dit(*, told=None, **changes) -> Dit:
    config = dict(num_layers=2, embed_dim=16, num_heads=2, patch_size=4, text_layers=1) | changes
    return Dit(DitConfig(**config), CHANNELS_OUT, **(told or {}))


def unet(*, told=None, **changes) -> Unet:
    config = dict(
        channels=4, channel_multipliers="1,2", blocks_per_level=1, attention_resolutions="4",
        head_dim=4, text_layers=1,
    )  # fmt: skip
    return Unet(UnetConfig(**config | changes), CHANNELS_OUT, **(told or {}))


NETWORKS = {"dit": dit, "unet": unet}


def inputs(kind: str) -> jax.Array:
    """[batch, *space, channels] of a signal, an image or a video."""
    return jax.random.normal(jax.random.key(3), (BATCH, *SPACES[kind], CHANNELS))


def arguments(kind: str) -> tuple:
    return inputs(kind), NOISE, CONDITION, STEP_SIZE


def shapes_of(model, x, *context) -> dict:
    """Shapes of the parameters: nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), x, *context)["params"]


def random_params(model, x, *context) -> dict:
    """Every parameter random, those that start at zero too; norms' scales are around 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model, x, *context))


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, x, noise=NOISE, condition=Condition(), step_size=None):  # noqa: B008
    return model.apply({"params": params}, x, noise, condition, step_size)
