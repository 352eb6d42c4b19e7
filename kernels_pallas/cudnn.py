"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax

from .masks import And, Causal, Full, Mask, Window
from .spec import Operands, Spec, Unsupported

DTYPES = ("bfloat16", "float16")


def check(x: Operands, spec: Spec, needs_lse: bool = False):
    """Raises Unsupported(reason) for calls that cuDNN or jax's interface to it does not support."""
    _, q_length, _, head_dim = x.q.shape
    if jax.default_backend() != "gpu":
        raise Unsupported("cuDNN compiles only on a machine with the GPU")
    if str(x.q.dtype) not in DTYPES:
        raise Unsupported(f"dtype {x.q.dtype}; allowed: {', '.join(DTYPES)}")
    capability = compute_capability()
    if capability < 8:
        raise Unsupported(f"compute capability {capability}; allowed: 8.0 and later")
    limit = 256 if capability >= 9 else 128
    if head_dim > limit or head_dim % 8:
        raise Unsupported(f"head_dim {head_dim}; allowed: multiples of 8 up to {limit}")
    if needs_lse:
        raise Unsupported("return_lse; cuDNN's log-sum-exp has no gradient")
    window(spec.mask)
    causal = spec.mask != Full()
    if causal and (spec.q_offset != 0 or q_length != x.k.shape[1]):
        raise Unsupported(
            f"q_offset {'as an array' if spec.q_offset is None else spec.q_offset}, q_length "
            f"{q_length} and kv_length {x.k.shape[1]}; allowed: 0 and equal lengths"
        )
    features = dict(
        bias=x.bias,
        Alibi=x.slopes,
        segment_ids=x.q_segment_ids,
        sinks=x.sinks,
        logits_soft_cap=spec.logits_soft_cap,
    )
    for name, value in features.items():
        if value is not None:
            raise Unsupported(f"{name}; not supported with cuDNN")


def compute_capability() -> float:
    """The compute capability of this machine's GPU: 8.0 for an A100, 9.0 for an H100 or H200."""
    return float(jax.local_devices()[0].compute_capability)


def window(mask: Mask) -> int | None:
    """How far back a causal query looks at most; None without a limit (or without a mask).

    Raises Unsupported for masks other than Full, Causal and a window to the left.
    """
    parts = mask.masks if isinstance(mask, And) else (mask,)
    lefts = [m.left for m in parts if isinstance(m, Window)]
    causal = Causal() in parts or any(isinstance(m, Window) and m.right == 0 for m in parts)
    known = all(isinstance(m, Causal | Window) for m in parts)
    if mask != Full() and not (causal and known):
        raise Unsupported(f"mask {mask}; allowed: Full, Causal, a window to the left")
    return min(lefts, default=None)


def attention(x: Operands, spec: Spec):
    """(out like x.q, None): no log-sum-exp, since cuDNN's has no gradient."""
    left = window(spec.mask)
    out = jax.nn.dot_product_attention(
        x.q,
        x.k,
        x.v,
        scale=spec.scale,
        is_causal=spec.mask != Full(),
        local_window_size=None if left is None else (left, 0),
        implementation="cudnn",
    )
    return out, None
