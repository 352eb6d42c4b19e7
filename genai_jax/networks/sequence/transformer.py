"""A decoder-only transformer: tokens in, hidden states out."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import kernels_pallas
from genai_jax.config import ConfigError, field
from genai_jax.networks.experts import mixture as mixture_of_experts
from genai_jax.networks.experts.mixture import MixtureOfExperts, MoeConfig
from genai_jax.networks.layers.dense import ACTIVATIONS, GATED, NORMS, Dense, Mlp, Norm
from genai_jax.networks.layers.embedding import Embed
from genai_jax.networks.layers.positions import alibi_slopes, rotary, rotation, sinusoidal
from genai_jax.networks.parallel.attention import attention
from genai_jax.networks.parallel.axes import STAGE, ParallelConfig, axis_size, token_order
from genai_jax.networks.parallel.pipeline import pipeline


def _save(*names: str):
    """Saves these alone, and where the tokens of experts go: small, and slow to make again."""
    return jax.checkpoint_policies.save_only_these_names(*names, "places")


REMAT = {
    "none": None,
    "full": _save(),
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": _save("attention"),
    "offload_attention": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["places"],
        names_which_can_be_offloaded=["attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention_mlp": _save("attention", "mlp_hidden"),
}


PARAMETRIZATIONS = ("standard", "maximal_update")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shapes and choices of a transformer; its defaults are a small Llama-like model."""

    num_layers: int = field(4, "blocks", minimum=1)
    embed_dim: int = field(256, "width of the residual stream", minimum=1)
    num_heads: int = field(4, "query heads", minimum=1)
    num_kv_heads: int | None = field(
        None, "key and value heads; fewer than num_heads is grouped, 1 multi-query", minimum=1
    )
    head_dim: int | None = field(None, "width of a head; embed_dim / num_heads if unset", minimum=1)
    mlp_dim: int | None = field(
        None, "hidden width of the MLP; 4 embed_dim if unset, 8/3 of it when gated", minimum=1
    )
    positions: str = field(
        "rope", "position encoding", choices=("rope", "learned", "sinusoidal", "alibi", "none")
    )
    rope_theta: float = field(10_000.0, "base of the rotary wavelengths", minimum=1)
    max_length: int = field(2048, "rows of the learned position table", minimum=1)
    norm: str = field("rmsnorm", "normalization", choices=NORMS)
    norm_placement: str = field("pre", "normalize inputs or outputs", choices=("pre", "post"))
    activation: str = field("swiglu", "activation of the MLP", choices=ACTIVATIONS)
    use_bias: bool = field(False, "biases in dense layers")
    tie_embeddings: bool = field(False, "output embedding is the input embedding")
    qk_norm: bool = field(False, "RMSNorm on queries and keys")
    logits_soft_cap: float | None = field(None, "tanh cap of the output logits", minimum=0)
    attention_soft_cap: float | None = field(None, "tanh cap of the attention scores", minimum=0)
    window: int | None = field(None, "a token sees itself and this many before it", minimum=0)
    dropout: float = field(0.0, "rate on embeddings and residual branches", minimum=0, maximum=1)
    scan_layers: bool = field(True, "one compiled block looped over; off unrolls it")
    remat: str = field("none", "what the backward pass recomputes", choices=tuple(REMAT))
    parametrization: str = field(
        "standard", "how scales and learning rates depend on the width", choices=PARAMETRIZATIONS
    )
    base_width: int | None = field(
        None, "embed_dim at which maximal_update is standard; all widths in proportion", minimum=1
    )
    base_head_dim: int | None = field(
        None, "head_dim at base_width; that of this width, with fewer heads, if unset", minimum=1
    )

    def __post_init__(self):
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"--transformer.embed_dim={self.embed_dim} is not divisible by "
                f"--transformer.num_heads={self.num_heads}; change one or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"--transformer.num_heads={self.num_heads} is not a multiple of "
                f"--transformer.num_kv_heads={self.num_kv_heads}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_width}")
        self._check_base()

    def _check_base(self):
        """Raises `ValueError` where the flags do not say what the base shape is."""
        if self.parametrization == "standard":
            for name in ("base_width", "base_head_dim"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--transformer.{name}={getattr(self, name)} is for "
                        "--transformer.parametrization=maximal_update"
                    )
            return
        if self.base_width is None:
            raise ValueError(
                "--transformer.parametrization=maximal_update needs --transformer.base_width"
            )
        if self.base_width != self.embed_dim and not (self.head_dim or self.base_head_dim):
            raise ValueError(
                "--transformer.parametrization=maximal_update: say what grows with the width, set "
                "--transformer.head_dim (more heads) or --transformer.base_head_dim (wider ones)"
            )
        for name, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            if abs(heads / self.growth["heads"] % 1 - 0.5) < 0.499:  # no integer, not by rounding
                raise ValueError(
                    f"--transformer.{name}={heads} is not a multiple of the "
                    f"{self.growth['heads']:g} times that heads grow from --transformer.base_width="
                    f"{self.base_width}"
                )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def mlp_width(self) -> int:
        """The hidden width; for a gated MLP the default keeps the parameters of the plain one."""
        if self.mlp_dim:
            return self.mlp_dim
        if self.activation in GATED:
            return max(8, round(self.embed_dim * 8 / 3 / 32) * 32)
        return 4 * self.embed_dim

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
        return {"embed": width, "mlp": width, **heads}

    @property
    def width_growth(self) -> float:
        """Divides outputs, and multiplies the variance of the matrix that makes them."""
        return self.growth.get("embed", 1.0)

    @property
    def attention_scale(self) -> float | None:
        """What scores are multiplied by; None for 1 / sqrt(head_dim)."""
        if self.base_head_dim in (None, self.head_width):
            return None
        return math.sqrt(self.base_head_dim) / self.head_width


