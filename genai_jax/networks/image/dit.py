"""Diffusion transformers (Peebles and Xie 2023) for signals, images and video."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genai_jax.config import ConfigError, field
from genai_jax.networks.image import attention, conditioning
from genai_jax.networks.image.attention import Attention, Projection, attend
from genai_jax.networks.image.conditioning import Condition, ConditionEmbedding
from genai_jax.networks.layers.dense import Dense, Mlp
from genai_jax.networks.layers.positions import axial_rotation, axial_sinusoidal, rotary
from genai_jax.networks.parallel.axes import SEQUENCE, STAGE, ParallelConfig, axis_size
from genai_jax.networks.parallel.pipeline import pipeline
from genai_jax.networks.sequence.transformer import REMAT


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """Shapes and choices of a diffusion transformer."""

    patch_size: int = field(2, "side of a patch, in space; a patch has one frame", minimum=1)
    num_layers: int = field(4, "blocks", minimum=1)
    embed_dim: int = field(128, "width of the residual stream", minimum=1)
    num_heads: int = field(4, "attention heads", minimum=1)
    mlp_dim: int | None = field(None, "hidden width of the MLP; 4 embed_dim if unset", minimum=1)
    positions: str = field("sinusoidal", "of the patches", choices=("sinusoidal", "rope"))
    qk_norm: bool = field(False, "RMSNorm on queries and keys")
    text_mode: str = field(
        "cross", "how a text is read: cross-attention, or joint streams", choices=("cross", "joint")
    )
    text_layers: int = field(2, "blocks of the text encoder", minimum=0)
    dropout: float = field(0.0, "rate on the residual branches", minimum=0, maximum=1)
    scan_layers: bool = field(True, "one compiled block looped over; off unrolls it")
    remat: str = field("none", "what the backward pass recomputes", choices=tuple(REMAT))

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"--dit.embed_dim={self.embed_dim} is not divisible by "
                f"--dit.num_heads={self.num_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


TOKEN_AXES = ("batch", None, "length", "activation_embed")  # [batch, time, space, dim]


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm without parameters, then scale and shift of each example [batch, dim]."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-6)
    wide = lambda a: a.reshape(a.shape[0], *(1,) * (x.ndim - 2), a.shape[-1])
    return (y * (1 + wide(scale)) + wide(shift)).astype(x.dtype)


def gated(gate: jax.Array, update: jax.Array) -> jax.Array:
    return gate.reshape(gate.shape[0], *(1,) * (update.ndim - 2), -1).astype(update.dtype) * update


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the condition; all zero at first (adaLN-Zero)."""

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


class Block(nn.Module):
    """Attention in space, to the text, in time, and an MLP; tokens are [batch, time, space, dim].

    Time attention exists where there is more than one frame, cross-attention where there is a text.
    """

    config: DitConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(self, carry, vector, text, text_mask, rotations):
        c = self.config
        x, _ = carry
        batch, frames, points, dim = x.shape
        video = frames > 1
        dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        attends = lambda name, scale=1.0, parallel=self.parallel: Attention(
            c.num_heads, c.head_dim, c.qk_norm, scale, self.backend, self.dtype, parallel, name=name
        )
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *in_time = Modulation(
            9 if video else 6, dim, self.dtype, name="modulation"
        )(vector)

        normed = modulate(x, shift, scale).reshape(batch * frames, points, dim)
        update = attends("attention")(normed, rotate_by=rotations[0]).reshape(x.shape)
        x = x + dropout(gated(gate, checkpoint_name(update, "attention")))
        if text is not None:
            zero = jnp.zeros_like(shift)
            normed = modulate(x, zero, zero).reshape(batch, frames * points, dim)
            # Its output starts at zero in place of a gate.
            update = attends("cross_attention", 0.0)(normed, text, text_mask)
            x = x + dropout(update.reshape(x.shape))
        if video:
            normed = modulate(x, *in_time[:2]).swapaxes(1, 2).reshape(-1, frames, dim)
            update = attends("time_attention", parallel=None)(normed, rotate_by=rotations[1])
            update = update.reshape(batch, points, frames, dim).swapaxes(1, 2)
            x = x + dropout(gated(in_time[2], update))
        mlp = Mlp(c.mlp_dim or 4 * dim, "gelu", True, 1.0, self.dtype, name="mlp")
        x = x + dropout(gated(mlp_gate, mlp(modulate(x, mlp_shift, mlp_scale))))
        return (nn.with_logical_constraint(x, TOKEN_AXES), None), None


class JointBlock(nn.Module):
    """Two streams, image and text, with weights of their own in one attention (Esser et al. 2024).

    The tokens of the image are [batch, 1, space, dim], those of the text [batch, length, dim].
    """

    config: DitConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(self, carry, vector, text, text_mask, rotations):
        c = self.config
        image, text = carry
        batch, _, points, dim = image.shape
        dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        streams, modulations, projected = {"image": image[:, 0], "text": text}, {}, []
        for name, x in streams.items():
            parts = Modulation(6, dim, self.dtype, name=f"{name}_modulation")(vector)
            normed = modulate(x, *parts[:2])
            q, k, v = Projection(
                c.num_heads, c.head_dim, c.qk_norm, self.dtype, name=f"{name}_attention"
            )(normed, normed)
            if name == "image" and rotations[0] is not None:
                q, k = rotary(q, rotations[0]), rotary(k, rotations[0])
            modulations[name] = parts
            projected.append((q, k, v))
        q, k, v = (jnp.concatenate(pair, 1) for pair in zip(*projected, strict=True))
        exists = jnp.concatenate([jnp.ones((batch, points), bool), text_mask], 1)
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
        return (image, streams["text"]), None


