"""Attention to few of the earlier tokens: every n-th one, or whole blocks of them."""

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from genai_jax.networks.parallel.axes import SEQUENCE, axis_size
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.attention import Attention
from genai_jax.networks.sequence.mixers.protocol import TokenContext
from genai_jax.networks.sequence.sparse_masks import BlockSparse, Dilated


class DilatedAttention(Attention):
    """Attention to a token and every n-th one before it, n the dilation (Beltagy et al. 2020).

    With a window there are so many of them; without one, this is the strided pattern of Child et
    al. 2019. Tokens at the same place modulo n see each other only, so that they are put beside
    each other, and the cost is that of rows which are n times shorter.
    """

    @staticmethod
    def own_mask(config: TransformerConfig) -> kernels_pallas.Mask:
        return Dilated(config.dilation_step, config.window)

    @staticmethod
    def reach(config: TransformerConfig) -> int | None:
        return None if config.window is None else config.window * config.dilation_step

    @staticmethod
    def sinks_of(config: TransformerConfig) -> int:
        return 0

    def _attend(self, q, k, v, context: TokenContext) -> jax.Array:
        step, length = self.config.dilation_step, q.shape[1]
        if context.mask is not None or axis_size(SEQUENCE) > 1:
            return super()._attend(q, k, v, context)
        apart = lambda a: _apart(a, step)
        segments = context.segment_ids
        mask, slopes = kernels_pallas.Causal(), self._slopes()
        if self.config.window is not None:
            mask &= kernels_pallas.Window(self.config.window, 0)
        out = kernels_pallas.attention(
            apart(q), apart(k), apart(v), mask=mask, scale=self.config.self_attention_scale,
            segment_ids=None if segments is None else apart(segments),
            bias=self._bias(context, slopes, step),
            logits_soft_cap=self.config.attention_soft_cap, backend=self.backend,
        )  # fmt: skip
        return _together(out, step, length)

    def _bias(self, context: TokenContext, slopes, step: int):
        """Biases between tokens that are `step` times as far apart as they are in their row."""
        if context.relative is not None:
            return context.relative.matrix[..., ::step, ::step]
        return None if slopes is None else kernels_pallas.Alibi(step * slopes)

    @staticmethod
    def flops(config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        earlier = np.arange(length) // config.dilation_step
        if config.window is not None:
            earlier = np.minimum(earlier, config.window)
        return _flops(config, length, layers, earlier)


class BlockSparseAttention(Attention):
    """Attention to the blocks of a row that `BlockSparse` says.

    Blocks are counted from the beginning of a row, also where it has several documents.
    """

    @staticmethod
    def own_mask(config: TransformerConfig) -> kernels_pallas.Mask:
        return BlockSparse(config.block_width, config.blocks_near, config.blocks_apart)

    @staticmethod
    def reach(config: TransformerConfig) -> int | None:
        return None

    @staticmethod
    def sinks_of(config: TransformerConfig) -> int:
        return 0

    @staticmethod
    def flops(config: TransformerConfig, length: int, layers: int) -> dict[str, float]:
        size, near, stride = config.block_width, config.blocks_near, config.blocks_apart
        places = np.arange(length)
        own = places // size
        far = np.maximum(own - near, 0)  # blocks further away, of which every stride-th is seen
        seen = own - far + -(-far // stride)
        return _flops(config, length, layers, seen * size + places % size)


def _flops(config: TransformerConfig, length: int, layers: int, earlier: np.ndarray) -> dict:
    """As `Attention.flops`, where a token sees so many before it; the diagonal counts half."""
    full = Attention.flops(config, length, layers)
    heads = config.num_heads * config.head_width
    return full | {"attention": 4 * layers * heads * (float(np.mean(earlier)) + 0.5)}


def _apart(a: jax.Array, step: int) -> jax.Array:
    """[batch, length, ...] -> [batch x step, ceil(length / step), ...], a row for each remainder.

    Padding, with zeros, comes last.
    """
    batch, length = a.shape[:2]
    a = jnp.pad(a, ((0, 0), (0, -length % step), *((0, 0),) * (a.ndim - 2)))
    a = a.reshape(batch, -1, step, *a.shape[2:])
    return jnp.swapaxes(a, 1, 2).reshape(batch * step, -1, *a.shape[3:])


def _together(a: jax.Array, step: int, length: int) -> jax.Array:
    """The inverse of `_apart`."""
    a = jnp.swapaxes(a.reshape(-1, step, *a.shape[1:]), 1, 2)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]
