"""Model FLOPs, counted from a network's own shapes."""

from genai_jax.networks.transformer import TransformerConfig


def transformer_forward_flops(config: TransformerConfig, vocab_size: int, length: int) -> dict:
    """FLOPs of one forward pass for one token, by part: `dense`, `attention`, `head`.

    A multiply-add is 2. Attention counts the pairs that the causal mask leaves, taken as half of
    length (a window: at most its width) keys a query; norms, softmax and the embedding look-up are
    left out. The head counts whether tied or not.
    """
    c = config
    heads, kv_heads = c.num_heads * c.head_width, c.kv_heads * c.head_width
    gates = 3 if c.activation in ("swiglu", "geglu") else 2
    block = c.embed_dim * (2 * heads + 2 * kv_heads) + gates * c.embed_dim * c.mlp_width
    keys = length / 2
    if c.window is not None:
        keys = min(keys, c.window + 1)
    return {
        "dense": 2 * c.num_layers * block,
        "attention": 4 * c.num_layers * heads * keys,
        "head": 2 * c.embed_dim * vocab_size,
    }


def transformer_training_flops(config: TransformerConfig, vocab_size: int, batch: int, length: int):
    """FLOPs of one training step: three forward passes; rematerialization is not model work."""
    parts = transformer_forward_flops(config, vocab_size, length)
    return 3 * batch * length * sum(parts.values())


CONVENTION = (
    "6 x matmul parameters (head counted, input embedding not) x tokens + causal attention "
    "halved; as if one document filled each row; no rematerialization"
)
