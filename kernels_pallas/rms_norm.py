"""Root-mean-square normalization of a residual stream, in XLA only.

A kernel would gain too little. Compiled on its own for v5e and H200 (8,192 rows of 4,096, bfloat16,
jax 0.10 and 0.12), it takes XLA two passes: forward it reads x, residual and h and writes h and the
result, 5 arrays where one pass moves 4; backward it moves 6 where one pass moves 4. In a layer of
218 million weights at this width, with two norms, the arrays saved are 0.5 % of the layer's time at
60 % of v5e's peak, and 0.4 % at 70 % of what H200's matmuls reach (predicted from the bandwidths in
the datasheets). The compiler also fuses the sum into the matmul that produces x, which shrinks the
gain further.
"""

from __future__ import annotations

import functools
import math
import numbers

import jax
import jax.numpy as jnp

from .choose import Backend, Rule, choose

DTYPES = ("float32", "bfloat16", "float16", "float64")


def rms_norm(x, scale, residual=None, *, eps=1e-6, backend="auto") -> tuple[jax.Array, jax.Array]:
    """(h / sqrt(mean(h^2) + eps) * scale, h) with h = x + residual (Zhang & Sennrich 2019, eq. 4).

    x         [..., features]: float32, bfloat16, float16 (float64 under x64)
    scale     [features], of any of these dtypes
    residual  None, or like x: the stream that x is added to
    eps       added to the mean square
    backend   "auto" or "xla"

    Returns (normed, h), both like x. The sum is rounded to the dtype of x; statistics and the rest
    of the computation are float32. The backward pass keeps h and one number per row. Invalid
    arguments raise a one-line ValueError.
    """
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    residual = None if residual is None else jnp.asarray(residual)
    _check(x, scale, residual, eps)
    name, _ = choose(backend, BACKENDS, AUTO, x, scale)
    h = x if residual is None else x + residual
    return BACKENDS[name].run(h, scale, float(eps)), h


def reference(x, scale, residual=None, *, eps=1e-6) -> tuple[jax.Array, jax.Array]:
    """The definition, in the dtype of x."""
    h = x if residual is None else x + residual
    return h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + eps) * scale, h


def _check(x, scale, residual, eps):
    if len(x.shape) < 1 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [..., features], each >= 1")
    for name, a in (("x", x), ("scale", scale)):
        if str(a.dtype) not in DTYPES:
            raise ValueError(f"{name} has dtype {a.dtype}; allowed: {', '.join(DTYPES)}")
    if tuple(scale.shape) != (x.shape[-1],):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; allowed: [features]=[{x.shape[-1]}]"
        )
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, dtype {residual.dtype}; "
            f"allowed: None or like x, {tuple(x.shape)}, {x.dtype}"
        )
    if not isinstance(eps, numbers.Real) or not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps is {eps!r}; allowed: a finite number >= 0")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalized(h, scale, eps):
    return _forward(h, scale, eps)[0]


def _forward(h, scale, eps):
    wide = _wide(h)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    normed = wide * inverse * scale.astype(wide.dtype)
    return normed.astype(h.dtype), (h, scale, inverse)


def _backward(eps, residuals, grad):
    h, scale, inverse = residuals
    unit, grad = _wide(h) * inverse, _wide(grad)
    scale_grad = jnp.sum(grad * unit, tuple(range(h.ndim - 1)))
    grad = grad * scale.astype(grad.dtype)
    h_grad = inverse * (grad - unit * jnp.mean(grad * unit, -1, keepdims=True))
    return h_grad.astype(h.dtype), scale_grad.astype(scale.dtype)


_normalized.defvjp(_forward, _backward)


def _wide(a):
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


BACKENDS: dict[str, Backend] = {"xla": Backend(_normalized)}

AUTO: tuple[Rule, ...] = (Rule("xla", "one fusion reads and writes each array once"),)