# Parameter path -> logical axes. The first pattern found in the path decides.
PARTITION_RULES = (
    (r"position_embed/embedding", (None, "embed")),
    (r"embed/embedding", ("vocabulary", "embed")),
    (r"attention/query/kernel", ("layers", "embed", "heads", "head_dim")),
    (r"attention/(key|value)/kernel", ("layers", "embed", "kv_heads", "head_dim")),
    (r"attention/out/kernel", ("layers", "heads", "head_dim", "embed")),
    (r"attention/query/bias", ("layers", "heads", "head_dim")),
    (r"attention/(key|value)/bias", ("layers", "kv_heads", "head_dim")),
    (r"attention/(query|key)_norm/scale", ("layers", "head_dim")),
    *mixture_of_experts.PARTITION_RULES,
    (r"(mlp|shared)/(up|gate)/kernel", ("layers", "embed", "mlp")),
    (r"(mlp|shared)/down/kernel", ("layers", "mlp", "embed")),
    (r"mlp/(up|gate)/bias", ("layers", "mlp")),
    (r"(attention/out|mlp/down)/bias", ("layers", "embed")),
    (r"layers/\w+_norm/(scale|bias)", ("layers", "embed")),
    (r"final_norm/(scale|bias)", ("embed",)),
    (r"head/kernel", ("embed", "vocabulary")),
)


Cache = kernels_pallas.ContiguousCache


