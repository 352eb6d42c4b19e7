"""Diffusion transformers (Peebles and Xie 2023) for signals, images and video."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genai_jax.config import ConfigError, field
from genai_jax.networks.image import attention, conditioning
from genai_jax.networks.image.attention import Attention, Projection, attend
from genai_jax.networks.image.conditioning import Condition, ConditionEmbedding
from genai_jax.networks.layers.dense import Dense, Mlp
from genai_jax.networks.layers.positions import (
    Rotation,
    axial_rotation,
    axial_sinusoidal,
    rotary,
)
from genai_jax.networks.parallel.axes import SEQUENCE, ParallelConfig, axis_size, describe_axis
from genai_jax.networks.sequence.stack import REMAT, BlockStack


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """Shapes and choices of a diffusion transformer."""

    patch_size: int = field(
        2, "Side of a square patch in pixels; a patch never spans several frames.", minimum=1
    )
    num_layers: int = field(4, "Number of blocks.", minimum=1)
    embed_dim: int = field(128, "Width of the residual stream.", minimum=1)
    num_heads: int = field(4, "Number of attention heads.", minimum=1)
    mlp_dim: int | None = field(None, "Hidden width of the MLP; 4 embed_dim if unset.", minimum=1)
    positions: str = field(
        "sinusoidal", "How positions of patches are encoded.", choices=("sinusoidal", "rope")
    )
    qk_norm: bool = field(False, "Whether queries and keys pass through an RMSNorm.")
    text_mode: str = field(
        "cross",
        "How images attend to text: cross-attention, or one joint attention of two streams.",
        choices=("cross", "joint"),
    )
    text_layers: int = field(2, "Number of blocks of the text encoder.", minimum=0)
    dropout: float = field(0.0, "Dropout rate of the residual branches.", minimum=0, maximum=1)
    scan_layers: bool = field(
        True, "Whether one compiled block is looped over; otherwise all blocks are unrolled."
    )
    remat: str = field(
        "none", "What the backward pass recomputes instead of storing it.", choices=tuple(REMAT)
    )

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


TOKEN_AXES = ("batch", None, "length", "activation_embed")  # [batch, time, space, dim]


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm without parameters, then a scale and a shift per example, [batch, dim]."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-6)
    wide = lambda a: a.reshape(a.shape[0], *(1,) * (x.ndim - 2), a.shape[-1])
    return (y * (1 + wide(scale)) + wide(shift)).astype(x.dtype)


def gated(gate: jax.Array, update: jax.Array) -> jax.Array:
    wide = gate.reshape(gate.shape[0], *(1,) * (update.ndim - 2), -1)
    return (wide * update).astype(update.dtype)


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the condition, initially zero (adaLN-Zero)."""

    count: int
    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, vector: jax.Array) -> list[jax.Array]:
        out = Dense(
            (self.count, self.dim), use_bias=True, init_scale=0.0, dtype=self.dtype, name="dense"
        )(nn.silu(vector))
        out = nn.with_logical_constraint(
            out.astype(jnp.float32), ("batch", None, "activation_embed")
        )
        return [out[:, i] for i in range(self.count)]


class DitContext(NamedTuple):
    """What every block receives beside its tokens."""

    vector: jax.Array  # [batch, dim], the embedded condition
    text: jax.Array | None  # [batch, text_length, dim], for cross-attention
    text_mask: jax.Array | None  # [batch, text_length] bool
    space_rotation: Rotation | None = None
    time_rotation: Rotation | None = None


class Block(nn.Module):
    """Attention in space, to the text, in time, and an MLP; tokens are [batch, time, space, dim].

    Time attention exists if there is more than one frame, cross-attention if there is a text.
    """

    config: DitConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(self, x: jax.Array, state: None, context: DitContext):
        c, text = self.config, context.text
        batch, frames, points, dim = x.shape
        video = frames > 1
        dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        make_attention = lambda name, scale=1.0, parallel=self.parallel: Attention(
            c.num_heads, c.head_dim, c.qk_norm, scale, self.backend, self.dtype, parallel, name=name
        )
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *in_time = Modulation(
            9 if video else 6, dim, self.dtype, name="modulation"
        )(context.vector)

        normed = modulate(x, shift, scale).reshape(batch * frames, points, dim)
        update = make_attention("attention")(normed, rotate_by=context.space_rotation).reshape(
            x.shape
        )
        x = x + dropout(gated(gate, checkpoint_name(update, "attention")))
        if text is not None:
            zero = jnp.zeros_like(shift)
            normed = modulate(x, zero, zero).reshape(batch, frames * points, dim)
            # Its output is initialized to zero, which replaces a gate.
            update = make_attention("cross_attention", 0.0)(normed, text, context.text_mask)
            x = x + dropout(update.reshape(x.shape))
        if video:
            normed = modulate(x, *in_time[:2]).swapaxes(1, 2).reshape(-1, frames, dim)
            time_attention = make_attention("time_attention", parallel=None)
            update = time_attention(normed, rotate_by=context.time_rotation)
            update = update.reshape(batch, points, frames, dim).swapaxes(1, 2)
            x = x + dropout(gated(in_time[2], update))
        mlp = Mlp(c.mlp_dim or 4 * dim, "gelu", True, 1.0, self.dtype, name="mlp")
        x = x + dropout(gated(mlp_gate, mlp(modulate(x, mlp_shift, mlp_scale))))
        return nn.with_logical_constraint(x, TOKEN_AXES), state


