"""What a transformer attends to, and what it has computed after each layer.

The network runs as it is, and hands out what enters each attention and what leaves each block. From
that, the weights, which fused kernels never write down, are computed again in plain jnp, one matrix
for each head.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.networks.layers.dense import Norm
from genai_jax.networks.layers.positions import alibi_slopes, rotary, rotation
from genai_jax.networks.layers.relative_positions import RelativeBias
from genai_jax.networks.sequence.blocks import Block
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers.attention import Attention
from genai_jax.networks.sequence.transformer import Transformer


def attention_weights(model: Transformer, params: dict, tokens: jax.Array) -> jax.Array:
    """The weights of every attention, [layers, heads, query, key], float32; rows sum to 1.

    Args:
      model: a decoder, whose mask is causal and within the window of its config.
      params: of the model.
      tokens: [length] integers, all real, at positions 0, 1, ...

    Raises:
      ConfigError: a mixer other than attention.
    """
    layers = mixer_inputs(model, params, tokens)
    table = params.get("relative_bias", {}).get("table")
    return jnp.stack([weights_of(model.config, p, x, table) for p, x, _ in layers])


def residual_stream(model: Transformer, params: dict, tokens: jax.Array) -> jax.Array:
    """What enters the first block and what leaves each, [layers + 1, length, embed_dim].

    Args:
      model: a decoder with mixers of any kind.
      params: of the model.
      tokens: [length] integers, all real, at positions 0, 1, ...
    """
    places = len(model.config.mixers)
    written = _captured(model, params, tokens)
    blocks = [_output(_of_place(written["layers"], i, places)) for i in range(places)]
    left = jnp.stack(blocks, 1)[:, :, 0]  # [periods, places, length, embed_dim]
    return jnp.concatenate([_output(written["dropout"]), left.reshape(-1, *left.shape[2:])])


def logit_lens(model: Transformer, params: dict, tokens: jax.Array) -> jax.Array:
    """Logits [layers + 1, length, vocab_size], float32, as if the network ended after each layer.

    The residual stream passes through the final norm and the output embedding; the last entry is
    what the model predicts (https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru). Arguments are
    those of `residual_stream`.
    """
    stream = residual_stream(model, params, tokens)
    head = lambda module, x: module.logits(module.final_norm(x))
    return model.apply({"params": params}, stream, method=head)


def mixer_inputs(
    model: Transformer, params: dict, tokens: jax.Array
) -> list[tuple[dict, jax.Array, jax.Array]]:
    """Of each layer: the attention's parameters, its input and its output, [length, embed_dim]."""
    config = model.config
    if config.sinks:
        raise ConfigError(
            f"--transformer.sinks={config.sinks}: the weights of attention with sinks are not "
            "computed"
        )
    others = sorted({name for name in config.mixers if name != "attention"})
    if others:
        raise ConfigError(
            f"--transformer.pattern={config.pattern}: weights are computed of the mixer attention, "
            f"not of {others[0]}"
        )
    places = len(config.mixers)
    written = _captured(model, params, tokens)
    found = [_of_place(written["layers"], i, places) for i in range(places)]
    weights = [_of_place(params["layers"], i, places)["attention"] for i in range(places)]
    stream = _output(written["dropout"])[0]  # what enters a block, before its norm
    layers = []
    for layer in range(config.num_layers):
        period, place = divmod(layer, places)
        own, seen = jax.tree.map(lambda x, i=period: x[i], (weights[place], found[place]))
        pre = config.norm_placement == "pre"
        entered = _output(seen["attention_norm"])[0] if pre else stream
        layers.append((own, entered, _output(seen["attention"])[0]))
        stream = _output(seen)[0]
    return layers