def make_cache(config: TransformerConfig, batch: int, max_length: int, dtype) -> Cache:
    """An empty cache of every layer: its arrays [layers, batch, kv_heads, max_length, head_dim]."""
    layer = Cache.empty(batch, max_length, config.kv_heads, config.head_width, dtype)
    return jax.tree.map(lambda a: jnp.zeros((config.num_layers, *a.shape), a.dtype), layer)


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    config: TransformerConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()

    @nn.compact
    def __call__(self, x, cache, positions, segment_ids, rotate_by):
        c = self.config

        def project(heads: int, name: str) -> jax.Array:
            shape = (heads, c.head_width)
            return Dense(shape, use_bias=c.use_bias, dtype=self.dtype, name=name)(x)

        q = project(c.num_heads, "query")
        k, v = project(c.kv_heads, "key"), project(c.kv_heads, "value")
        if c.qk_norm:
            q = Norm(dtype=self.dtype, name="query_norm")(q)
            k = Norm(dtype=self.dtype, name="key_norm")(k)
        if c.positions == "rope":
            q, k = rotary(q, rotate_by), rotary(k, rotate_by)
        mask = kernels_pallas.Causal()
        if c.window is not None:
            mask = mask & kernels_pallas.Window(c.window, 0)
        slopes = alibi_slopes(c.num_heads) if c.positions == "alibi" else None
        if cache is None:
            parallel = None if self.is_initializing() else self.parallel
            out = attention(
                q, k, v, mask=mask, parallel=parallel, order=token_order(self.parallel),
                segment_ids=segment_ids, slopes=slopes, scale=c.attention_scale,
                logits_soft_cap=c.attention_soft_cap, backend=self.backend,
            )  # fmt: skip
        else:
            lengths = positions[:, 0] + q.shape[1]
            cache = kernels_pallas.append(cache, k, v, lengths)
            out = kernels_pallas.decode(
                q, cache, lengths=lengths, mask=mask, scale=c.attention_scale,
                logits_soft_cap=c.attention_soft_cap,
                bias=None if slopes is None else kernels_pallas.Alibi(slopes),
            )  # fmt: skip
        out = checkpoint_name(out, "attention")
        out_scale = 1 / (2 * c.num_layers)
        out = Dense(
            (c.embed_dim,), 2, use_bias=c.use_bias, init_scale=out_scale, dtype=self.dtype,
            name="out",
        )(out)  # fmt: skip
        return out, cache


class Block(nn.Module):
    """Attention and MLP, each a residual branch normalized before (pre) or after it (post).

    The MLP may be a mixture of experts, whose routers write their collection "router".
    """

    config: TransformerConfig
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()

    @nn.compact
    def __call__(self, x, cache, *context):
        c = self.config
        pre = c.norm_placement == "pre"
        dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        attention_norm = Norm(c.norm, dtype=self.dtype, name="attention_norm")
        mlp_norm = Norm(c.norm, dtype=self.dtype, name="mlp_norm")
        attention = Attention(c, self.backend, self.dtype, self.parallel, name="attention")
        mlp = self._mlp(cache, *context)
        update, cache = attention(attention_norm(x) if pre else x, cache, *context)
        x = x + dropout(update)
        if not pre:
            x = attention_norm(x)
        x = x + dropout(mlp(mlp_norm(x) if pre else x))
        if not pre:
            x = mlp_norm(x)
        return nn.with_logical_constraint(x, ("batch", "length", "activation_embed")), cache

    def _mlp(self, cache, positions, segment_ids, rotate_by):
        """The function x -> update; segment 0 is padding, which no expert takes."""
        c, out_scale = self.config, 1 / (2 * self.config.num_layers)
        if not self.moe.num_experts:
            return Mlp(c.mlp_width, c.activation, c.use_bias, out_scale, self.dtype, name="mlp")
        mixture = MixtureOfExperts(
            self.moe, c.mlp_width, c.activation, out_scale, c.width_growth, self.dtype, name="mlp"
        )
        real = None if segment_ids is None else segment_ids != 0
        return lambda x: mixture(x, real, dropless=cache is not None)


