"""Cross-entropy of linear logits, x @ w, without an array of [tokens, vocab] in memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import chunked_cross_entropy
from .choose import Backend, Rule, choose, kernels
from .chunked_cross_entropy import Spec, Tokens, losses
from .device import HOPPER

DTYPES = ("float32", "bfloat16", "float16", "float64")


class Operation(NamedTuple):
    """The functions of a backend; both as in `chunked_cross_entropy.py`."""

    per_token: Callable
    summed: Callable


class CrossEntropy(NamedTuple):
    """Float32, per token or summed; per token, `correct` is bool: no logit exceeds the target's."""

    loss: jax.Array  # nll + z_loss * lse**2
    nll: jax.Array  # -log softmax(logits)[target], in nats
    lse: jax.Array  # log of the softmax's denominator
    correct: jax.Array


def linear_cross_entropy(
    x,
    w,
    targets,
    *,
    weights=None,
    z_loss=0.0,
    logits_soft_cap=None,
    chunk_size=None,
    backend="auto",
) -> CrossEntropy:
    """Cross-entropy of softmax(x @ w) against integer targets.

    x        [..., tokens, embed]: float32, bfloat16, float16 (float64 under x64)
    w        [embed, vocab]: any of these dtypes, converted to that of x; its gradient is in its own
    targets  integers [..., tokens]; targets outside [0, vocab) are ignored: loss and nll are 0,
             without gradient, and never correct
    weights  None for per-token values, or numbers [..., tokens], treated as constants, for weighted
             sums over all tokens, of which only `loss` has a gradient
    z_loss   weight of lse**2 in the loss (Chowdhery et al. 2022, section 5)
    logits_soft_cap  None, or cap: logits become cap * tanh(logits / cap)
    chunk_size  for "xla": positions along `tokens` whose logits are in memory at the same time;
             None: about 2**25 logits, 0: all
    backend  "auto", "xla", or "tpu" or "gpu" where available

    Returns CrossEntropy of [..., tokens], or of [] with weights. Logits and softmax are float32.
    Differentiable in x and w (reverse mode). With weights, the "xla" backend computes the gradient
    along with the loss, which saves one of four matmuls: pass weights if they are known. Invalid
    arguments raise a one-line ValueError.
    """
    x, w, targets = jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets)
    weights = None if weights is None else jnp.asarray(weights)
    spec = _prepare(x, w, targets, weights, z_loss, logits_soft_cap, chunk_size)
    name, _ = choose(backend, BACKENDS, AUTO, x, w, spec)
    shape = targets.shape
    x = x.reshape(-1, *x.shape[-2:])
    # Wide enough to be compared with any vocabulary size.
    targets = targets.astype(jnp.promote_types(targets.dtype, jnp.int32)).reshape(x.shape[:2])
    weights = None if weights is None else weights.reshape(x.shape[:2]).astype(_stats(x.dtype))
    run = BACKENDS[name].run
    if weights is None:
        each = losses(run.per_token(x, w, targets, spec), targets, w.shape[1], spec.z_loss)
        return CrossEntropy(*(a.reshape(shape) for a in each))
    loss, *others = run.summed(x, w, targets, weights, spec)
    return CrossEntropy(loss, *jax.lax.stop_gradient(others))


def explain(x, w, targets, *, weights=None, z_loss=0.0, logits_soft_cap=None, chunk_size=None,
            backend="auto") -> str:  # fmt: skip
    """Which backend `linear_cross_entropy` would choose, and why; also takes ShapeDtypeStruct."""
    spec = _prepare(x, w, targets, weights, z_loss, logits_soft_cap, chunk_size)
    return ": ".join(choose(backend, BACKENDS, AUTO, x, w, spec))


def reference(x, w, targets, *, z_loss=0.0, logits_soft_cap=None) -> CrossEntropy:
    """The definition, per token, with all logits in memory."""
    dtype = _stats(x.dtype)
    logits = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=dtype, precision="highest")
    if logits_soft_cap:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    lse = jax.nn.logsumexp(logits, -1)
    chosen = jnp.sum(jnp.where(jnp.arange(w.shape[1]) == targets[..., None], logits, 0), -1)
    tokens = Tokens(lse, chosen, jnp.max(logits, -1))
    return CrossEntropy(*losses(tokens, targets, w.shape[1], z_loss))


def _stats(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _prepare(x, w, targets, weights, z_loss, logits_soft_cap, chunk_size) -> Spec:
    _check(x, w, targets, weights)
    if not isinstance(z_loss, numbers.Real) or not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss is {z_loss!r}; allowed: a finite number >= 0")
    cap = logits_soft_cap
    if cap is not None and not (isinstance(cap, numbers.Real) and cap > 0 and math.isfinite(cap)):
        raise ValueError(f"logits_soft_cap is {cap!r}; allowed: None or a finite number > 0")
    if chunk_size is not None and (not isinstance(chunk_size, numbers.Integral) or chunk_size < 0):
        raise ValueError(f"chunk_size is {chunk_size!r}; allowed: None or an integer >= 0")
    return Spec(cap if cap is None else float(cap), float(z_loss), chunk_size)


def _check(x, w, targets, weights):
    if len(x.shape) < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [..., tokens, embed]")
    if len(w.shape) != 2:
        raise ValueError(f"w has shape {tuple(w.shape)}; allowed: [embed, vocab]")
    for name, a in (("x", x), ("w", w)):
        if str(a.dtype) not in DTYPES:
            raise ValueError(f"{name} has dtype {a.dtype}; allowed: {', '.join(DTYPES)}")
        if 0 in a.shape:
            raise ValueError(f"{name} has shape {tuple(a.shape)}; every size must be >= 1")
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"x has embed={x.shape[-1]} and w embed={w.shape[0]}; they must be equal")
    per_token = tuple(x.shape[:-1])
    if tuple(targets.shape) != per_token or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, dtype {targets.dtype}; "
            f"allowed: integers [..., tokens]={list(per_token)}"
        )
    if weights is None:
        return
    if tuple(weights.shape) != per_token or jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, dtype {weights.dtype}; "
            f"allowed: None or numbers [..., tokens]={list(per_token)}"
        )


BACKENDS: dict[str, Backend] = {
    "xla": Backend(Operation(chunked_cross_entropy.per_token, chunked_cross_entropy.summed)),
    "tpu": kernels(Operation, "tpu.linear_cross_entropy", "tpu"),
    "gpu": kernels(Operation, "gpu.linear_cross_entropy", "gpu", HOPPER),
}

# The first rule that holds and whose backend can run the call decides.
AUTO: tuple[Rule, ...] = (
    Rule("tpu", "the kernels: logits stay in VMEM"),
    Rule("gpu", "the kernel: logits stay in registers; the gradient in chunks"),
    Rule("xla", "one chunk of tokens at a time"),
)
