"""Next-token cross-entropy without `[batch, length, vocabulary]` logits."""

import functools

import jax
import jax.numpy as jnp

from genai_jax.networks.transformer import output_logits


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_size: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums the loss over the targets, a chunk of positions at a time.

    A chunk's gradient is computed beside its loss, in the forward pass, so neither its logits nor
    their gradient outlive it and the head's matmul is never repeated.

    Args:
      hidden: [batch, length, embed_dim].
      kernel: output embedding, [embed_dim, vocabulary].
      targets: [batch, length] integers.
      mask: [batch, length] weights of the targets, float32.
      z_loss: weight of the squared log-normalizer (Chowdhery et al. 2022, section 5).
      soft_cap: tanh cap of the logits.
      chunk_size: positions a chunk; 0 takes all at once.

    Returns:
      Three float32 numbers: the loss to differentiate, summed over targets; the negative
      log-likelihood in nats alone, summed; the number of targets predicted right.
    """
    length = hidden.shape[1]
    size = min(chunk_size, length) if chunk_size else length
    pad = -length % size
    if pad:
        widen = lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        hidden, targets, mask = widen(hidden), widen(targets), widen(mask)
    chunk_loss = functools.partial(_chunk_loss, z_loss=z_loss, soft_cap=soft_cap)
    if size == length:
        return chunk_loss(hidden, kernel, targets, mask)
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
    return _chunked(chunk_loss, split(hidden), kernel, split(targets), split(mask))


def _chunk_loss(hidden, kernel, targets, mask, *, z_loss, soft_cap):
    logits = output_logits(hidden, kernel, soft_cap)
    log_normalizer = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll = jnp.sum((log_normalizer - chosen) * mask)
    loss = nll + z_loss * jnp.sum(jnp.square(log_normalizer) * mask) if z_loss else nll
    right = jnp.sum((chosen >= jnp.max(logits, -1)) * mask)
    return loss, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk_loss, hidden, kernel, targets, mask):
    """`hidden`, `targets` and `mask` carry the chunks on their first axis."""

    def body(totals, chunk):
        h, t, m = chunk
        return jax.tree.map(jnp.add, totals, chunk_loss(h, kernel, t, m)), None

    return jax.lax.scan(body, (jnp.float32(0),) * 3, (hidden, targets, mask))[0]


def _chunked_forward(chunk_loss, hidden, kernel, targets, mask):
    def body(carry, chunk):
        totals, kernel_grad = carry
        h, t, m = chunk
        loss, pullback, rest = jax.vjp(
            lambda h, w: (lambda out: (out[0], out[1:]))(chunk_loss(h, w, t, m)),
            h,
            kernel,
            has_aux=True,
        )
        h_grad, w_grad = pullback(jnp.ones_like(loss))
        totals = jax.tree.map(jnp.add, totals, (loss, *rest))
        return (totals, kernel_grad + w_grad), h_grad

    start = ((jnp.float32(0),) * 3, jnp.zeros_like(kernel))
    (totals, kernel_grad), hidden_grad = jax.lax.scan(body, start, (hidden, targets, mask))
    return totals, (hidden_grad, kernel_grad)


def _chunked_backward(chunk_loss, residuals, cotangents):
    hidden_grad, kernel_grad = residuals
    scale = cotangents[0]  # the other two outputs only report
    return (hidden_grad * scale).astype(hidden_grad.dtype), kernel_grad * scale, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