class Transformer(nn.Module):
    """Embeds tokens, applies the blocks, normalizes. `head` maps the result to logits.

    Parameters of the blocks are stacked on a leading axis [num_layers, ...], scanned or not, so a
    checkpoint does not depend on `scan_layers`.
    """

    config: TransformerConfig
    vocab_size: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()

    def setup(self):
        c = self.config
        self.embed = Embed(self.vocab_size, c.embed_dim, "vocabulary", self.dtype)
        if c.positions == "learned":
            self.position_embed = Embed(c.max_length, c.embed_dim, dtype=self.dtype)
        if not c.tie_embeddings:
            self.head = Head(self.vocab_size, c.width_growth)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = self._stack(c.num_layers)
        self.final_norm = Norm(c.norm, dtype=self.dtype)

    def _stack(self, count: int, remat: bool = True, **options) -> nn.Module:
        """`count` blocks, one after the other."""
        c, block = self.config, Block
        if remat and c.remat != "none":
            block = nn.remat(Block, policy=REMAT[c.remat], prevent_cse=not c.scan_layers)
        return nn.scan(
            block,
            variable_axes={"params": 0, "router": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=count,
            unroll=1 if c.scan_layers else count,
        )(c, self.backend, self.dtype, self.parallel, self.moe, **options)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [batch, length, embed_dim], and the cache with these tokens added.

        Dropout acts when an rng named "dropout" is given.

        Args:
          tokens: [batch, length] integers, in the order of `parallel.token_order`.
          positions: [batch, length]; counted from 0 in the order of the tokens if not given.
          segment_ids: [batch, length]; a token sees only tokens of its own segment. Not for use
            with a cache, whose rows are one segment each.
          cache: keys and values of earlier tokens; positions[:, 0] says where each row goes on.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens)
        if c.positions == "learned":
            x = x + self.position_embed(positions)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(positions, c.embed_dim).astype(self.dtype)
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        x = nn.with_logical_constraint(x, ("batch", "length", "activation_embed"))
        if axis_size(STAGE) > 1 and cache is None and not self.is_initializing():
            x = self._pipelined(x, positions, segment_ids)
        else:
            x, cache = self.layers(x, cache, positions, segment_ids, self._rotation(positions))
        return self.final_norm(x), cache

    def _rotation(self, positions: jax.Array):
        c = self.config
        if c.positions != "rope":
            return None
        return rotation(positions, c.head_width, theta=c.rope_theta)

    def _pipelined(self, x, positions, segment_ids) -> jax.Array:
        """The blocks over the stages of a pipeline."""
        if self.moe.num_experts:
            raise ConfigError("--mesh.stage does not go with --moe.num_experts: use --mesh.expert")

        def apply_layers(params, x, context, key):
            positions, segment_ids = context
            count, once = jax.tree.leaves(params)[0].shape[0], self.parallel.repeats == 1
            stack = self._stack(count, remat=once, parent=None)
            rotate_by = self._rotation(positions)
            rngs = {} if key is None else {"dropout": key}
            return stack.apply(
                {"params": params}, x, None, positions, segment_ids, rotate_by, rngs=rngs
            )[0]

        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        params, context = self.variables["params"]["layers"], (positions, segment_ids)
        policy = REMAT[self.config.remat]
        return pipeline(apply_layers, params, x, context, self.parallel, key, policy)

    def head_kernel(self) -> jax.Array:
        """What hidden states are multiplied by, [embed_dim, vocab_size], float32."""
        c = self.config
        kernel = self.embed.embedding.T if c.tie_embeddings else self.head(c.embed_dim)
        return kernel if c.width_growth == 1 else kernel / c.width_growth

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[batch, length, embed_dim] -> [batch, length, vocab_size], float32."""
        return output_logits(hidden, self.head_kernel(), self.config.logits_soft_cap)

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter; call `init` with it."""
        return self.logits(self(tokens)[0])


class Head(nn.Module):
    """The untied output embedding; its variance is init_scale, divided by the fan-in."""

    vocab_size: int
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, embed_dim: int) -> jax.Array:
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        return self.param("kernel", init, (embed_dim, self.vocab_size), jnp.float32)


def output_logits(hidden: jax.Array, kernel: jax.Array, soft_cap: float | None) -> jax.Array:
    """Logits in float32, the matmul in the dtype of `hidden`."""
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits
