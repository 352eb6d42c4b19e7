"""A short causal convolution over tokens, one filter per channel, and a delay."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class CausalConvolution(nn.Module):
    """y_t = bias + sum_i kernel_i x_{t - i}, over the tokens of the same document.

    Attributes:
      width: number of taps, among them the one for the token itself.
      use_bias: whether a bias is added.
    """

    width: int
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None = None,
        before: jax.Array | None = None,
    ) -> jax.Array:
        """Filters tokens.

        Args:
          x: [batch, length, channels].
          segment_ids: [batch, length], 0 for padding; None: one document.
          before: [batch, width - 1, channels], the inputs before these; zeros if None.

        Returns:
          [batch, length, channels], in the dtype of x.
        """
        channels, past = x.shape[-1], self.width - 1
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=0, out_axis=())
        kernel = self.param("kernel", init, (self.width, channels), jnp.float32)
        inputs = with_past(x, before, past).astype(jnp.float32)
        y = inputs[:, past:] * kernel[0]
        for i in range(1, self.width):
            earlier = inputs[:, past - i : inputs.shape[1] - i]
            y += _of_document(earlier, segment_ids, i) * kernel[i]
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return y.astype(x.dtype)


class Delay(nn.Module):
    """y_t = x_{t - tokens}, and 0 where that is another document.

    Attributes:
      tokens: at least 1.
    """

    tokens: int

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None = None,
        before: jax.Array | None = None,
    ) -> jax.Array:
        """Arguments and result are those of `CausalConvolution`, whose width is one more."""
        earlier = with_past(x, before, self.tokens)[:, : x.shape[1]]
        return _of_document(earlier, segment_ids, self.tokens)


def _of_document(earlier: jax.Array, segment_ids: jax.Array | None, back: int) -> jax.Array:
    """Values [batch, length, channels] of so many tokens back, 0 for those of another document."""
    if segment_ids is None:
        return earlier
    ids = jnp.pad(segment_ids, ((0, 0), (back, 0)), constant_values=-1)[:, : earlier.shape[1]]
    return jnp.where((ids == segment_ids)[..., None], earlier, 0)


def with_past(x: jax.Array, before: jax.Array | None, past: int) -> jax.Array:
    """x [batch, length, channels] after `before`, or after zeros: [batch, past + length, ...]."""
    if before is None:
        before = jnp.zeros((x.shape[0], past, x.shape[2]), x.dtype)
    return jnp.concatenate([before.astype(x.dtype), x], 1)


def inputs_after(x: jax.Array, before: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The inputs that a convolution must remember: [batch, past, channels].

    Args:
      x: [batch, length, channels], of which the first `lengths` [batch] are real; all if None.
      before: [batch, past, channels], what it remembered.
    """
    past, inputs = before.shape[1], with_past(x, before, before.shape[1])
    if lengths is None:
        return inputs[:, inputs.shape[1] - past :]
    places = lengths[:, None] + jnp.arange(past)
    return jnp.take_along_axis(inputs, places[..., None], 1)


def inputs_after_each(x: jax.Array, before: jax.Array) -> jax.Array:
    """The same after each token, [batch, length, past, channels]."""
    past, inputs = before.shape[1], with_past(x, before, before.shape[1])
    shifted = [inputs[:, i + 1 : i + 1 + x.shape[1]] for i in range(past)]
    return jnp.stack(shifted, 2) if shifted else jnp.zeros((*x.shape[:2], 0, x.shape[2]), x.dtype)
