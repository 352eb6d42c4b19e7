"""What the benchmark times: for each operation, several implementations on the same arrays.

A multiply-add counts as two FLOPs: attention forward is 4 * batch * heads * head_dim * (visible
pairs), backward 2.5 times that (five matmuls instead of two); a causal mask counts as half of all
pairs. Decoding and the other memory-bound calls count the bytes that must be moved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from .attention import attention, backends
from .caches import ContiguousCache
from .decoding import BACKENDS as DECODE_BACKENDS
from .decoding import bytes_moved, decode
from .grouped_matmul import BACKENDS as GROUPED_BACKENDS
from .grouped_matmul import grouped_matmul
from .linear_cross_entropy import BACKENDS as LOSS_BACKENDS
from .linear_cross_entropy import linear_cross_entropy
from .masks import Causal, Full, Mask, Window


@dataclass(frozen=True)
class Contest:
    """Functions of the same arguments, ours first.

    sizes: shape and dtype of each argument; small: those of the call on which errors are measured.
    exact: the function in float32, with full-precision matmuls. flops, bytes: of one call, 0 if it
    is not bound by them. backward: time only the pull-back, with its residuals already computed.
    """

    name: str
    contenders: dict[str, Callable]
    sizes: tuple[jax.ShapeDtypeStruct, ...]
    small: tuple[jax.ShapeDtypeStruct, ...]
    exact: Callable
    flops: float = 0.0
    bytes: float = 0.0
    backward: bool = False
    integers: dict[int, int] = field(default_factory=dict)  # argument -> bound of its values


@dataclass(frozen=True)
class Shape:
    """The shape of an attention call."""

    batch: int
    length: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    mask: Mask = Causal()  # noqa: RUF009 (frozen)

    def __str__(self):
        groups = f"/{self.kv_heads}" if self.kv_heads else ""
        sizes = f"{self.batch}x{self.length}x{self.heads}{groups}x{self.head_dim}"
        return f"{str(self.mask).removesuffix('()').lower()} {sizes}"


# The lengths and widths of published tables (see README.md), a long window, and sizes for a CPU.
SHAPES = {
    "accelerator": (
        Shape(1, 16384, 16, 128, mask=Full()),
        Shape(2, 8192, 16, 128),
        Shape(4, 4096, 16, 128),
        Shape(32, 512, 16, 128),
        Shape(1, 16384, 32, 64, 8, Full()),
        Shape(1, 16384, 8, 256, mask=Full()),
        Shape(1, 32768, 16, 128, mask=Window(4095)),
    ),
    "cpu": (Shape(1, 512, 4, 64), Shape(1, 2048, 4, 64), Shape(1, 2048, 4, 64, mask=Window(255))),
}


def visible(shape: Shape) -> float:
    """Number of visible (query, key) pairs per head; half of all pairs for a causal mask."""
    if isinstance(shape.mask, Causal):
        return shape.length**2 / 2
    ranges = (shape.mask.key_range(q, q + 1, shape.length) for q in range(shape.length))
    return float(sum(stop - start for start, stop in ranges))


def attention_contests(platform: str, dtype) -> list[Contest]:
    """Forward and backward of every shape."""
    contests = []
    for shape in SHAPES["cpu" if platform == "cpu" else "accelerator"]:
        flops = 4 * shape.batch * shape.heads * shape.head_dim * visible(shape)
        for backward in (False, True):
            name = f"attention {'backward' if backward else 'forward'}, {shape}"
            contests.append(
                Contest(
                    name,
                    _attention_contenders(shape, platform, backward),
                    _qkv(shape, dtype),
                    _qkv(Shape(1, 512, shape.heads, shape.head_dim, shape.kv_heads), dtype),
                    functools.partial(attention, mask=shape.mask, backend="xla"),
                    flops=flops * (2.5 if backward else 1),
                    backward=backward,
                )
            )
    return contests


def _qkv(shape: Shape, dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    of = lambda heads: (shape.batch, shape.length, heads, shape.head_dim)
    heads = (shape.heads, shape.kv_heads or shape.heads, shape.kv_heads or shape.heads)
    return tuple(jax.ShapeDtypeStruct(of(h), dtype) for h in heads)


def _attention_contenders(shape: Shape, platform: str, backward: bool) -> dict[str, Callable]:
    ours = {
        name: functools.partial(attention, mask=shape.mask, backend=name)
        for name in reversed(backends(platform))
    }
    theirs = {"jax.nn": functools.partial(_jax_nn, shape.mask)}
    if platform == "tpu":
        theirs["jax splash"] = functools.partial(_splash, shape.mask)
    causal = isinstance(shape.mask, Causal)
    if platform == "gpu" and not isinstance(shape.mask, Window) and not (causal and backward):
        theirs["jax mosaic-gpu"] = functools.partial(_mosaic_gpu, causal)
    return ours | theirs


def _jax_nn(mask: Mask, q, k, v):
    """JAX's own function, compiled by XLA."""
    window = (mask.left, mask.right) if isinstance(mask, Window) else None
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=isinstance(mask, Causal), local_window_size=window, implementation="xla"
    )


