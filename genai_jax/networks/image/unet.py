"""U-Nets for signals, images and video, similar to DDPM++ (Song et al. 2021) and ADM.

The blocks of a level are identical: only the convolutions between levels change the channels. So
each level is a single compiled block in a loop, and compile time does not grow with depth.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.networks.image import attention, conditioning
from genai_jax.networks.image.attention import Attention
from genai_jax.networks.image.conditioning import Condition, ConditionEmbedding
from genai_jax.networks.layers.convolution import Conv, GroupNorm, upsample
from genai_jax.networks.layers.dense import Dense, add_bias
from genai_jax.networks.sequence.stack import REMAT


@dataclasses.dataclass(frozen=True)
class UnetConfig:
    """Shapes and choices of a U-Net."""

    channels: int = field(64, "Channels at full resolution.", minimum=4)
    channel_multipliers: str = field(
        "1,2,2", "Channels of each level as multiples of `channels`, comma-separated."
    )
    blocks_per_level: int = field(2, "Residual blocks per level of the encoder.", minimum=1)
    attention_resolutions: str = field(
        "16,8", "Resolutions (largest spatial size) of blocks with attention, comma-separated."
    )
    head_dim: int = field(32, "Width of an attention head.", minimum=1)
    embed_dim: int | None = field(
        None, "Width of the condition's embedding; 4 times `channels` if unset.", minimum=4
    )
    text_layers: int = field(2, "Blocks of the text encoder.", minimum=0)
    dropout: float = field(0.0, "Dropout rate in residual blocks.", minimum=0, maximum=1)
    scan_blocks: bool = field(
        True,
        "Compile one block per level and run it in a loop; turning it off unrolls the loop, which "
        "is much faster on CPUs.",
    )
    remat: str = field("none", "What the backward pass recomputes.", choices=tuple(REMAT))

    def __post_init__(self):
        self._numbers("channel_multipliers", float)
        self._numbers("attention_resolutions", int)

    def _numbers(self, name: str, kind: type) -> tuple:
        text = getattr(self, name)
        try:
            values = tuple(kind(x) for x in text.split(",") if x.strip())
        except ValueError:
            values = (-1,)
        if any(v <= 0 for v in values) or (name == "channel_multipliers" and not values):
            raise ValueError(f"{name}={text} is not a comma-separated list of positive numbers")
        return values

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(round(self.channels * m) for m in self._numbers("channel_multipliers", float))

    @property
    def attends_at(self) -> tuple[int, ...]:
        return self._numbers("attention_resolutions", int)


class Block(nn.Module):
    """Two convolutions with adaptive group norm in between, followed by attention if `attends`.

    With three spatial axes the first is time: convolutions act within frames, and blocks with
    attention also attend over time.
    """

    config: UnetConfig
    channels: int
    attends: bool
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, vector, text, text_mask) -> jax.Array:
        c = self.config
        h = nn.silu(GroupNorm(dtype=self.dtype, name="norm_in")(x))
        h = Conv(self.channels, kernel_size(x.ndim - 2), dtype=self.dtype, name="conv_in")(h)
        modulation = Dense((2, self.channels), use_bias=True, dtype=self.dtype, name="modulation")(
            nn.silu(vector)
        ).astype(jnp.float32)
        scale, shift = modulation[:, 0], modulation[:, 1]
        wide = lambda a: a.reshape(a.shape[0], *(1,) * (x.ndim - 2), -1)
        h = GroupNorm(affine=False, name="norm_out")(h)
        h = nn.silu(h * (1 + wide(scale)) + wide(shift)).astype(self.dtype)
        h = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = Conv(
            self.channels, kernel_size(x.ndim - 2), init_scale=0.0, dtype=self.dtype,
            name="conv_out",
        )(h)  # fmt: skip
        if x.shape[-1] != self.channels:
            one = (1,) * (x.ndim - 2)
            x = Conv(self.channels, one, dtype=self.dtype, name="shortcut")(x)
        x = (x + h) / math.sqrt(2)
        if self.attends:
            x = self._attend(x, text, text_mask)
        return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 2), "activation_embed"))

    def _attend(self, x, text, text_mask):
        batch, channels = x.shape[0], x.shape[-1]
        heads = max(1, channels // self.config.head_dim)
        if channels % heads:
            raise ValueError(
                f"{channels} channels cannot be divided into {heads} heads of about "
                f"head_dim={self.config.head_dim}"
            )
        attend = lambda name: Attention(
            heads, channels // heads, out_scale=0.0, backend=self.backend, dtype=self.dtype,
            name=name,
        )  # fmt: skip
        frames = x.shape[1] if x.ndim == 5 else 1
        norm = lambda name, x: GroupNorm(dtype=self.dtype, name=name)(x)
        tokens = norm("attention_norm", x).reshape(batch * frames, -1, channels)
        x = x + attend("attention")(tokens).reshape(x.shape)
        if text is not None:
            tokens = norm("cross_attention_norm", x).reshape(batch, -1, channels)
            x = x + attend("cross_attention")(tokens, text, text_mask).reshape(x.shape)
        if frames > 1:
            tokens = norm("time_attention_norm", x).reshape(batch, frames, -1, channels)
            points = tokens.shape[2]
            tokens = tokens.swapaxes(1, 2).reshape(-1, frames, channels)
            embedding = self.param(
                "frame_embedding", nn.initializers.normal(0.02), (frames, channels), jnp.float32
            )
            update = attend("time_attention")(add_bias(tokens, embedding))
            update = update.reshape(batch, points, frames, channels).swapaxes(1, 2)
            x = x + update.reshape(x.shape)
        return x


class DownBlock(nn.Module):
    """A block whose output also feeds a skip connection."""

    arguments: tuple
    block: type = Block

    @nn.compact
    def __call__(self, x, *context):
        x = self.block(*self.arguments, name="block")(x, *context)
        return x, x


class UpBlock(nn.Module):
    """A block whose input is concatenated with a skip connection."""

    arguments: tuple
    block: type = Block

    @nn.compact
    def __call__(self, x, skip, *context):
        x = jnp.concatenate([x, skip], -1)
        return self.block(*self.arguments, name="block")(x, *context), None


class Unet(nn.Module):
    """A U-Net; see the module. Its output is exactly 0 at initialization.

    The attributes are those of `Dit`.
    """

    config: UnetConfig
    channels_out: int
    label_sizes: tuple[int, ...] = ()
    vocab_size: int = 0
    uses_step_size: bool = False
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        noise: jax.Array,
        condition: Condition = Condition(),  # noqa: B008 (a tuple)
        step_size: jax.Array | None = None,
    ) -> jax.Array:
        """[batch, *space, channels] -> [batch, *space, channels_out], float32; see `Dit`."""
        c = self.config
        space = x.shape[1:-1]
        steps = _strides(len(space))
        check_size(space, len(c.level_channels))
        embed_dim = c.embed_dim or 4 * c.channels
        if self.vocab_size and embed_dim % c.head_dim:
            raise ValueError(
                f"head_dim={c.head_dim} does not divide the width {embed_dim} of the embedding"
            )
        embedded = ConditionEmbedding(
            embed_dim, self.label_sizes, self.vocab_size, c.text_layers, embed_dim // c.head_dim,
            self.uses_step_size, self.backend, self.dtype, name="condition",
        )(noise, condition, step_size)  # fmt: skip
        kernel = kernel_size(len(space))
        conv = lambda features, name, **kw: Conv(
            features, kernel, dtype=self.dtype, name=name, **kw
        )
        h = conv(c.level_channels[0], "conv_in")(x)
        skips = []
        for level, channels in enumerate(c.level_channels):
            if level:
                h = conv(channels, f"down_{level}", strides=steps)(h)
            first = h
            h, outputs = self._level(
                DownBlock, f"encoder_{level}", h, channels, c.blocks_per_level
            )(h, *embedded)
            skips.append(jnp.concatenate([first[None], outputs]))
        for i, attends in enumerate((True, False)):
            arguments = (c, c.level_channels[-1], attends, self.backend, self.dtype)
            h = self._block()(*arguments, name=f"middle_{i}")(h, *embedded)
        for level, channels in reversed(list(enumerate(c.level_channels))):
            blocks = c.blocks_per_level + 1
            h, _ = self._level(UpBlock, f"decoder_{level}", h, channels, blocks)(
                h, skips[level][::-1], *embedded
            )
            if level:
                h = conv(c.level_channels[level - 1], f"up_{level}")(upsample(h, steps))
        h = nn.silu(GroupNorm(dtype=self.dtype, name="norm_out")(h))
        return conv(self.channels_out, "conv_out", init_scale=0.0)(h).astype(jnp.float32)

    def _block(self):
        c = self.config
        if c.remat == "none":
            return Block
        return nn.remat(Block, policy=REMAT[c.remat], prevent_cse=not c.scan_blocks)

    def _level(self, kind, name, h, channels, length):
        """The blocks of one level, as a loop over one compiled block."""
        size = max(h.shape[1:-1][1:] if h.ndim == 5 else h.shape[1:-1])
        arguments = (
            self.config, channels, size in self.config.attends_at, self.backend, self.dtype,
        )  # fmt: skip
        skip_axes = (0,) if kind is UpBlock else ()
        return nn.scan(
            kind,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(*skip_axes, nn.broadcast, nn.broadcast, nn.broadcast),
            length=length,
            unroll=1 if self.config.scan_blocks else length + 1,  # + 1 so that length 1 unrolls too
        )(arguments, self._block(), name=name)


def kernel_size(space: int) -> tuple[int, ...]:
    """Kernel size 3 along every axis except time."""
    return (1, 3, 3) if space == 3 else (3,) * space


def _strides(space: int) -> tuple[int, ...]:
    return (1, 2, 2) if space == 3 else (2,) * space


def check_size(space: tuple[int, ...], levels: int):
    """Raises ValueError if the spatial sizes cannot be halved `levels` - 1 times."""
    inner = space[1:] if len(space) == 3 else space
    multiple = 2 ** (levels - 1)
    if any(n % multiple for n in inner):
        raise ValueError(
            f"size {'x'.join(map(str, inner))} is not a multiple of {multiple}, as the {levels} "
            "levels of `channel_multipliers` require"
        )


_BLOCK = (
    *attention.PARTITION_RULES,
    (r"modulation/kernel", ("embed", None, "mlp")),
    (r"modulation/bias", (None, "mlp")),
    (r"frame_embedding", (None, "embed")),
    (r"(conv_\w+|shortcut)/bias", ("embed",)),
    (r"norm\w*/(scale|bias)", ("embed",)),
)
_KERNELS = r"(conv_\w+|shortcut|down_\d+|up_\d+)/kernel"

# Parameter path -> logical axes; the first pattern that matches applies. Kernels have leading axes
# for space and, if stacked, for blocks.
PARTITION_RULES = (
    *((f"condition/{path}", axes) for path, axes in conditioning.PARTITION_RULES),
    (f"(encoder|decoder)_.*{_KERNELS}", (..., None, "features")),
    (f"middle_.*{_KERNELS}", (..., None, "features")),
    *attention.stacked(r"(encoder|decoder)_\d+/", _BLOCK),
    *((f"middle_.*{path}", axes) for path, axes in _BLOCK),
    (r"(down|up)_\d+/kernel", (..., None, "features")),
    (r"(down|up)_\d+/bias", ("embed",)),
    (r"conv_in/kernel", (..., None, "features")),
    (r"conv_in/bias", ("embed",)),
    (r"conv_out/kernel", (..., None, None)),
    (r"conv_out/bias", (None,)),
    (r"norm_out/(scale|bias)", ("embed",)),
)
