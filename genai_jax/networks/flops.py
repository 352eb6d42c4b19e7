"""Model FLOPs, counted from a network's own shapes."""

import math

import jax

from genai_jax.networks.experts.mixture import MoeConfig
from genai_jax.networks.layers.dense import GATED
from genai_jax.networks.sequence.transformer import TransformerConfig
from genai_jax.scaling.program import mean_taps

DENSE = MoeConfig()


def transformer_forward_flops(
    config: TransformerConfig, vocab_size: int, length: int, moe: MoeConfig = DENSE
) -> dict:
    """FLOPs of one forward pass for one token, by part: `dense`, `attention`, `head`.

    A multiply-add is 2. Attention counts the pairs that the causal mask leaves, taken as half of
    length x length, and less what a window hides of them; norms, softmax and the embedding look-up
    are left out. The head counts whether tied or not. Of experts, those count that a token chooses,
    none of them dropped.
    """
    c = config
    heads, kv_heads = c.num_heads * c.head_width, c.kv_heads * c.head_width
    block = c.embed_dim * (2 * heads + 2 * kv_heads)
    if moe.num_experts:
        active = moe.experts_per_token + moe.shared_experts
        block += c.embed_dim * moe.num_experts + active * _expert_parameters(c, moe)
    else:
        block += _mlp_parameters(c, c.mlp_width)
    seen = length if c.window is None else min(length, c.window + 1)
    return {
        "dense": 2 * c.num_layers * block,
        "attention": 4 * c.num_layers * heads * mean_keys(length, seen),
        "head": 2 * c.embed_dim * vocab_size,
    }


def mean_keys(length: int, seen: int) -> float:
    """Keys of a query on average, each seeing itself and those before it, `seen` at most.

    The diagonal counts half, as it does in half of length x length, which this is without a window.
    """
    return seen - seen**2 / (2 * length)


def transformer_training_flops(
    config: TransformerConfig, vocab_size: int, batch: int, length: int, moe: MoeConfig = DENSE
) -> float:
    """FLOPs of one training step: three forward passes; rematerialization is not model work."""
    parts = transformer_forward_flops(config, vocab_size, length, moe)
    return 3 * batch * length * sum(parts.values())


def inactive_parameters(config: TransformerConfig, moe: MoeConfig) -> int:
    """Parameters of the experts that a token does not choose, in all layers; 0 without experts."""
    if not moe.num_experts:
        return 0
    others = moe.num_experts - moe.experts_per_token
    return config.num_layers * others * _expert_parameters(config, moe)


def _expert_parameters(config: TransformerConfig, moe: MoeConfig) -> int:
    return _mlp_parameters(config, moe.expert_dim or config.mlp_width)


def _mlp_parameters(config: TransformerConfig, width: int) -> int:
    """Of the kernels of an MLP of this hidden width."""
    return (3 if config.activation in GATED else 2) * config.embed_dim * width


CONVENTION = (
    "6 x matmul parameters (head counted, input embedding not; of experts those that a token "
    "chooses) x tokens + causal attention halved; as if one document filled each row; no "
    "rematerialization"
)


def count_flops(function, *shapes) -> int:
    """FLOPs of the matmuls and convolutions of `function`, from its jaxpr: 2 a multiply-add.

    Loops are counted as often as they run, both sides of a branch as the dearer one. Products above
    a causal diagonal count; those of a convolution with its padding, or with the zeros between the
    rows of a transposed one, do not.

    Raises:
      ValueError: a loop of unknown length.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*shapes).jaxpr)


def _jaxpr_flops(jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in left)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "while":
        if _jaxpr_flops(params["body_jaxpr"].jaxpr):
            raise ValueError("a while loop with matmuls runs an unknown number of times")
        return 0
    if name == "cond":
        return max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
    inner = [p for p in params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
    total = sum(_jaxpr_flops(getattr(p, "jaxpr", p)) for p in inner[:1])
    return total * params["length"] if name == "scan" else total


def _convolution_flops(equation) -> int:
    params = equation.params
    where = params["dimension_numbers"]
    image, kernel = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval
    products = out.size * kernel[where.rhs_spec[1]]
    for axis, (low, _) in enumerate(params["padding"]):
        products *= mean_taps(
            size=kernel[where.rhs_spec[2 + axis]],
            stride=params["window_strides"][axis],
            low=low,
            base=params["lhs_dilation"][axis],
            dilation=params["rhs_dilation"][axis],
            length=image[where.lhs_spec[2 + axis]],
            out=out.shape[where.out_spec[2 + axis]],
        )
    return 2 * round(products)
