"""What the flags of a transformer must agree in. A field in backticks becomes a flag."""

from typing import TYPE_CHECKING

from genai_jax.networks.sequence.mixers import ATTENTIONS, MIXERS

if TYPE_CHECKING:
    from genai_jax.networks.sequence.config import TransformerConfig


def check_sinks(c: "TransformerConfig"):
    """Raises `ValueError` for sinks without a window, or at distances that have a bias."""
    if c.sinks is not None and not c.window:
        raise ValueError(f"sinks={c.sinks} needs a `window` of at least 1 token")
    if c.sinks is not None and c.positions in ("alibi", "relative_buckets"):
        raise ValueError(
            f"sinks={c.sinks} cannot be combined with positions={c.positions}; use rope, "
            "learned, sinusoidal, or none"
        )


def check_rope(c: "TransformerConfig"):
    """Raises `ValueError` for a scaling of rotations that lacks something, or is not used."""
    needs = {"none": (), "linear": ("rope_factor",), "ntk": ("rope_factor",)}
    needed = needs.get(c.rope_scaling, ("rope_factor", "rope_length"))
    for name in ("rope_factor", "rope_length"):
        value = getattr(c, name)
        if value is None and name in needed:
            raise ValueError(f"rope_scaling={c.rope_scaling} needs `{name}`")
        if value is not None and name not in needed:
            raise ValueError(f"{name}={value} is not used by rope_scaling={c.rope_scaling}")
    if c.rope_scaling != "none" and c.positions != "rope":
        raise ValueError(f"rope_scaling={c.rope_scaling} is for positions=rope, not {c.positions}")
    recurrent = set(MIXERS) - {*ATTENTIONS, "latent_attention"}
    if c.rope_scaling != "none" and set(c.mixers) <= recurrent:
        raise ValueError(
            f"rope_scaling={c.rope_scaling} is for attention, which pattern={c.pattern} lacks"
        )


def check_buckets(c: "TransformerConfig"):
    """Raises `ValueError` for buckets without use, or that distances do not fill."""
    for name in ("relative_buckets", "relative_distance"):
        if c.positions != "relative_buckets" and getattr(c, name) is not None:
            raise ValueError(
                f"{name}={getattr(c, name)} is for positions=relative_buckets, not {c.positions}"
            )
    if c.buckets % 2 or c.furthest <= c.buckets // 2:
        raise ValueError(
            f"relative_buckets={c.buckets} must be even, and relative_distance="
            f"{c.furthest} more than half of it"
        )


def check_base(c: "TransformerConfig"):
    """Raises `ValueError` where the fields do not determine the base shape."""
    if c.parametrization == "standard":
        for name in ("base_width", "base_head_dim"):
            if getattr(c, name) is not None:
                raise ValueError(f"{name}={getattr(c, name)} is for parametrization=maximal_update")
        return
    if c.base_width is None:
        raise ValueError("parametrization=maximal_update needs `base_width`")
    if c.base_width != c.embed_dim and not (c.head_dim or c.base_head_dim):
        raise ValueError(
            "parametrization=maximal_update: say what grows with the width, set `head_dim` "
            "(more heads) or `base_head_dim` (wider ones)"
        )
    for name, heads in (("num_heads", c.num_heads), ("num_kv_heads", c.kv_heads)):
        # Not an integer, beyond rounding.
        if abs(heads / c.growth["heads"] % 1 - 0.5) < 0.499:
            raise ValueError(
                f"{name}={heads} is not a multiple of the {c.growth['heads']:g} times that "
                f"heads grow from base_width={c.base_width}"
            )