def _splash(mask: Mask, q, k, v):
    """The kernel that ships with JAX for TPUs."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    size = (q.shape[1], k.shape[1])
    one = splash.CausalMask(size) if isinstance(mask, Causal) else splash.FullMask(size)
    if isinstance(mask, Window):
        one = splash.LocalMask(size, (mask.left, mask.right), 0)
    block = min(1024, q.shape[1])
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one] * q.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            **{f"block_{name}": block for name in names}, use_fused_bwd_kernel=True
        ),
    )
    heads_first = lambda a: jnp.swapaxes(a, 1, 2)
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    return heads_first(jax.vmap(kernel)(*map(heads_first, (scaled, k, v))))


def _mosaic_gpu(causal: bool, q, k, v):
    """The kernel that ships with JAX for Hopper; it computes in float16 and does not scale."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    backward = dict.fromkeys(
        ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64 if not causal else None
    )
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128 if q.shape[-1] <= 128 else 64, max_concurrent_steps=2,
        causal=causal, **backward,
    )  # fmt: skip
    half = lambda a: a.astype(jnp.float16)
    scaled = q.astype(jnp.float32) * q.shape[-1] ** -0.5
    return attention_mgpu.attention(half(scaled), half(k), half(v), config).astype(q.dtype)


def decode_contests(platform: str, dtype) -> list[Contest]:
    """One new token against full caches; bound by the bytes of the cache."""
    batch, length, heads, kv_heads, width = (
        (2, 2048, 4, 2, 64) if platform == "cpu" else (16, 32768, 32, 8, 128)
    )

    def sizes(batch, length):
        q = jax.ShapeDtypeStruct((batch, 1, heads, width), dtype)
        cache = jax.ShapeDtypeStruct((batch, kv_heads, length, width), dtype)
        return q, cache, cache

    def contender(backend):
        def run(q, k, v):
            lengths = jnp.full((q.shape[0],), k.shape[2], jnp.int32)
            return decode(q, ContiguousCache(k, v), lengths=lengths, backend=backend)

        return run

    def plain(q, k, v):
        tokens_first = lambda a: jnp.swapaxes(a, 1, 2)
        return jax.nn.dot_product_attention(
            q, tokens_first(k), tokens_first(v), implementation="xla"
        )

    def exact(q, k, v):
        return attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask=Full())

    q, k, v = sizes(batch, length)
    return [
        Contest(
            f"decoding, 1 token, {batch}x{length}x{heads}/{kv_heads}x{width}",
            _by_backend(DECODE_BACKENDS, platform, contender) | {"jax.nn": plain},
            (q, k, v),
            sizes(2, 512),
            exact,
            bytes=bytes_moved(q, ContiguousCache(k, v), np.full(batch, length)),
        )
    ]


