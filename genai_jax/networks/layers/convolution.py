"""Spatial layers for arrays [batch, *space, channels] with one, two or three spatial axes."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.networks.layers.dense import add_bias
from genai_jax.networks.layers.spectral import spectral_normalized


class Conv(nn.Module):
    """A convolution whose output size is the input size divided by the strides, rounded up.

    Attributes:
      features: channels of the output.
      kernel_size: size along each spatial axis.
      strides: stride along each spatial axis; 1 if None.
      init_scale: initial variance of the kernel, times fan-in; 0 for zeros.
      spectral_norm: whether the kernel is divided by its largest singular value.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] | None = None
    use_bias: bool = True
    init_scale: float = 1.0
    spectral_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        if self.init_scale:
            init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        else:
            init = nn.initializers.zeros
        kernel = self.param("kernel", init, shape, jnp.float32)
        if self.spectral_norm:
            kernel = spectral_normalized(self, kernel)
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.strides)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = add_bias(y, bias)
        return y


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int] | None = None) -> jax.Array:
    """Convolves [batch, *space, channels] with [*size, channels, features], with "SAME" padding."""
    space = x.ndim - 2
    strides = tuple(strides or (1,) * space)
    if math.prod(kernel.shape[:-2]) == 1 and math.prod(strides) == 1:
        y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])
        return y.reshape(*x.shape[:-1], kernel.shape[-1])
    letters = "TDHW"[-space:]
    layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)


class GroupNorm(nn.Module):
    """Group normalization (Wu and He 2018) over space and the channels of a group, in float32.

    Attributes:
      max_groups: largest number of groups; fewer if they would not divide the channels, or would
        have fewer than four channels.
      affine: whether to learn a scale and a bias per channel.
    """

    max_groups: int = 32
    epsilon: float = 1e-5
    affine: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        # At least four channels per group: in tiny networks, groups of one would lose their mean.
        groups = math.gcd(max(1, min(self.max_groups, channels // 4)), channels)
        grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, channels // groups)
        mean = jnp.mean(grouped, (1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(grouped - mean), (1, 3), keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        if self.affine:
            y = y * self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
            y = y + self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return y.astype(self.dtype)


def upsample(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Repeats every element `factors` times along the spatial axes."""
    # In float32, in which the gradients of the copies are then summed.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for axis, factor in enumerate(factors, start=1):
        if factor > 1:
            wide = jnp.repeat(wide, factor, axis)
    return wide.astype(x.dtype)


def downsample(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Averages blocks of `factors` elements; the sizes must be multiples of the factors."""
    for axis, factor in enumerate(factors, start=1):
        shape = (*x.shape[:axis], x.shape[axis] // factor, factor, *x.shape[axis + 1 :])
        x = jnp.mean(x.reshape(shape), axis + 1)
    return x
