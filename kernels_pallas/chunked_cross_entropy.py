"""The XLA backend of the fused linear cross-entropy: one chunk of tokens at a time.

Only one chunk's logits are in memory at a time. If the weights of the tokens are given, the forward
pass computes the gradient of the weighted sum along with the loss, from the same logits (three
matmuls). If per-token losses are returned, the backward pass recomputes the logits (four matmuls).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# If the caller chooses no chunk size: logits per chunk, or a share of all logits if that is more.
# Each chunk reads and writes the gradient of w once, so many chunks are slow.
CHUNK_LOGITS, MAX_CHUNKS = 2**25, 20


class Spec(NamedTuple):
    """The static part of a call. chunk_size: positions per chunk; None: automatic, 0: all."""

    logits_soft_cap: float | None = None
    z_loss: float = 0.0
    chunk_size: int | None = None


class Tokens(NamedTuple):
    """Per token, float32: log of the softmax's denominator, the target's logit (0 for a target
    outside the vocabulary), and the largest logit."""

    lse: jax.Array
    chosen: jax.Array
    top: jax.Array


# Arrays below: x [rows, length, embed], w [embed, vocab] in any float dtype, targets and per-token
# values [rows, length]. Chunks split `length`, so that rows sharded over a mesh do not move.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def per_token(x, w, targets, spec: Spec) -> Tokens:
    """`Tokens` of all tokens; differentiable except for `top`."""
    split, join = _chunks(x, w, spec)
    step = lambda _, chunk: (None, _tokens(chunk[0], w, chunk[1], spec)[0])
    return jax.tree.map(join, jax.lax.scan(step, None, (split(x), split(targets)))[1])


def _per_token_forward(x, w, targets, spec):
    out = per_token(x, w, targets, spec)
    return out, (x, w, targets, out.lse)


def per_token_backward(spec, residuals, grads: Tokens):
    """The gradients of x, w and targets; residuals (x, w, targets, lse)."""
    x, w, targets, lse = residuals
    split, join = _chunks(x, w, spec)

    def step(w_grad, chunk):
        x, targets, lse, grad_lse, grad_chosen = chunk
        logits = _logits(x, w, spec)
        x_grad, more = _gradients(x, w, targets, logits, lse, grad_lse, grad_chosen, spec)
        return w_grad + more, x_grad.astype(x.dtype)

    start = jnp.zeros(w.shape, _sum_dtype(x.dtype))
    chunks = tuple(map(split, (x, targets, lse, grads.lse, grads.chosen)))
    w_grad, x_grad = jax.lax.scan(step, start, chunks)
    return join(x_grad), w_grad.astype(w.dtype), None


per_token.defvjp(_per_token_forward, per_token_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed(x, w, targets, weights, spec: Spec) -> jax.Array:
    """[4]: loss, nll, lse and correct, each summed with `weights`; only loss has a gradient, and
    only with respect to x and w."""
    split, _ = _chunks(x, w, spec)

    def step(sums, chunk):
        x, targets, weights = chunk
        tokens, _ = _tokens(x, w, targets, spec)
        return sums + weighted_sums(tokens, targets, weights, w.shape[1], spec), None

    start = jnp.zeros(4, _sum_dtype(x.dtype))
    return jax.lax.scan(step, start, tuple(map(split, (x, targets, weights))))[0]


def summed_forward(x, w, targets, weights, spec):
    """(as `summed`, the gradients of loss with respect to x and w)."""
    split, join = _chunks(x, w, spec)

    def step(carry, chunk):
        sums, w_grad = carry
        x, targets, weights = chunk
        tokens, logits = _tokens(x, w, targets, spec)
        counted = jnp.where(known(targets, w.shape[1]), weights, 0)
        grad_lse = counted * (1 + 2 * spec.z_loss * tokens.lse)
        x_grad, more = _gradients(x, w, targets, logits, tokens.lse, grad_lse, -counted, spec)
        sums = sums + weighted_sums(tokens, targets, weights, w.shape[1], spec)
        return (sums, w_grad + more), x_grad

    dtype = _sum_dtype(x.dtype)
    start = (jnp.zeros(4, dtype), jnp.zeros(w.shape, dtype))
    (sums, w_grad), x_grad = jax.lax.scan(step, start, tuple(map(split, (x, targets, weights))))
    # Rounded only after scaling: float16 may hold the gradient of the mean, but not of the sum.
    return sums, (join(x_grad), w_grad, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def summed_backward(spec, residuals, grad):
    x_grad, w_grad, like_x, like_w = residuals
    scaled = lambda a, like: (a * grad[0]).astype(like.dtype)
    return scaled(x_grad, like_x), scaled(w_grad, like_w), None, None


summed.defvjp(summed_forward, summed_backward)


def known(targets, vocab: int):
    """Whether each target is in the vocabulary; the others are ignored."""
    return (targets >= 0) & (targets < vocab)


def indices(targets, vocab: int):
    """The targets as int32, ignored ones as -1."""
    return jnp.where(known(targets, vocab), targets.astype(jnp.int32), -1)


def losses(tokens: Tokens, targets, vocab: int, z_loss: float):
    """(loss, nll, lse, correct) of each token; 0, except lse, where the target is ignored."""
    counted = known(targets, vocab)
    nll = jnp.where(counted, tokens.lse - tokens.chosen, 0)
    loss = nll + jnp.where(counted, z_loss * jnp.square(tokens.lse), 0) if z_loss else nll
    return loss, nll, tokens.lse, counted & (tokens.chosen >= tokens.top)


def weighted_sums(tokens: Tokens, targets, weights, vocab: int, spec: Spec):
    """[4], as in `summed`."""
    each = losses(tokens, targets, vocab, spec.z_loss)
    return jnp.stack([jnp.sum(a * weights) for a in each])


def _chunks(x, w, spec: Spec):
    """(split: [rows, length, ...] to [chunks, rows, size, ...], join: back). The last chunk is
    padded with zeros, whose weights and gradients are 0."""
    rows, length = x.shape[:2]
    size = spec.chunk_size
    if size is None:
        size = max(1, CHUNK_LOGITS // (rows * w.shape[1]), -(-length // MAX_CHUNKS))
    size = min(size, length) or length
    pad = -length % size

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)) if pad else a
        return jnp.moveaxis(a.reshape(rows, -1, size, *a.shape[2:]), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 1).reshape(rows, length + pad, *a.shape[3:])[:, :length]

    return split, join


def _logits(x, w, spec: Spec):
    """float32 logits; the matmul in the dtype of x."""
    logits = _einsum("...e,ev->...v", x, w.astype(x.dtype))
    cap = spec.logits_soft_cap
    return cap * jnp.tanh(logits / cap) if cap else logits


def _tokens(x, w, targets, spec: Spec):
    """(Tokens, logits)."""
    logits = _logits(x, w, spec)
    lse = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1, mode="clip")
    chosen = jnp.where(known(targets, w.shape[1]), chosen[..., 0], 0)
    return Tokens(lse, chosen, jnp.max(logits, -1)), logits


def _gradients(x, w, targets, logits, lse, grad_lse, grad_chosen, spec: Spec):
    """Gradients of x and w in float32, given those of lse and of the target's logit."""
    probabilities = jnp.exp(logits - lse[..., None])
    is_target = jnp.arange(w.shape[1]) == targets[..., None]
    grad = grad_lse[..., None] * probabilities + jnp.where(is_target, grad_chosen[..., None], 0)
    if spec.logits_soft_cap:
        grad = grad * (1 - jnp.square(logits / spec.logits_soft_cap))
    grad = grad.astype(x.dtype)
    x_grad = _einsum("...v,ev->...e", grad, w.astype(x.dtype))
    return x_grad, _einsum("rle,rlv->ev", x, grad)


def _sum_dtype(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _einsum(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=_sum_dtype(a.dtype))
