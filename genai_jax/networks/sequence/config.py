"""Shapes and choices of a transformer."""

import dataclasses
import math
from typing import ClassVar

from genai_jax.config import field
from genai_jax.networks.layers.dense import ACTIVATIONS, GATED, NORMS
from genai_jax.networks.layers.rope_scaling import KINDS as ROPE_SCALINGS
from genai_jax.networks.layers.rope_scaling import RopeScaling
from genai_jax.networks.sequence.checks import (
    check_base,
    check_buckets,
    check_rope,
    check_sinks,
)
from genai_jax.networks.sequence.mixers import (
    ATTENTIONS,
    MIXERS,
    OPTIONS,
    check_pattern,
    options_of,
    outside_mixers,
    split_pattern,
)
from genai_jax.networks.sequence.stack import REMAT

PARAMETRIZATIONS = ("standard", "maximal_update")
AT_USE = ("sample", "evaluate")  # commands for which trained networks may be asked otherwise


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shapes and choices of a transformer; the defaults are a small Llama-like model."""

    # At use, a new value of a field resets those that belong to its old one.
    resets: ClassVar = {"rope_scaling": ("rope_factor", "rope_length")}

    num_layers: int = field(4, "Number of blocks.", minimum=1)
    embed_dim: int = field(256, "Width of the residual stream.", minimum=1)
    num_heads: int = field(4, "Number of query heads.", minimum=1)
    num_kv_heads: int | None = field(
        None,
        "Number of key and value heads; as many as query heads if unset, fewer for grouped-query "
        "attention, 1 for multi-query attention.",
        minimum=1,
    )
    head_dim: int | None = field(
        None, "Width of an attention head; embed_dim / num_heads if unset.", minimum=1
    )
    mlp_dim: int | None = field(
        None,
        "Hidden width of the MLP; 4 embed_dim if unset, 8/3 embed_dim if gated; 0 for blocks that "
        "have only a mixer, as in Mamba.",
        minimum=0,
    )
    positions: str = field(
        "rope",
        "How positions are encoded.",
        choices=("rope", "learned", "sinusoidal", "alibi", "relative_buckets", "none"),
    )
    relative_buckets: int | None = field(
        None,
        "Buckets of distances, each with a learned bias for the attention scores of a head; 32 if "
        "unset.",
        minimum=4,
        maximum=2**16,
    )
    relative_distance: int | None = field(
        None,
        "Distance from which on all share the last bucket; 128 if unset.",
        minimum=2,
        maximum=2**30,
    )
    rope_theta: float = field(10_000.0, "Base of the rotary wavelengths.", minimum=1)
    rope_scaling: str = field(
        "none",
        "How rotations are slowed down for rows longer than those of earlier training.",
        choices=ROPE_SCALINGS,
        at_use=AT_USE,
    )
    rope_factor: float | None = field(
        None,
        "What `rope_scaling` divides slow rotations by, such as the new length of a row relative "
        "to that of earlier training.",
        minimum=1,
        at_use=AT_USE,
    )
    rope_length: int | None = field(
        None, "Tokens of a row in earlier training, for rope_scaling=yarn and llama3.", minimum=1,
        at_use=AT_USE,
    )  # fmt: skip
    max_length: int = field(2048, "Number of positions in the learned position table.", minimum=1)
    norm: str = field("rmsnorm", "Kind of normalization.", choices=NORMS)
    norm_placement: str = field(
        "pre",
        "Whether a residual branch is normalized before it (pre) or the sum after it (post).",
        choices=("pre", "post"),
    )
    activation: str = field("swiglu", "Activation of the MLP.", choices=ACTIVATIONS)
    use_bias: bool = field(False, "Whether dense layers have biases.")
    tie_embeddings: bool = field(
        False, "Whether the output embedding is the transposed input embedding."
    )
    qk_norm: bool = field(False, "Whether queries and keys pass through an RMSNorm.")
    logits_soft_cap: float | None = field(
        None, "Bound of the tanh soft cap of the output logits; no cap if unset.", minimum=0
    )
    attention_soft_cap: float | None = field(
        None, "Bound of the tanh soft cap of the attention scores; no cap if unset.", minimum=0
    )
    window: int | None = field(
        None,
        "Number of preceding tokens that a token attends to besides itself; all if unset.",
        minimum=0,
        maximum=2**30,
        at_use=AT_USE,
    )
    sinks: int | None = field(
        None,
        "First tokens of its document that a token attends to besides its window, so that a model "
        "can go on for ever with a state of constant size; none if unset.",
        minimum=1,
        maximum=2**16,
        at_use=AT_USE,
    )
    dilation: int | None = field(
        None,
        "Distance of the tokens that dilated attention sees; 4 if unset.",
        minimum=1,
        maximum=2**20,
    )
    block_size: int | None = field(
        None, "Tokens of a block of block-sparse attention; 64 if unset.", minimum=1, maximum=2**20
    )
    near_blocks: int | None = field(
        None,
        "Blocks before its own that block-sparse attention sees in full; 1 if unset.",
        minimum=0,
        maximum=2**20,
    )
    block_stride: int | None = field(
        None,
        "Distance of the earlier blocks that block-sparse attention sees besides; 4 if unset.",
        minimum=1,
        maximum=2**20,
    )
    dropout: float = field(
        0.0, "Dropout rate of embeddings and residual branches.", minimum=0, maximum=1
    )
    scan_layers: bool = field(
        True, "Whether one compiled block is looped over; otherwise all blocks are unrolled."
    )
    remat: str = field(
        "none", "What the backward pass recomputes instead of storing it.", choices=tuple(REMAT)
    )
    parametrization: str = field(
        "standard",
        "How initial scales and learning rates depend on the width.",
        choices=PARAMETRIZATIONS,
    )
    base_width: int | None = field(
        None,
        "Value of embed_dim at which maximal_update equals standard; all widths grow in "
        "proportion to it.",
        minimum=1,
    )
    base_head_dim: int | None = field(
        None,
        "Value of head_dim at base_width; if unset, heads keep their width and grow in number.",
        minimum=1,
    )
    pattern: str | None = field(
        None,
        "Comma-separated mixers of consecutive blocks, repeated over all blocks: "
        f"{', '.join(MIXERS)}, or module:Class for a mixer of your own; attention if unset.",
        outside=outside_mixers,
    )
    expand: float | None = field(
        None,
        "Inner width of a recurrent mixer relative to embed_dim; that of its paper if unset.",
        minimum=0,
        maximum=64,
    )
    state_dim: int | None = field(
        None,
        "States per channel or head of a state-space mixer; that of its paper if unset.",
        minimum=1,
    )
    conv_width: int | None = field(
        None,
        "Tokens that the short convolution of a recurrent mixer sees; 4 if unset.",
        minimum=1,
        maximum=64,
    )

    latent_dim: int | None = field(
        None,
        "Numbers that latent attention keeps of a token for keys and values; 4 head_dim if unset.",
        minimum=1,
    )
    rotary_dim: int | None = field(
        None,
        "Channels of the rotated keys of latent attention; head_dim / 2 if unset.",
        minimum=2,
    )

    def __post_init__(self):
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}; "
                "change one or set `head_dim`"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even `head_dim`, not {self.head_width}")
        for name in ("logits_soft_cap", "attention_soft_cap"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 caps everything: it must be above 0, or unset")
        check_rope(self)
        check_pattern(self.pattern, self.num_layers)
        self._check_mixers()
        check_base(self)

    def _check_mixers(self):
        """Raises `ValueError` for options that no mixer of the pattern has, or that do not fit."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for option in OPTIONS:
            if getattr(self, option) != defaults[option] and option not in options_of(self.mixers):
                has = [name for name, mixer in MIXERS.items() if option in mixer.options]
                raise ValueError(
                    f"{option}={getattr(self, option)} is for the mixers {', '.join(has)}, of "
                    f"which pattern={self.pattern or 'attention'} has none"
                )
        biased = self.positions in ("alibi", "relative_buckets")
        if biased and set(self.mixers) <= set(MIXERS) - set(ATTENTIONS):
            raise ValueError(
                f"positions={self.positions} is for attention, which pattern={self.pattern} lacks"
            )
        check_buckets(self)
        check_sinks(self)
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim} is odd; rotations need pairs")
        if self.expand == 0:
            raise ValueError("expand=0 leaves no channels: it must be above 0, or unset")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def rotary_scaling(self) -> RopeScaling:
        return RopeScaling(self.rope_scaling, self.rope_factor or 1.0, self.rope_length or 1)

    @property
    def buckets(self) -> int:
        """Buckets of relative positions."""
        return self.relative_buckets or 32

    @property
    def furthest(self) -> int:
        """Distance from which on all share the last bucket."""
        return self.relative_distance or 128

    @property
    def dilation_step(self) -> int:
        """Distance of the tokens that dilated attention sees."""
        return self.dilation or 4

    @property
    def block_width(self) -> int:
        """Tokens of a block of block-sparse attention."""
        return self.block_size or 64

    @property
    def blocks_near(self) -> int:
        """Blocks before its own that a token sees."""
        return 1 if self.near_blocks is None else self.near_blocks

    @property
    def blocks_apart(self) -> int:
        """Distance of the further blocks that it sees."""
        return self.block_stride or 4

    @property
    def taps(self) -> int:
        """Tokens that a short convolution sees."""
        return self.conv_width or 4

    @property
    def latent_width(self) -> int:
        """Size of the latents of latent attention."""
        return self.latent_dim or 4 * self.head_width

    @property
    def rotated_width(self) -> int:
        """Channels of the keys of latent attention that are rotated, an even number."""
        return self.rotary_dim or max(2, self.head_width // 4 * 2)

    @property
    def mlp_width(self) -> int:
        """Hidden width; a gated MLP has as many parameters by default as the plain one."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        if self.activation in GATED:
            return max(8, round(self.embed_dim * 8 / 3 / 32) * 32)
        return 4 * self.embed_dim

    @property
    def mixers(self) -> tuple[str, ...]:
        """Names of the mixers of one period of the pattern."""
        return split_pattern(self.pattern)

    @property
    def growth(self) -> dict[str, float]:
        """Logical axis -> its size relative to the base shape, 1 if not named.

        Empty in the standard parametrization, which has no base. Heads and MLP are taken to be as
        wide as the residual stream in both shapes: see `genai_jax.training.parametrization`.
        """
        if self.parametrization == "standard":
            return {}
        width = self.embed_dim / self.base_width
        head = self.head_width / (self.base_head_dim or self.head_width)
        heads = {"heads": width / head, "kv_heads": width / head, "head_dim": head}
        # The latents of latent attention are as wide as four heads, or as a flag says.
        latent = 1.0 if self.latent_dim else head
        return {"embed": width, "mlp": width, "inner": width, "latent": latent, **heads}

    @property
    def width_growth(self) -> float:
        """Divides outputs, and multiplies the variance of the matrix that computes them."""
        return self.growth.get("embed", 1.0)

    @property
    def attention_scale(self) -> float | None:
        """Factor of the attention scores; None for 1 / sqrt(head_dim)."""
        if self.base_head_dim in (None, self.head_width):
            return None
        return math.sqrt(self.base_head_dim) / self.head_width

    @property
    def self_attention_scale(self) -> float | None:
        """The same for scores among the tokens of a row, which scaled rotations may sharpen."""
        sharpness = self.rotary_scaling.sharpness
        if sharpness == 1:
            return self.attention_scale
        return sharpness * (self.attention_scale or 1 / math.sqrt(self.head_width))
