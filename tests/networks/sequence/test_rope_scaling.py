"""Scaled rotary frequencies against the definitions, and attention that uses them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError, parse
from genai_jax.networks.layers.positions import rotation
from genai_jax.networks.layers.rope_scaling import KINDS, RopeScaling
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.latent_attention import LatentAttention
from genai_jax.networks.sequence.transformer import Transformer, empty_state

HALF, THETA, FACTOR, LENGTH = 16, 10_000.0, 4.0, 512
PLAIN = RopeScaling().frequencies(HALF, THETA)


def scaled(kind: str) -> np.ndarray:
    return RopeScaling(kind, FACTOR, LENGTH).frequencies(HALF, THETA)


def test_interpolation_puts_long_rows_between_the_positions_of_short_ones():
    long = rotation(jnp.arange(0, 64, 4)[None], 2 * HALF, scaling=RopeScaling("linear", 4.0))
    short = rotation(jnp.arange(16)[None], 2 * HALF)
    np.testing.assert_allclose(long.cos, short.cos, atol=1e-5)
    np.testing.assert_allclose(long.sin, short.sin, atol=1e-5)


def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest():
    share = scaled("ntk") / PLAIN
    np.testing.assert_allclose(share[[0, -1]], [1, 1 / FACTOR], rtol=1e-5)
    assert (np.diff(share) < 0).all()


@pytest.mark.parametrize(("kind", "slow", "fast"), [("yarn", 1, 32), ("llama3", 1, 4)])
def test_pairs_are_slowed_down_by_their_turns_in_the_earlier_length(kind, slow, fast):
    """Pair by pair, from wavelengths."""
    for plain, frequency in zip(PLAIN.astype(np.float64), scaled(kind), strict=True):
        wavelength = 2 * math.pi / plain
        if wavelength < LENGTH / fast:
            want = plain
        elif wavelength > LENGTH / slow:
            want = plain / FACTOR
        else:
            mix = (LENGTH / wavelength - slow) / (fast - slow)
            want = (1 - mix) * plain / FACTOR + mix * plain
        assert frequency == pytest.approx(want, rel=1e-5)


def test_only_yarn_sharpens_attention():
    assert [k for k in KINDS if RopeScaling(k, FACTOR, LENGTH).sharpness != 1] == ["yarn"]
    options = dict(rope_scaling="yarn", rope_factor=math.e, rope_length=8)
    config = TransformerConfig(embed_dim=8, num_heads=2, **options)
    assert config.self_attention_scale == pytest.approx(1.1**2 / 2)
    wide = TransformerConfig(
        embed_dim=32, num_heads=2, parametrization="maximal_update", base_width=8,
        base_head_dim=4, **options,
    )  # fmt: skip
    assert wide.self_attention_scale == pytest.approx(1.1**2 * 2 / 16)
    latent = LatentAttention(dataclasses.replace(config, pattern="latent_attention"))
    assert latent._scale == pytest.approx(1.1**2 / math.sqrt(4 + 2))


@pytest.mark.parametrize("pattern", ["attention", "latent_attention"])
def test_decoding_rotates_as_the_full_pass(pattern):
    config = TransformerConfig(
        num_layers=1, embed_dim=8, num_heads=2, pattern=pattern,
        rope_scaling="yarn", rope_factor=2.0, rope_length=8,
    )  # fmt: skip
    tokens = jnp.arange(6)[None]
    model = Transformer(config, 7)
    params = jax.jit(lambda key: model.init(key, tokens, method="init_all"))(jax.random.key(0))
    apply = jax.jit(model.apply)
    whole, _ = apply(params, tokens)
    state = empty_state(config, 1, 6, jnp.float32)
    for t in range(6):
        y, state = apply(params, tokens[:, t : t + 1], jnp.array([[t]]), None, state)
        np.testing.assert_allclose(y[:, 0], whole[:, t], atol=1e-5)
    plain = dataclasses.replace(config, rope_scaling="none", rope_factor=None, rope_length=None)
    assert np.abs(Transformer(plain, 7).apply(params, tokens)[0] - whole).max() > 1e-4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["rope_scaling=yarn", "rope_factor=2"], "rope_scaling=yarn needs --transformer.rope_len"),
        (["rope_scaling=linear"], "rope_scaling=linear needs --transformer.rope_factor"),
        (["rope_factor=2"], "rope_factor=2.0 is not used by --transformer.rope_scaling=none"),
        (["rope_scaling=ntk", "rope_factor=2", "rope_length=8"],
         "rope_length=8 is not used by --transformer.rope_scaling=ntk"),
        (["rope_scaling=ntk", "rope_factor=2", "positions=alibi"],
         "rope_scaling=ntk is for --transformer.positions=rope, not alibi"),
        (["rope_scaling=ntk", "rope_factor=2", "pattern=mamba"],
         "rope_scaling=ntk is for attention, which --transformer.pattern=mamba lacks"),
        (["rope_scaling=dynamic"], "dynamic"),
    ],
)  # fmt: skip
def test_scalings_that_lack_something_or_have_no_use_are_refused(flags, said):
    with pytest.raises(ConfigError) as error:
        parse([f"--transformer.{flag}" for flag in flags], {"transformer": TransformerConfig})
    assert said in str(error.value) and "\n" not in str(error.value)
