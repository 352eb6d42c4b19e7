"""Dilated causal convolutions with a gate: the layers of WaveNet (van den Oord et al. 2016)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.causal_convolution import Delay
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.recurrent import Call, Recurrent

DILATIONS = tuple(2**i for i in range(10))


class Dilated(Recurrent):
    """y_t = W (tanh(F x_t + F' x_{t-d}) sigmoid(G x_t + G' x_{t-d})), section 2.3 of the paper.

    The residual stream takes the place of the sum over skip connections. Its decoding state is the
    last d inputs. A subclass has the dilation d in its name, and in `DILATION`.
    """

    DILATION: ClassVar[int] = 1
    PARTITION_RULES: ClassVar = (
        (r"(now|earlier)/kernel", ("embed", None, "mlp")),
        (r"(now|earlier)/bias", (None, "mlp")),
        (r"out/kernel", ("mlp", "embed")),
        (r"out/bias", ("embed",)),
    )

    def mix(self, x: jax.Array, call: Call) -> jax.Array:
        width = self.inner_width(self.config)
        earlier = call.convolve(Delay(self.DILATION), x)
        u = self.dense(2, width, name="now", use_bias=True)(x)
        u = u + self.dense(2, width, name="earlier")(earlier)
        return self.project_out(jnp.tanh(u[:, :, 0]) * nn.sigmoid(u[:, :, 1]))

    @classmethod
    def empty_value(cls, config: TransformerConfig, batch: int) -> dict:
        return {"inputs": jnp.zeros((batch, cls.DILATION, config.embed_dim))}

    @classmethod
    def flops(cls, config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        """`dense` for all matrices."""
        return {"dense": 2 * layers * 5 * config.embed_dim * cls.inner_width(config)}


def _with_dilation(dilation: int) -> type[Dilated]:
    return type(f"Dilated{dilation}", (Dilated,), {"DILATION": dilation, "__module__": __name__})


globals().update({f"Dilated{d}": _with_dilation(d) for d in DILATIONS})