def weights_of(
    config: TransformerConfig, params: dict, x: jax.Array, table: jax.Array | None = None
) -> jax.Array:
    """The weights of one attention, [heads, query, key], from its input [length, embed_dim].

    With relative positions in buckets, `table` has their biases, [buckets, heads].
    """
    q, k = (_projected(params[name], x) for name in ("query", "key"))
    if config.qk_norm:
        q, k = (Norm().apply({"params": params[f"{n}_norm"]}, y)
                for n, y in (("query", q), ("key", k)))  # fmt: skip
    positions = jnp.arange(x.shape[0])
    if config.positions == "rope":
        angles = rotation(
            positions[None], config.head_width, theta=config.rope_theta,
            scaling=config.rotary_scaling,
        )  # fmt: skip
        q, k = rotary(q[None], angles)[0], rotary(k[None], angles)[0]
    k = jnp.repeat(k, config.num_heads // config.kv_heads, 1)
    scale = config.self_attention_scale or 1 / math.sqrt(config.head_width)
    scores = scale * jnp.einsum("qhd,khd->hqk", q, k, precision="highest")
    if config.attention_soft_cap is not None:
        scores = config.attention_soft_cap * jnp.tanh(scores / config.attention_soft_cap)
    before = positions[:, None] - positions  # how far back a key is
    if config.positions == "alibi":
        scores = scores - alibi_slopes(config.num_heads)[:, None, None] * before
    if table is not None:
        relative = RelativeBias(table).of_queries(positions[None], x.shape[0], config.furthest)
        scores = scores + relative[0]
    visible = before >= 0
    if config.window is not None:
        visible &= before <= config.window
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1)


def attended(config: TransformerConfig, params: dict, x: jax.Array, weights) -> jax.Array:
    """The output [length, embed_dim] of an attention with these weights [heads, query, key]."""
    v = jnp.repeat(_projected(params["value"], x), config.num_heads // config.kv_heads, 1)
    mixed = jnp.einsum("hqk,khd->qhd", weights, v, precision="highest")
    out = jnp.einsum("qhd,hde->qe", mixed, params["out"]["kernel"], precision="highest")
    return out + params["out"].get("bias", 0)


def head_scores(weights: np.ndarray, tokens: Sequence, reach: int) -> dict[str, np.ndarray]:
    """How much each head attends to two kinds of places, each [layers, heads, reach + 1].

    - back: to the token so many places before; with 1, a previous-token head.
    - after_earlier: to the tokens so many places after earlier occurrences of the same token; with
      1, an induction head (the prefix-matching score of Olsson et al. 2022). Means over the tokens
      that occurred before; NaN without such tokens.

    Args:
      weights: [layers, heads, query, key].
      tokens: of the axes `query` and `key`; compared with each other only.
      reach: the furthest place.
    """
    _, ids = np.unique(np.asarray(tokens), return_inverse=True)
    earlier = np.tril(ids[:, None] == ids, -1)
    again = np.float64(earlier.any(1).sum())
    back, after = [], []
    for far in range(reach + 1):
        diagonal = np.diagonal(weights, -far, 2, 3)
        back.append(diagonal.sum(-1) / max(diagonal.shape[-1], 1))
        places = np.pad(earlier, ((0, 0), (far, 0)))[:, : len(ids)]
        with np.errstate(invalid="ignore"):
            after.append(np.sum(weights * places, (2, 3)) / again)
    return {"back": np.stack(back, -1), "after_earlier": np.stack(after, -1)}


def _projected(params: dict, x: jax.Array) -> jax.Array:
    """[length, embed_dim] -> [length, heads, head_dim], float32."""
    x = x.astype(jnp.float32)
    y = jnp.einsum("le,ehd->lhd", x, params["kernel"], precision="highest")
    return y + params.get("bias", 0)


def _captured(model: Transformer, params: dict, tokens: jax.Array) -> dict:
    """What the modules of `_is_captured` return for one row of tokens."""
    return model.apply(
        {"params": params}, tokens[None], capture_intermediates=_is_captured,
        mutable=["intermediates"],
    )[1]["intermediates"]  # fmt: skip


def _is_captured(module: nn.Module, method: str) -> bool:
    return method == "__call__" and isinstance(module, Attention | Block | Norm | nn.Dropout)


def _of_place(tree: dict, place: int, places: int) -> dict:
    """What belongs to the blocks at a place of the period."""
    return tree if places == 1 else tree[f"block_{place}"]


def _output(captured: dict) -> jax.Array:
    """The array that a module returned, [batch, length, embed_dim]."""
    (value,) = captured["__call__"]
    return value[0] if isinstance(value, tuple) else value
