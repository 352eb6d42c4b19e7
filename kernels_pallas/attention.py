"""The public function: checks its arguments, chooses a backend and runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from . import choose, chunked, cudnn, device, piece_gradients, reference
from .choose import Rule, lazily
from .device import HOPPER
from .masks import Causal
from .spec import Operands, Spec
from .validate import prepare


@dataclass(frozen=True)
class Backend(choose.Backend):
    """`run(operands, spec) -> (out, lse)`; `check(operands, spec, needs_lse)`.

    `gradients(operands, spec, dout, lse, delta) -> Operands` is for ring attention, where lse and
    delta (the sum of out * dout minus the gradient of lse), both float32 [batch, heads, q_length],
    belong to a softmax over more keys than the operands hold.
    """

    gradients: Callable = piece_gradients.gradients


def _kernel(module: str, platform: str, **chips) -> Backend:
    """The backend in a module with `attention`, `check` and `gradients`."""
    check = lazily(module, "check")
    return Backend(
        lazily(module, "attention"),
        (platform,),
        lambda x, spec, needs_lse: check(x, spec),
        gradients=lazily(module, "gradients"),
        **chips,
    )


BACKENDS: dict[str, Backend] = {
    "xla": Backend(reference.attention),
    "xla_chunked": Backend(chunked.attention),
    "tpu": _kernel("tpu.flash", "tpu"),
    "gpu": _kernel("gpu.flash", "gpu", chips=HOPPER),
    "cudnn": Backend(cudnn.attention, ("gpu",), cudnn.check),
}

SMALL_SCORES = 2**22  # scores of one head of one row

# The first rule that holds and whose backend can run the call decides.
AUTO: tuple[Rule, ...] = (
    Rule(
        "xla",
        "q_length <= 16: decoding, nothing to split into blocks",
        lambda x, spec, needs_lse, platform: x.q.shape[1] <= 16,
    ),
    Rule("tpu", "the flash kernel, forward and backward"),
    Rule("cudnn", "cuDNN's kernel, the fastest published for the calls it supports"),
    Rule("gpu", "the flash kernel for Hopper, forward and backward"),
    Rule(
        "xla",
        "q_offset is an array: no keys can be skipped, and the scores are small",
        lambda x, spec, needs_lse, platform: (
            spec.q_offset is None and x.q.shape[1] * x.k.shape[1] <= SMALL_SCORES
        ),
    ),
    Rule(
        "xla_chunked",
        "on cpu, blocks of queries are faster and skip what the mask hides",
        lambda x, spec, needs_lse, platform: platform == "cpu",
    ),
    Rule(
        "xla_chunked",
        "kv_length >= 2048: memory linear in length",
        lambda x, spec, needs_lse, platform: x.k.shape[1] >= 2048,
    ),
    Rule("xla", "short: all scores in memory"),
)


def attention(
    q,
    k,
    v,
    *,
    mask=Causal(),  # noqa: B008 (frozen)
    bias=None,
    segment_ids=None,
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    q_offset=0,
    backend="auto",
    return_lse=False,
):
    """Softmax attention: scale, soft cap, bias and mask in that order, softmax in float32.

    q            [batch, q_length, heads, head_dim]: float32, bfloat16, float16 (float64 under x64)
    k, v         [batch, kv_length, kv_heads, head_dim]; heads a multiple of kv_heads (grouped
                 queries: head h uses key head h // (heads // kv_heads)); never repeated in memory
    mask         a `kernels_pallas.masks.Mask` over positions (query i is at q_offset + i)
    bias         None, Alibi(slopes [heads]), or an array that broadcasts to
                 [batch, heads, q_length, kv_length]
    segment_ids  None, ints [batch, length] for equal lengths, or a pair ([batch, q_length],
                 [batch, kv_length]): a query sees only keys with its own id
    scale        None for head_dim**-0.5, or a number
    logits_soft_cap  None, or cap: logits become cap * tanh(logits / cap)
    sinks        None, or [heads]: one extra logit per head in the softmax's denominator
    q_offset     position of the first query (key 0 is at 0): an int, or ints [batch] or a traced
                 scalar, with which no keys can be skipped
    backend      "auto" or one of `backends()`
    return_lse   also return the log of the softmax's denominator, including the sink

    Returns out like q, or (out, lse [batch, heads, q_length] float32). A query that sees no key has
    out 0 and lse -inf (or its sink). Invalid arguments raise a one-line ValueError.
    """
    operands, spec = prepare(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        segment_ids=segment_ids,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        q_offset=q_offset,
    )
    operands = jax.tree.map(jnp.asarray, operands)
    name, _ = resolve(backend, operands, spec, needs_lse=return_lse)
    out, lse = BACKENDS[name].run(operands, spec)
    return (out, lse) if return_lse else out


def explain(q, k, v, *, backend="auto", return_lse=False, **call) -> str:
    """Which backend `attention` would choose for the same arguments, and why; runs nothing.

    Also takes jax.ShapeDtypeStruct in place of arrays. Same errors as `attention`.
    """
    name, reason = resolve(backend, *prepare(q, k, v, **call), needs_lse=return_lse)
    return f"{name} on {device.platform()}: {reason}"


def backends(platform: str | None = None) -> tuple[str, ...]:
    """The names of the backends that `platform` ("cpu", "gpu", "tpu"; None: this one) can run."""
    return choose.backends(BACKENDS, platform)


def resolve(
    backend: str, operands: Operands, spec: Spec, *, needs_lse: bool = False
) -> tuple[str, str]:
    """(name, reason) of the backend that runs a call. ValueError if the requested one cannot."""
    return choose.choose(backend, BACKENDS, AUTO, operands, spec, needs_lse)