def _by_backend(table, platform: str, contender: Callable) -> dict[str, Callable]:
    here = [name for name, b in table.items() if b.platforms is None or platform in b.platforms]
    return {name: contender(name) for name in reversed(here)}


def loss_contests(platform: str, dtype) -> list[Contest]:
    """The fused loss of linear logits with its gradients, compared with all logits in memory."""
    tokens, width, vocab = (512, 256, 8192) if platform == "cpu" else (8192, 4096, 131072)

    def sizes(tokens, width, vocab):
        x = jax.ShapeDtypeStruct((tokens, width), dtype)
        return x, jax.ShapeDtypeStruct((width, vocab), dtype), _ints(tokens)

    def graded(loss):
        return jax.grad(loss, (0, 1))

    def contender(backend):
        def loss(x, w, targets):
            weights = jnp.full(targets.shape, 1 / targets.size)
            return linear_cross_entropy(x, w, targets, weights=weights, backend=backend).loss

        return graded(loss)

    def plain(x, w, targets):
        logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - chosen).mean()

    return [
        Contest(
            f"linear cross-entropy with gradients, {tokens}x{width}x{vocab}",
            _by_backend(LOSS_BACKENDS, platform, contender) | {"all logits": graded(plain)},
            sizes(tokens, width, vocab),
            sizes(256, 128, 512),
            graded(plain),
            flops=6.0 * tokens * width * vocab,
            integers={2: 512},
        )
    ]


def _ints(*shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def grouped_contests(platform: str, dtype) -> list[Contest]:
    """The matmul of a mixture of experts, the same number of tokens for each; also `ragged_dot`."""
    rows, width, out, groups = (2048, 256, 256, 8) if platform == "cpu" else (65536, 4096, 2048, 64)

    def sizes(rows, width, out, groups):
        lhs = jax.ShapeDtypeStruct((rows, width), dtype)
        return lhs, jax.ShapeDtypeStruct((groups, width, out), dtype)

    def equal(function):
        def run(lhs, rhs):
            share = lhs.shape[0] // rhs.shape[0]
            return function(lhs, rhs, jnp.full((rhs.shape[0],), share, jnp.int32))

        return run

    contender = lambda name: equal(functools.partial(grouped_matmul, backend=name))
    return [
        Contest(
            f"grouped matmul, {rows}x{width}x{out}, {groups} groups",
            _by_backend(GROUPED_BACKENDS, platform, contender)
            | {"ragged_dot": equal(jax.lax.ragged_dot)},
            sizes(rows, width, out, groups),
            sizes(512, 128, 128, 4),
            lambda lhs, rhs: jnp.einsum(
                "gti,gio->gto", lhs.reshape(rhs.shape[0], -1, lhs.shape[1]), rhs
            ).reshape(lhs.shape[0], -1),
            flops=2.0 * rows * width * out,
        )
    ]


CONTESTS: dict[str, Callable[..., list[Contest]]] = {
    "attention": attention_contests,
    "decoding": decode_contests,
    "cross_entropy": loss_contests,
    "grouped_matmul": grouped_contests,
}


def random_arrays(sizes, integers: dict[int, int], seed: int = 0) -> tuple:
    """Normally distributed arrays of these shapes; integers where a bound is given."""
    keys = jax.random.split(jax.random.key(seed), len(sizes))

    def one(i, size):
        if i in integers:
            return jax.random.randint(keys[i], size.shape, 0, integers[i], size.dtype)
        scale = 1 / math.sqrt(size.shape[-2]) if len(size.shape) < 4 and i else 1
        return (scale * jax.random.normal(keys[i], size.shape, jnp.float32)).astype(size.dtype)

    return tuple(jax.jit(one, static_argnums=(0, 1))(i, size) for i, size in enumerate(sizes))