class Dit(nn.Module):
    """Patches, blocks, and back: a fresh network puts out exactly 0.

    Attributes:
      config: shapes.
      channels_out: of the output.
      label_sizes: number of values of each attribute of the labels; empty for none.
      vocab_size: of the text; 0 for none.
      uses_step_size: whether the size of a solver's step is an input.
      backend: of the attention.
      dtype: of the matmuls.
      parallel: how the tokens of an image or a signal are split over the sequence axis, and the
        blocks over the stages of a pipeline.
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
          condition: what the examples are to show.
          step_size: [batch] in [0, 1].
        """
        c = self.config
        tokens, grid, frames = patches(x, c.patch_size)
        embedded = ConditionEmbedding(
            c.embed_dim, self.label_sizes, self.vocab_size, c.text_layers, c.num_heads,
            self.uses_step_size, self.backend, self.dtype, name="condition",
        )(noise, condition, step_size)  # fmt: skip
        joint = self.vocab_size > 0 and c.text_mode == "joint"
        if joint and frames > 1:
            raise ValueError("--dit.text_mode=joint is for images and signals; video takes cross")
        self._check_sequence(tokens.shape[2], "joint text" if joint else "video" * (frames > 1))
        h = Dense((c.embed_dim,), use_bias=True, dtype=self.dtype, name="patch_embed")(tokens)
        rotations = (None, None)
        if c.positions == "rope":
            rotations = axial_rotation(grid, c.head_dim), axial_rotation((frames,), c.head_dim)
        else:
            h = h + axial_sinusoidal(grid, c.embed_dim).astype(self.dtype)
            if frames > 1:
                in_time = axial_sinusoidal((frames,), c.embed_dim)[:, None]
                h = h + in_time.astype(self.dtype)
        h = nn.with_logical_constraint(h, TOKEN_AXES)
        text = embedded.text
        context = embedded.vector, None if joint else text, embedded.text_mask
        h, _ = self._apply_blocks(
            JointBlock if joint else Block, (h, text if joint else None), context, rotations
        )
        shift, scale = Modulation(2, c.embed_dim, self.dtype, name="final_modulation")(
            embedded.vector
        )
        width = c.patch_size ** len(grid) * self.channels_out
        out = Dense((width,), use_bias=True, init_scale=0.0, dtype=self.dtype, name="patch_out")(
            modulate(h, shift, scale)
        )
        space = x.shape[1:-1]
        return joined(out.astype(jnp.float32), space, c.patch_size, self.channels_out)

    def _check_sequence(self, points: int, unfit: str):
        """Raises `ConfigError` for tokens that the sequence axis cannot split."""
        size = axis_size(SEQUENCE)
        if size == 1:
            return
        if unfit:
            raise ConfigError(f"--mesh.sequence={size} does not split {unfit} of a DiT")
        if points % size:
            raise ConfigError(
                f"{points} tokens of --dit.patch_size={self.config.patch_size} are not divisible "
                f"by --mesh.sequence={size}"
            )

    def _apply_blocks(self, block, carry, context, rotations):
        """The carry behind all blocks, over the stages of a pipeline if there are any."""
        if axis_size(STAGE) == 1 or self.is_initializing():
            return self._stack(block, self.config.num_layers, name="blocks")(
                carry, *context, rotations
            )[0]

        def apply_layers(params, carry, context, key):
            count, once = jax.tree.leaves(params)[0].shape[0], self.parallel.repeats == 1
            stack = self._stack(block, count, remat=once, parent=None)
            rngs = {} if key is None else {"dropout": key}
            return stack.apply({"params": params}, carry, *context, rotations, rngs=rngs)[0]

        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        params = self.variables["params"]["blocks"]
        policy = REMAT[self.config.remat]
        return pipeline(apply_layers, params, carry, context, self.parallel, key, policy)

    def _stack(self, block, count: int, remat: bool = True, **options) -> nn.Module:
        """`count` blocks, one after the other."""
        c = self.config
        if remat and c.remat != "none":
            block = nn.remat(block, policy=REMAT[c.remat], prevent_cse=not c.scan_layers)
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 4,
            length=count,
            unroll=1 if c.scan_layers else count,
        )(c, self.backend, self.dtype, self.parallel, **options)


def patches(x: jax.Array, size: int) -> tuple[jax.Array, tuple[int, ...], int]:
    """Cuts x [batch, *space, channels] into tokens [batch, time, points, size^space * channels].

    Returns:
      The tokens, the grid of the points within a frame, and the number of frames: 1 unless x has
      three axes of space, of which the first is time.

    Raises:
      ValueError: a size that patches do not divide.
    """
    space = x.shape[1:-1]
    frames, inner = (space[0], space[1:]) if len(space) == 3 else (1, space)
    if any(n % size for n in inner):
        shape = "x".join(map(str, inner))
        raise ValueError(f"--dit.patch_size={size} does not divide the size {shape}")
    grid = tuple(n // size for n in inner)
    split = [part for n in grid for part in (n, size)]
    x = x.reshape(x.shape[0], frames, *split, x.shape[-1])
    count = len(grid)
    order = [0, 1, *range(2, 2 + 2 * count, 2), *range(3, 3 + 2 * count, 2), 2 + 2 * count]
    points = 1
    for n in grid:
        points *= n
    return x.transpose(order).reshape(x.shape[0], frames, points, -1), grid, frames


def joined(tokens: jax.Array, space: tuple[int, ...], size: int, channels: int) -> jax.Array:
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

# Parameter path -> logical axes. The first pattern found in the path decides.
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
