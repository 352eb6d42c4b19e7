"""The decoding kernel for TPU in an interpreter that detects races, on two cores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Causal, Chunked, Prefix, Unsupported, Window
from kernels_pallas.caches import ContiguousCache, Int8, PagedCache
from kernels_pallas.choose import Backend
from kernels_pallas.decoding import BACKENDS, Call
from kernels_pallas.spec import Spec
from kernels_pallas.tpu import decode as kernel

from .cases import close
from .decode_cases import decoded, make, whole

pytestmark = pytest.mark.depends_on("interpreted TPU kernels")

LENGTHS = np.array([13, 0, 31])
SMALL = dict(lengths=LENGTHS, capacity=32, heads=4, kv_heads=2)


@pytest.fixture
def interpreted(monkeypatch):
    """Replaces the backend "xla" by the interpreted kernel."""

    def install(**more):
        interpret = pltpu.InterpretParams(uninitialized_memory="nan", **more)
        settings = kernel.Settings(block=16, interpret=interpret)
        run = functools.partial(kernel.attention, settings=settings)
        monkeypatch.setitem(BACKENDS, "xla", Backend(run))

    return install


@pytest.mark.parametrize(
    "kind, features",
    [
        ("contiguous", dict(mask=Window(9), alibi=True, sinks=True, logits_soft_cap=1.5)),
        ("ring", dict(mask=Window(9), ring=20, q_length=2)),
        ("paged", dict(mask=Prefix(9), sinks=True, int8=True, q_length=1)),
    ],
)
def test_two_cores_do_not_race(kind, features, interpreted, capfd):
    interpreted(detect_races=True, num_cores_or_threads=2)
    q, cache, k, v, options = make(kind, **SMALL, **features)
    got = decoded(q, cache, options, splits=2)
    if isinstance(cache.k, Int8):
        k, v = (_rounded(a) for a in (k, v))
    close(got, whole(q, k, v, options), 2e-6)
    assert "RACE" not in "".join(capfd.readouterr())


def _rounded(x):
    scales = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scales).astype(np.float32) * scales


def test_number_of_splits_does_not_change_the_result(interpreted):
    interpreted()
    q, cache, k, v, options = make("paged", **SMALL, mask=Chunked(20) & Causal(), q_length=1)
    want = whole(q, k, v, options)
    for splits in (1, 5):
        close(decoded(q, cache, options, splits=splits), want, 2e-6)


def test_visits_are_the_visible_blocks():
    cache = ContiguousCache.empty(4, 64, 1, 8, np.float32)
    plan = kernel.Plan(Spec(Window(9), 1.0), 2, 16, 1, 2, False)
    visits = kernel._visits(cache, jnp.array([40, 0, 64, 3]), plan)
    total, steps = int(visits.total[0]), int(visits.steps[0])
    # Row 0 sees keys 29 to 39, row 2 keys 53 to 63, row 3 keys 0 to 2.
    assert (total, steps) == (4, 2)
    assert visits.row[:total].tolist() == [0, 0, 2, 3]
    assert visits.block[:total].tolist() == [1, 2, 3, 0]
    assert (np.asarray(visits.row) < 4).all() and (np.asarray(visits.block) < 4).all()


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def call(q=(2, 2, 4, 1, 128), dtype=jnp.bfloat16, cache=None):
    q = shape(*q, dtype=dtype)
    cache = cache or ContiguousCache(*[shape(2, 2, 64, q.shape[-1], dtype=dtype)] * 2)
    return Call(q, cache, shape(2, dtype=jnp.int32))


def pages(size, dtype, rows=2, per_row=4):
    k = shape(9, 2, size, 128, dtype=dtype)
    k = Int8(k, shape(9, 2, size, dtype=jnp.float32)) if dtype == jnp.int8 else k
    return PagedCache(k, k, shape(rows, per_row, dtype=jnp.int32))


@pytest.mark.parametrize(
    "refused, match",
    [
        (call(dtype=jnp.float16), "dtype float16; allowed: float32, bfloat16"),
        (call(q=(2, 2, 4, 1, 12)), "head_dim 12; allowed: multiples of 8 up to 256"),
        (call(q=(2, 2, 4, 17, 128)), "q_length 17; allowed: at most 16"),
        (call(cache=pages(8, jnp.bfloat16)), "page_size 8 of bfloat16; allowed: multiples of 16"),
        (call(cache=pages(64, jnp.int8)), "page_size 64 of int8; allowed: multiples of 128"),
        (
            call(q=(512, 2, 4, 1, 128), cache=pages(16, jnp.bfloat16, 512, 2048)),
            "512 rows of 32768 slots need 4718592 bytes of visits and pages; allowed: 524288",
        ),
    ],
)
def test_unsupported_calls(refused, match):
    with pytest.raises(Unsupported, match=match):
        kernel.check(refused, Spec(Causal(), 1.0))
