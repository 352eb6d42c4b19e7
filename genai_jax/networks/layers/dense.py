"""The layers that the networks share: dense, embedding, norms, gated and plain MLPs."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genai_jax.networks.layers.spectral import spectral_normalized

Initializer = Callable[..., jax.Array]

NORMS = ("rmsnorm", "layernorm")
GATED = ("swiglu", "geglu")
ACTIVATIONS = (*GATED, "gelu", "relu")


def contract(x: jax.Array, kernel: jax.Array, num_in: int = 1) -> jax.Array:
    """Contracts the last `num_in` axes of `x` with the first `num_in` axes of `kernel`.

    The matmul is two-dimensional: with it XLA writes the kernel's gradient in the kernel's own
    layout, where a dot over [batch, length] axes costs two transposed copies of the activations
    (a third of the step on CPU). A sharded length axis cannot be flattened into the batch without
    gathering it, so there the axes stay apart.
    """
    leading, out = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    width = math.prod(kernel.shape[:num_in])
    x, kernel = x.reshape(*leading, width), kernel.reshape(width, -1)
    if not _length_is_sharded():
        x = x.reshape(-1, width)
    return (x @ kernel).reshape(*leading, *out)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias in the dtype of x.

    The sum is in the bias's float32, so that the bias's gradient, a sum over all positions, is as
    well: in bfloat16 a sum of ones stops at 256.
    """
    return (x + bias).astype(x.dtype)


def _length_is_sharded() -> bool:
    return any(name == "length" and axis for name, axis in nn.get_logical_axis_rules())


class Dense(nn.Module):
    """A linear map from the last `num_in` axes to `shape_out`.

    Attributes:
      shape_out: axes of the output that replace the contracted ones.
      num_in: number of axes contracted.
      use_bias: whether a bias is added.
      init_scale: variance of the kernel, times fan-in; 0 initializes it to zero.
      spectral_norm: whether the kernel is divided by its largest singular value.
      dtype: dtype of the matmul.
    """

    shape_out: Sequence[int]
    num_in: int = 1
    use_bias: bool = False
    init_scale: float = 1.0
    spectral_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - self.num_in :], *self.shape_out)
        axes = range(len(shape))
        init = nn.initializers.zeros
        if self.init_scale:
            init = nn.initializers.variance_scaling(
                self.init_scale,
                "fan_in",
                "truncated_normal",
                in_axis=tuple(axes[: self.num_in]),
                out_axis=tuple(axes[self.num_in :]),
            )
        kernel = self.param("kernel", init, shape, jnp.float32)
        if self.spectral_norm:
            kernel = spectral_normalized(self, kernel)
        y = contract(x.astype(self.dtype), kernel.astype(self.dtype), self.num_in)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, tuple(self.shape_out), jnp.float32)
            y = add_bias(y, bias)
        return y


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last axis, computed in float32."""

    kind: str = "rmsnorm"
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        x = x.astype(jnp.float32)
        if self.kind == "layernorm":
            x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon) * scale
        if self.kind == "layernorm":
            x = x + self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        return x.astype(self.dtype)


def activate(hidden: jax.Array, gate: jax.Array | None, activation: str) -> jax.Array:
    """The activation of an MLP; `gate` is its gate, for the activations in GATED."""
    if activation in GATED:
        return hidden * (nn.silu(gate) if activation == "swiglu" else nn.gelu(gate))
    return nn.gelu(hidden) if activation == "gelu" else nn.relu(hidden)


class Mlp(nn.Module):
    """Two dense layers around an activation; a third gates it in SwiGLU, GeGLU (Shazeer 2020)."""

    hidden_dim: int
    activation: str = "swiglu"
    use_bias: bool = False
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(dim: int, name: str, scale: float = 1.0) -> Dense:
            return Dense(
                (dim,), use_bias=self.use_bias, init_scale=scale, dtype=self.dtype, name=name
            )

        hidden = dense(self.hidden_dim, "up")(x)
        gate = dense(self.hidden_dim, "gate")(x) if self.activation in GATED else None
        hidden = checkpoint_name(activate(hidden, gate, self.activation), "mlp_hidden")
        return dense(x.shape[-1], "down", self.out_scale)(hidden)