class JointBlock(nn.Module):
    """Two streams, image and text, with separate weights in one attention (Esser et al. 2024).

    The tokens of the image are [batch, 1, space, dim], those of the text [batch, length, dim].
    """

    config: DitConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(self, tokens: tuple[jax.Array, jax.Array], state: None, context: DitContext):
        c = self.config
        image, text = tokens
        batch, _, points, dim = image.shape
        dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        streams, modulations, projected = {"image": image[:, 0], "text": text}, {}, []
        for name, x in streams.items():
            parts = Modulation(6, dim, self.dtype, name=f"{name}_modulation")(context.vector)
            normed = modulate(x, *parts[:2])
            q, k, v = Projection(
                c.num_heads, c.head_dim, c.qk_norm, self.dtype, name=f"{name}_attention"
            )(normed, normed)
            if name == "image" and context.space_rotation is not None:
                q, k = (rotary(a, context.space_rotation) for a in (q, k))
            modulations[name] = parts
            projected.append((q, k, v))
        q, k, v = (jnp.concatenate(pair, 1) for pair in zip(*projected, strict=True))
        exists = jnp.concatenate([jnp.ones((batch, points), bool), context.text_mask], 1)
        mixed = jnp.split(attend(q, k, v, exists, self.backend), [points], 1)
        for (name, x), part in zip(streams.items(), mixed, strict=True):
            _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulations[name]
            update = Dense(
                (dim,), 2, use_bias=True, dtype=self.dtype, name=f"{name}_attention_out"
            )(checkpoint_name(part, "attention"))
            x = x + dropout(gated(gate, update))
            mlp = Mlp(c.mlp_dim or 4 * dim, "gelu", True, 1.0, self.dtype, name=f"{name}_mlp")
            streams[name] = x + dropout(gated(mlp_gate, mlp(modulate(x, mlp_shift, mlp_scale))))
        image = nn.with_logical_constraint(streams["image"][:, None], TOKEN_AXES)
        return (image, streams["text"]), state


class Dit(nn.Module):
    """Patches, blocks, and back; the output of a freshly initialized network is exactly 0.

    Attributes:
      config: shapes and choices.
      channels_out: channels of the output.
      label_sizes: number of values of each attribute of the labels; empty without labels.
      vocab_size: vocabulary of the text; 0 without text.
      uses_step_size: whether the step size of a solver is an input.
      backend: backend of the attention.
      dtype: dtype of the matmuls.
      parallel: how the tokens of an image or a signal are split over the mesh axis `sequence`, and
        the blocks over the stages of a pipeline.
    """

    config: DitConfig
    channels_out: int
    label_sizes: tuple[int, ...] = ()
    vocab_size: int = 0
    uses_step_size: bool = False
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        noise: jax.Array,
        condition: Condition = Condition(),  # noqa: B008 (a tuple)
        step_size: jax.Array | None = None,
    ) -> jax.Array:
        """[batch, *space, channels] -> [batch, *space, channels_out], float32.

        Dropout acts when an rng named "dropout" is given.

        Args:
          x: a signal [batch, length, channels], an image, or a video [batch, time, height, width,
            channels].
          noise: [batch], the noise level as a number of the order of 1000.
          condition: what the examples should show.
          step_size: [batch] in [0, 1].

        Raises:
          ValueError: the patches do not divide the image, or a video with joint text streams.
          ConfigError: tokens that the mesh axis `sequence` does not divide.
        """
        c = self.config
        tokens, grid, frames = patches(x, c.patch_size)
        embedded = ConditionEmbedding(
            c.embed_dim, self.label_sizes, self.vocab_size, c.text_layers, c.num_heads,
            self.uses_step_size, self.backend, self.dtype, name="condition",
        )(noise, condition, step_size)  # fmt: skip
        joint = self.vocab_size > 0 and c.text_mode == "joint"
        if joint and frames > 1:
            raise ValueError("joint text streams are for images and signals; video needs cross")
        self._check_sequence(tokens.shape[2], "joint text" if joint else "video" * (frames > 1))
        h = Dense((c.embed_dim,), use_bias=True, dtype=self.dtype, name="patch_embed")(tokens)
        h = nn.with_logical_constraint(self._add_positions(h, grid, frames), TOKEN_AXES)
        context = DitContext(embedded.vector, None if joint else embedded.text, embedded.text_mask)
        stack = self._stack(JointBlock if joint else Block)
        rotate = functools.partial(self._add_rotations, grid=grid, frames=frames)
        streams = (h, embedded.text) if joint else h
        streams, _ = stack.run(stack.module(name="blocks"), streams, context, complete=rotate)
        h = streams[0] if joint else streams
        shift, scale = Modulation(2, c.embed_dim, self.dtype, name="final_modulation")(
            embedded.vector
        )
        width = c.patch_size ** len(grid) * self.channels_out
        out = Dense((width,), use_bias=True, init_scale=0.0, dtype=self.dtype, name="patch_out")(
            modulate(h, shift, scale)
        )
        space = x.shape[1:-1]
        return unpatchify(out.astype(jnp.float32), space, c.patch_size, self.channels_out)

    def _check_sequence(self, points: int, unfit: str):
        """Raises `ConfigError` for tokens that the mesh axis `sequence` cannot split."""
        size = axis_size(SEQUENCE)
        if size == 1:
            return
        if unfit:
            raise ConfigError(f"{describe_axis(SEQUENCE)} does not split {unfit} of a DiT")
        if points % size:
            raise ConfigError(
                f"{points} patches of size {self.config.patch_size} are not divisible by "
                f"{describe_axis(SEQUENCE)}"
            )

    def _add_positions(self, h: jax.Array, grid: tuple[int, ...], frames: int) -> jax.Array:
        c = self.config
        if c.positions != "sinusoidal":
            return h
        h = h + axial_sinusoidal(grid, c.embed_dim).astype(self.dtype)
        if frames > 1:
            h = h + axial_sinusoidal((frames,), c.embed_dim)[:, None].astype(self.dtype)
        return h

    def _stack(self, block: type[nn.Module]) -> BlockStack:
        c = self.config
        make = functools.partial(
            block, config=c, backend=self.backend, dtype=self.dtype, parallel=self.parallel
        )
        return BlockStack((make,), c.num_layers, c.scan_layers, c.remat, self.parallel)

    def _add_rotations(self, context: DitContext, grid: tuple[int, ...], frames: int) -> DitContext:
        c = self.config
        if c.positions != "rope":
            return context
        return context._replace(
            space_rotation=axial_rotation(grid, c.head_dim),
            time_rotation=axial_rotation((frames,), c.head_dim),
        )


