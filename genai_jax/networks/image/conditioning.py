"""Conditioning of denoising networks on a noise level, a step size, labels and a text."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.image import attention
from genai_jax.networks.image.attention import Attention
from genai_jax.networks.layers.dense import Dense, Mlp, Norm
from genai_jax.networks.layers.positions import sinusoidal


class Condition(NamedTuple):
    """What an example shows; None for what the network is not conditioned on.

    The null condition of an example is a label one past the last value, and an empty token mask.
    """

    labels: jax.Array | None = None  # [batch, attributes] int32
    tokens: jax.Array | None = None  # [batch, caption_length] int32
    token_mask: jax.Array | None = None  # [batch, caption_length] bool


class Embedded(NamedTuple):
    """An embedded condition."""

    vector: jax.Array  # [batch, dim]: noise level, classes and the mean of the text
    text: jax.Array | None  # [batch, caption_length, dim]
    text_mask: jax.Array | None


class ConditionEmbedding(nn.Module):
    """Embeds noise level, step size, labels and text.

    Attributes:
      dim: width of the result.
      label_sizes: number of values of each attribute; empty if there are no labels.
      vocab_size: vocabulary size of the text; 0 if there is no text.
      text_layers: blocks of the text encoder.
      text_heads: attention heads of the text encoder; must divide `dim`.
      uses_step_size: whether the step size of a solver is an input as well.
    """

    dim: int
    label_sizes: tuple[int, ...] = ()
    vocab_size: int = 0
    text_layers: int = 2
    text_heads: int = 1
    uses_step_size: bool = False
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, noise: jax.Array, condition: Condition, step_size: jax.Array | None
    ) -> Embedded:
        """Embeds a condition.

        Args:
          noise: noise level [batch], of order 1000.
          condition: labels and text.
          step_size: [batch] in [0, 1]; 0 if None.
        """
        vector = ScalarEmbedding(self.dim, self.dtype, name="noise")(noise)
        if self.uses_step_size:
            if step_size is None:
                step_size = jnp.zeros_like(noise)
            vector += ScalarEmbedding(self.dim, self.dtype, name="step_size")(1000 * step_size)
        init = nn.initializers.normal(0.02)
        for i, size in enumerate(self.label_sizes):
            table = nn.Embed(size + 1, self.dim, embedding_init=init, name=f"label_{i}")
            vector += table(condition.labels[:, i]).astype(self.dtype)
        text = None
        if self.vocab_size:
            text, mean = TextEncoder(
                self.vocab_size,
                self.dim,
                self.text_layers,
                self.text_heads,
                self.backend,
                self.dtype,
                name="text",
            )(condition.tokens, condition.token_mask)
            vector += mean
        vector = nn.with_logical_constraint(vector, ("batch", "activation_embed"))
        return Embedded(vector, text, condition.token_mask)


class ScalarEmbedding(nn.Module):
    """Sines and cosines of a number [batch], then two dense layers: [batch, dim]."""

    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        waves = sinusoidal(x[:, None].astype(jnp.float32), min(self.dim, 256))[:, 0]
        hidden = Dense((self.dim,), use_bias=True, dtype=self.dtype, name="up")(waves)
        return Dense((self.dim,), use_bias=True, dtype=self.dtype, name="down")(nn.silu(hidden))


class TextEncoder(nn.Module):
    """A small bidirectional transformer: states [batch, length, dim] and their mean [batch, dim].

    Tokens outside the mask have no effect; if the mask is empty, the mean is 0.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.dim, embedding_init=init, name="embed")(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = (x + sinusoidal(positions, self.dim)).astype(self.dtype)
        if self.num_layers:
            blocks = nn.scan(
                TextBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.num_layers,
            )
            x, _ = blocks(self.num_layers, self.num_heads, self.backend, self.dtype, name="blocks")(
                x, mask
            )
        x = Norm(dtype=self.dtype, name="norm")(x)
        weights = mask.astype(jnp.float32)[..., None]
        total = jnp.sum(x.astype(jnp.float32) * weights, 1)
        mean = total / jnp.maximum(jnp.sum(weights, 1), 1)
        return x, mean.astype(self.dtype)


class TextBlock(nn.Module):
    """A transformer block of the text encoder: attention and MLP on a residual stream."""

    num_layers: int
    num_heads: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, mask):
        dim, heads = x.shape[-1], self.num_heads
        scale = 1 / (2 * self.num_layers)
        attend = Attention(
            heads, dim // heads, out_scale=scale, backend=self.backend, dtype=self.dtype,
            name="attention",
        )  # fmt: skip
        normed = Norm(dtype=self.dtype, name="attention_norm")(x)
        x = x + attend(normed, normed, mask)
        mlp = Mlp(4 * dim, "gelu", True, scale, self.dtype, name="mlp")
        return x + mlp(Norm(dtype=self.dtype, name="mlp_norm")(x)), None


MLP_RULES = (
    (r"mlp/up/kernel", ("embed", "mlp")),
    (r"mlp/up/bias", ("mlp",)),
    (r"mlp/down/kernel", ("mlp", "embed")),
    (r"mlp/down/bias", ("embed",)),
)

# Label tables have a row more than there are values, so rows of embeddings are never split.
PARTITION_RULES = (
    (r"label_\d+/embedding", (None, "embed")),
    (r"text/embed/embedding", (None, "embed")),
    *attention.stacked("text/blocks/", attention.PARTITION_RULES),
    *attention.stacked("text/blocks/", MLP_RULES),
    (r"text/blocks/\w+_norm/scale", ("blocks", "embed")),
    (r"text/norm/scale", ("embed",)),
    (r"(noise|step_size)/up/kernel", (None, "embed")),
    (r"(noise|step_size)/down/kernel", ("mlp", "embed")),
    (r"(noise|step_size)/(up|down)/bias", ("embed",)),
)
