"""Model FLOPs of a transformer, from its shapes."""

from collections import Counter

from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.layers.dense import GATED
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers import load_mixer

DENSE = MoeConfig()

CONVENTION = (
    "6 x matmul parameters (head counted, input embedding not; of experts those that a token "
    "chooses) x tokens + causal attention halved; as if one document filled each row; no "
    "rematerialization"
)


def transformer_forward_flops(
    config: TransformerConfig, vocab_size: int, length: int, moe: MoeConfig = DENSE
) -> dict[str, float]:
    """FLOPs of one forward pass per token, by part: `dense`, `head`, and those of the mixers.

    A multiply-add is 2. Attention counts the pairs that the causal mask leaves, taken as half of
    length x length, less those that a window hides; norms, softmax and the embedding lookup are
    left out. The head counts whether tied or not. Only the experts that a token chooses count, none
    of them dropped.
    """
    c = config
    if moe.num_experts:
        active = moe.experts_per_token + moe.shared_experts
        mlp = c.embed_dim * moe.num_experts + active * _expert_parameters(c, moe)
    else:
        mlp = _mlp_parameters(c, c.mlp_width)
    parts = {"dense": 2 * c.num_layers * mlp}
    for mixer, count in Counter(c.mixers).items():
        layers = c.num_layers // len(c.mixers) * count
        for part, flops in load_mixer(mixer).flops(c, length, layers).items():
            parts[part] = parts.get(part, 0) + flops
    return parts | {"head": 2 * c.embed_dim * vocab_size}


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
    """Parameters in the kernels of an MLP of this hidden width."""
    return (3 if config.activation in GATED else 2) * config.embed_dim * width
