"""Attention calls for the tests: every feature, separately and combined."""

import functools

import jax
import numpy as np

from kernels_pallas import Alibi, Causal, Chunked, Full, Prefix, Window, attention

# name: arguments of `make`. Lengths are odd on purpose.
FEATURES = {
    "causal": {},
    "full, grouped": dict(mask=Full(), kv_heads=2),
    "window, offset, multi-query": dict(mask=Window(9), q_offset=11, kv_heads=1),
    "two-sided window, segments": dict(mask=Window(6, 5), segments=True),
    "prefix, soft cap": dict(mask=Prefix(20), logits_soft_cap=1.5),
    "chunked, sinks": dict(mask=Chunked(16) & Causal(), sinks=True, kv_heads=2),
    "alibi, segments, array offset": dict(alibi=True, segments=True, offsets=True, kv_heads=2),
    "full bias, sinks": dict(bias=(2, 4, "q", "k"), sinks=True, kv_heads=2),
    "broadcast bias, soft cap": dict(bias=("q", 1), mask=Prefix(5), logits_soft_cap=2.0),
    "no key for some": dict(mask=Window(3), q_offset=-10, segments=True, kv_heads=2),
    "none past the keys": dict(mask=Window(3), q_offset=30, sinks=True, scale=0.7),
    "everything": dict(
        mask=Window(30, 2) & Prefix(40),
        kv_heads=2,
        segments=True,
        alibi=True,
        sinks=True,
        logits_soft_cap=3.0,
        q_offset=4,
        scale=0.4,
    ),
}


def make(
    *,
    batch=2,
    q_length=53,
    kv_length=61,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mask=Causal(),  # noqa: B008
    bias=None,
    alibi=False,
    segments=False,
    sinks=False,
    offsets=False,
    q_offset=0,
    **static,
):
    """(arrays, static) for `attention(**arrays, **static)`; numpy, because jax would compile a
    program for every random array."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    arrays = dict(
        q=normal(batch, q_length, heads, head_dim),
        k=normal(batch, kv_length, kv_heads, head_dim),
        v=normal(batch, kv_length, kv_heads, head_dim),
    )
    if bias is not None:
        arrays["bias"] = normal(*({"q": q_length, "k": kv_length}.get(n, n) for n in bias))
    if alibi:
        arrays["bias"] = Alibi(np.linspace(0.1, 0.4, heads, dtype=np.float32))
    if sinks:
        arrays["sinks"] = normal(heads)
    static.update(mask=mask, q_offset=q_offset)
    if offsets:
        static["q_offset"] = np.arange(batch) * 7 - 3
    if segments:
        ids = np.arange(max(q_length, kv_length)) // 23 + np.zeros((batch, 1), int)
        # No key has id 5, so these queries see nothing.
        q_ids = np.where(np.arange(q_length) % 17 == 3, 5, ids[:, :q_length])
        static["segment_ids"] = (q_ids, ids[:, :kv_length])
    return arrays, static


FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time


def run(arrays, static, backend="auto", return_lse=False):
    """attention(**arrays, **static), compiled with FAST."""
    call = functools.partial(attention, **static, backend=backend, return_lse=return_lse)
    return jax.jit(lambda arrays: call(**arrays), compiler_options=FAST)(arrays)


def finished(function, *arguments):
    """The result of function(*arguments) once it is ready. Pallas's interpreters compute inside
    callbacks, and a program dispatched while one is running can deadlock with it."""
    return jax.block_until_ready(function(*arguments))


def close(got, want, tolerance):
    """Asserts that `got` equals `want` within `tolerance` times the largest magnitude in `want`,
    with infinities in the same places."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = max(1.0, np.abs(np.where(np.isfinite(b), b, 0)).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size)