def patches(x: jax.Array, size: int) -> tuple[jax.Array, tuple[int, ...], int]:
    """Cuts x [batch, *space, channels] into tokens [batch, time, points, size^space * channels].

    Returns:
      The tokens, the grid of points within a frame, and the number of frames: 1 unless x has three
      axes of space, of which the first is time.

    Raises:
      ValueError: the patches do not divide a size.
    """
    space = x.shape[1:-1]
    frames, inner = (space[0], space[1:]) if len(space) == 3 else (1, space)
    if any(n % size for n in inner):
        shape = "x".join(map(str, inner))
        raise ValueError(f"patch_size={size} does not divide the size {shape}")
    grid = tuple(n // size for n in inner)
    split = [part for n in grid for part in (n, size)]
    x = x.reshape(x.shape[0], frames, *split, x.shape[-1])
    count = len(grid)
    order = [0, 1, *range(2, 2 + 2 * count, 2), *range(3, 3 + 2 * count, 2), 2 + 2 * count]
    points = 1
    for n in grid:
        points *= n
    return x.transpose(order).reshape(x.shape[0], frames, points, -1), grid, frames


def unpatchify(tokens: jax.Array, space: tuple[int, ...], size: int, channels: int) -> jax.Array:
    """The inverse of `patches`: [batch, *space, channels]."""
    inner = space[1:] if len(space) == 3 else space
    grid, count = tuple(n // size for n in inner), len(inner)
    x = tokens.reshape(tokens.shape[0], tokens.shape[1], *grid, *(size,) * count, channels)
    order = [0, 1, *(axis for i in range(count) for axis in (2 + i, 2 + count + i)), 2 + 2 * count]
    return x.transpose(order).reshape(tokens.shape[0], *space, channels)


_BLOCK = (
    *attention.PARTITION_RULES,
    (r"attention_out/kernel", ("heads", "head_dim", "embed")),
    (r"attention_out/bias", ("embed",)),
    *conditioning.MLP_RULES,
    (r"modulation/dense/kernel", ("embed", None, "mlp")),
    (r"modulation/dense/bias", (None, "mlp")),
)

# Parameter path -> logical axes. The first pattern that matches in the path decides.
PARTITION_RULES = (
    *((f"condition/{path}", axes) for path, axes in conditioning.PARTITION_RULES),
    *attention.stacked("blocks/", _BLOCK, "layers"),
    (r"final_modulation/dense/kernel", ("embed", None, "mlp")),
    (r"final_modulation/dense/bias", (None, "mlp")),
    (r"patch_embed/kernel", (None, "embed")),
    (r"patch_embed/bias", ("embed",)),
    (r"patch_out/kernel", ("embed", None)),
    (r"patch_out/bias", (None,)),
)
