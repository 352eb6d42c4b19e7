"""The decoding kernel for Hopper in an interpreter that detects races; and unsupported calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import Causal, Unsupported, Window
from kernels_pallas.caches import ContiguousCache, Int8, PagedCache
from kernels_pallas.choose import Backend
from kernels_pallas.decoding import BACKENDS, Call
from kernels_pallas.gpu import decode as kernel
from kernels_pallas.spec import Spec

from .cases import close
from .decode_cases import decoded, make, whole

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax has no interpreter for Mosaic GPU"
)
SMALL = dict(capacity=192, heads=4, kv_heads=2, head_dim=64, dtype=jnp.bfloat16)


@interpreted
@pytest.mark.depends_on("interpreted GPU kernels")
@pytest.mark.parametrize(
    "kind, features",
    [
        ("contiguous", dict(mask=Window(70), q_length=2, sinks=True, logits_soft_cap=2.0)),
        pytest.param("paged", dict(page_size=16, alibi=True, q_length=1), marks=pytest.mark.smoke),
        ("ring", dict(mask=Window(100), ring=128, q_length=3)),
    ],
)
def test_matches_the_last_rows_of_the_full_call(kind, features, monkeypatch):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    settings = kernel.Settings(stages=2, interpret=interpret)
    run = functools.partial(kernel.attention, settings=settings)
    monkeypatch.setitem(BACKENDS, "xla", Backend(run))
    q, cache, k, v, options = make(kind, lengths=np.array([100, 0, 190]), **SMALL, **features)
    want = whole(*(np.float32(a) for a in (q, k, v)), options)
    theirs = whole(q, k, v, options)
    for splits in (1, 2) if kind == "contiguous" else (2,):
        got = decoded(q, cache, options, splits=splits)
        close(got[1], want[1], 2e-6)
        assert _error(got[0], want[0]) <= 1.2 * _error(theirs[0], want[0])


def _error(got, want):
    return np.sqrt(np.mean((np.float64(got) - np.float64(want)) ** 2))


def test_fewest_splits_that_keep_all_processors_busy():
    for lines, splits in ((64, 2), (132, 1), (8, 16), (1, 126)):
        assert kernel._splits(lines, 512) == splits
    assert kernel._splits(8, 4) == 4


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def call(q=(2, 2, 4, 1, 128), dtype=jnp.bfloat16, cache=None, length=64):
    cache = cache or ContiguousCache(*[shape(2, 2, length, q[-1], dtype=dtype)] * 2)
    return Call(shape(*q, dtype=dtype), cache, shape(2, dtype=jnp.int32))


def pages(size):
    return PagedCache(*[shape(9, 2, size, 128)] * 2, shape(2, 64, dtype=jnp.int32))


INT8 = Int8(shape(2, 2, 64, 128, dtype=jnp.int8), shape(2, 2, 64, dtype=jnp.float32))


@pytest.mark.parametrize(
    "refused, match",
    [
        (call(dtype=jnp.float32), "dtype float32; allowed: bfloat16, float16"),
        (call(q=(2, 2, 4, 1, 96)), "head_dim 96; allowed: 64, 128, 256"),
        (call(q=(2, 2, 8, 9, 128)), "8 heads per key head times q_length 9; allowed: at most 64"),
        (call(length=100), "a cache of length 100; allowed: multiples of 64"),
        (call(cache=pages(12)), "page_size 12; allowed: multiples of 64, also pages of 8, 16, 32"),
        (call(cache=ContiguousCache(INT8, INT8)), "an int8 cache"),
    ],
)
def test_unsupported_calls(refused, match):
    with pytest.raises(Unsupported, match=match):
        kernel.check(refused, Spec(Causal(), 1.0))
