"""The PatchGAN discriminator (Isola et al. 2017): a verdict on every patch of an image."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.layers.convolution import Conv, GroupNorm


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    channels: int = field(
        64, "Channels of the first layer; they double per layer, up to 8 times as many.", minimum=4
    )
    num_layers: int = field(3, "Layers that halve the size.", minimum=1)


class PatchDiscriminator(nn.Module):
    """[batch, *space, channels] -> logits [batch, *patches], float32; positive means real.

    It has group norm instead of batch norm, so that a verdict does not depend on other images.
    """

    config: DiscriminatorConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        kernel, halve = (3, 4, 4)[2 - x.ndim :], (1, 2, 2)[2 - x.ndim :]
        for i in range(c.num_layers + 1):  # the last layer keeps the size
            strides = halve if i < c.num_layers else None
            features = c.channels * min(2**i, 8)
            x = Conv(
                features, kernel, strides=strides, use_bias=not i, dtype=self.dtype,
                name=f"conv_{i}",
            )(x)  # fmt: skip
            if i:
                x = GroupNorm(dtype=self.dtype, name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return Conv(1, kernel, dtype=self.dtype, name="conv_out")(x)[..., 0].astype(jnp.float32)


# Parameter path -> logical axes; the first pattern that matches applies.
PARTITION_RULES = (
    (r"conv_0/kernel", (..., None, "features")),
    (r"conv_\d+/kernel", (..., None, "features")),
    (r"conv_out/kernel", (..., None, None)),
    (r"conv_out/bias", (None,)),
    (r"(conv|norm)_\d+/(bias|scale)", ("embed",)),
)
