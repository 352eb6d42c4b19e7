"""Decoding with a cache matches the last rows of the full call, for every kind of cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Alibi, Causal, Chunked, Prefix, Window, attention, decode_blocks
from kernels_pallas.caches import (
    ContiguousCache,
    Int8,
    PagedCache,
    RingCache,
    append,
    quantize,
)
from kernels_pallas.decoding import bytes_moved, decode, explain_decode
from kernels_pallas.reach import first_key

from .cases import close
from .decode_cases import FEATURES, KINDS, decoded, empty, make, normal, whole

pytestmark = pytest.mark.depends_on("interpreted TPU kernels")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a short cache, whose length they do not divide."""
    monkeypatch.setattr(decode_blocks, "BLOCK", 24)


# Masks that are not bounded look back further than any ring reaches.
@pytest.mark.parametrize(
    "name, kind",
    [(n, k) for n, (_, bounded) in FEATURES.items() for k in KINDS if k != "ring" or bounded],
)
def test_matches_the_last_rows_of_the_full_call(name, kind):
    q, cache, k, v, options = make(kind, **FEATURES[name][0])
    close(decoded(q, cache, options), whole(q, k, v, options), 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_is_causal_attention(kind):
    q, k, v = (normal(i, 2, 23, n, 8) for i, n in enumerate((4, 2, 2)))
    mask = Window(8)  # rings of size 9 wrap around twice
    want = np.asarray(attention(q, k, v, mask=mask, backend="xla"))

    @jax.jit
    def step(cache, q, k, v, lengths):
        cache = append(cache, k, v, lengths)
        return decode(q, cache, lengths=lengths, mask=mask), cache

    cache = empty(kind, 2, 2, 8, np.float32, ring=9, page_size=4)
    for i in range(23):
        one = lambda a, i=i: a[:, i : i + 1]
        out, cache = step(cache, one(q), one(k), one(v), jnp.full(2, i + 1))
        close(out, one(want), 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_are_independent(kind):
    q, cache, k, v, options = make(kind, mask=Window(11), q_length=2)
    lengths = np.array([37, 5, 61, 0]) + 2
    rows, token = np.arange(4)[:, None], lengths[:, None] - 2 + np.arange(2)
    cache = append(cache, k[rows, token], v[rows, token], lengths)
    options["lengths"] = lengths
    close(decoded(q, cache, options), whole(q, k, v, options), 2e-6)


def test_rows_without_keys():
    q, cache, _, _, options = make("contiguous", sinks=True)
    options["lengths"] = np.zeros(4, int)
    out, lse = map(np.asarray, decoded(q, cache, options))
    assert (out == 0).all() and (lse == options.pop("sinks")[:, None]).all()
    out, lse = map(np.asarray, decoded(q, cache, options))
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_int8_error_is_bounded_by_its_step_size(kind):
    """|s' - s| <= e = scale * |q|_1 * step_k / 2, so weights change by a factor within exp(2e), and
    |out' - out| <= (exp(2e) - 1) * max|v| + step_v / 2; against the quantized values, nothing."""
    features = dict(mask=Window(11), kv_heads=2, head_dim=16)
    q, cache, k, v, options = make(kind, int8=True, **features)
    q = q / 4
    steps = {name: quantize(a) for name, a in (("k", k), ("v", v))}
    exact = {n: np.asarray(s.values) * np.asarray(s.scales)[..., None] for n, s in steps.items()}
    got = np.asarray(decoded(q, cache, options)[0])
    close(got, whole(q, exact["k"], exact["v"], options)[0], 2e-6)
    step_k, step_v = (float(np.max(steps[n].scales)) for n in "kv")
    e = 16**-0.5 * np.abs(q).sum(-1).max() * step_k / 2
    bound = np.expm1(2 * e) * np.abs(v).max() + step_v / 2
    error = np.abs(got - np.asarray(whole(q, k, v, options)[0])).max()
    assert 0 < error < bound < 0.2


def test_quantize():
    x = normal(0, 5, 3, 16) * 10.0 ** np.arange(-2, 3)[:, None, None]
    x[1, 1] = 0
    got = quantize(x)
    assert got.values.dtype == jnp.int8 and got.scales.dtype == jnp.float32
    back = np.asarray(got.values) * np.asarray(got.scales)[..., None]
    assert (np.abs(back - x) <= np.asarray(got.scales)[..., None] * 0.5001).all()
    assert (np.abs(np.asarray(got.values)).max(-1) == np.where(got.scales, 127, 0)).all()


def test_bfloat16():
    q, cache, k, v, options = make("contiguous", kv_heads=2, dtype=jnp.bfloat16)
    got, want = decoded(q, cache, options), whole(q, k, v, options)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    close(got[0], want[0], 1e-2)
    close(got[1], want[1], 1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_only_needed_blocks_are_read(kind, monkeypatch):
    """Counts the blocks that are read: those of the longest row, from the first visible one on."""
    read = []
    count = lambda begin: read.append(int(begin))
    original = decode_blocks._read

    def counted(cache, buffer, begin, size):
        jax.debug.callback(count, begin)
        return original(cache, buffer, begin, size)

    monkeypatch.setattr(decode_blocks, "_read", counted)
    lengths = np.array([90, 70])
    q, cache, *_, options = make(kind, lengths=lengths, capacity=240, ring=72, mask=Window(10))
    jax.block_until_ready(decoded(q, cache, options))
    jax.effects_barrier()
    # Positions 57 to 89 of [0, 240), in blocks of 24; all slots of a ring that has wrapped around.
    assert sorted(set(read)) == ([0, 24, 48] if kind == "ring" else [48, 72])
    assert len(read) == 2 * len(set(read))


def test_append_drops_tokens_without_a_slot():
    k = normal(0, 2, 3, 1, 4)
    cache = ContiguousCache.empty(2, 4, 1, 4, np.float32)
    got = jax.jit(append)(cache, k, k, jnp.array([1, 6]))
    want = np.zeros((2, 1, 4, 4), np.float32)
    want[0, 0, 0], want[1, 0, 3] = k[0, 2, 0], k[1, 0, 0]
    np.testing.assert_array_equal(got.k, want)
    table = np.array([[2, -1], [0, 9]], np.int32)
    paged = PagedCache.empty(3, 2, 1, 4, np.float32, table)
    got = append(paged, k, k, np.array([3, 4]))
    want = np.zeros((3, 1, 2, 4), np.float32)
    want[2, 0], want[0, 0, 1] = k[0, :2, 0], k[1, 0, 0]
    np.testing.assert_array_equal(got.v, want)
    ring = RingCache.empty(2, 2, 1, 4, np.float32)
    got = append(ring, k, k, np.array([3, 8]))
    np.testing.assert_array_equal(got.k[:, 0], [k[0, [2, 1], 0], k[1, [1, 2], 0]])


def test_pages_may_be_shared():
    q, cache, k, v, options = make("paged", lengths=np.array([37, 37]), page_size=16)
    table = np.asarray(cache.page_table).copy()
    table[1, :2] = table[0, :2]
    k[1, :32], v[1, :32] = k[0, :32], v[0, :32]
    shared = PagedCache(cache.k, cache.v, table)
    close(decoded(q, shared, options), whole(q, k, v, options), 2e-6)


def test_first_key_is_the_start_of_the_key_range():
    masks = (Causal(), Window(4), Window(3, 2), Chunked(5), Prefix(3), Chunked(6) & Window(4))
    for mask in masks:
        positions = np.arange(40)
        want = [mask.key_range(q, q + 1, 50)[0] for q in positions]
        got = first_key(mask, positions)
        np.testing.assert_array_equal(np.maximum(got, 0), want)
        np.testing.assert_array_equal(first_key(mask, jnp.asarray(positions)), got)


def test_bytes_moved():
    q, cache, *_, options = make("contiguous", lengths=np.array([40, 3]), kv_heads=2)
    out = 2 * q.size * 4
    assert bytes_moved(q, cache, options["lengths"]) == 43 * 2 * 2 * 8 * 4 + out
    # 3 queries of row 0 see keys 27 to 39.
    assert bytes_moved(q, cache, [40, 3], Window(10)) == 16 * 2 * 2 * 8 * 4 + out
    q, cache, *_ = make("paged", lengths=np.array([40, 3]), kv_heads=2, int8=True)
    assert bytes_moved(q, cache, [40, 3]) == 43 * 2 * 2 * (8 + 4) + 4 * 6 + out


Q = np.zeros((2, 3, 4, 8), np.float32)
CONTIGUOUS = ContiguousCache.empty(2, 16, 2, 8, np.float32)
RING = RingCache.empty(2, 8, 2, 8, np.float32)
PAGED = PagedCache.empty(6, 4, 2, 8, np.float32, np.zeros((2, 3), np.int32))
K = CONTIGUOUS.k


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(cache=(K, K)), "cache is a tuple; allowed: ContiguousCache, RingCache, PagedCache"),
        (dict(cache=ContiguousCache(K[0], K)), r"cache k has shape \(2, 16, 8\); allowed: \[batch"),
        (
            dict(cache=RingCache(K, K[:1])),
            r"cache k is float32\[2, 2, 16, 8\] and v float32\[1, 2,",
        ),
        (
            dict(cache=ContiguousCache(K.astype(int), K.astype(int))),
            r"cache k has dtype int32; all",
        ),
        (
            dict(cache=ContiguousCache(*[Int8(K.astype("int8"), K)] * 2)),
            r"int8 values and float32 scales \[2, 2, 16, 8\]; allowed: int8 and float32 \[2, 2",
        ),
        (
            dict(cache=PagedCache(PAGED.k, PAGED.v, np.zeros((2, 3), np.int64))),
            r"page_table has shape \(2, 3\), dtype int64; allowed: int32 \[batch, max_pages\]",
        ),
        (
            dict(cache=PagedCache(PAGED.k, PAGED.v, np.zeros(2, np.int32))),
            r"shape \(2,\), dtype in",
        ),
        (dict(q=Q[:1]), r"q has batch 1 and k, v 2"),
        (dict(q=Q[:, :, :3]), r"q has 3 heads and k, v 2; the first must be a multiple"),
        (dict(q=Q.astype("float16")), r"dtypes float16, float32, float32; must be equal"),
        (dict(lengths=np.array([4])), r"lengths have shape \(1,\), dtype int64; .*\[batch\]=\[2\]"),
        (dict(lengths=np.array([4.0, 5.0])), r"lengths have shape \(2,\), dtype float64"),
        (dict(lengths=np.array([4, 2])), r"a length is 2 with q_length 3; allowed: 0, or at least"),
        (dict(lengths=np.array([4, 17])), r"a length is 17; the cache holds 16"),
        (dict(cache=PAGED, lengths=np.array([4, 13])), r"a length is 13; the cache holds 12"),
        (
            dict(cache=RING),
            r"a ring cache of 8 with q_length 3 and Causal\(\), which looks back fur",
        ),
        (
            dict(cache=RING, mask=Window(6)),
            r"Window\(left=6, right=0\), which looks back 6; .*most 5",
        ),
        (dict(cache=RING, mask=Chunked(7)), r"which looks back 6"),
        (dict(bias=np.zeros(4)), r"bias is a ndarray; allowed: None or Alibi\(slopes\)"),
        (dict(bias=Alibi(np.zeros(2))), r"Alibi slopes has shape \(2,\)"),
        (dict(sinks=np.zeros(2)), r"sinks has shape \(2,\)"),
        (dict(mask="causal"), r"mask is 'causal'; allowed"),
        (dict(logits_soft_cap=-1), r"logits_soft_cap is -1.0"),
        (dict(splits=0), r"splits is 0; allowed: None or an int >= 1"),
        (dict(backend="tpu"), r"backend 'tpu' is not available on cpu: allowed: auto, xla"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    arguments = dict(q=Q, cache=CONTIGUOUS, lengths=np.array([4, 5])) | change
    for f in (decode, explain_decode):
        with pytest.raises(ValueError, match=match) as error:
            f(**arguments)
        assert "\n" not in str(error.value)


def test_append_errors():
    new = np.zeros((2, 3, 2, 8), np.float32)
    put = functools.partial(append, CONTIGUOUS, lengths=np.array([3, 3]))
    with pytest.raises(
        ValueError, match=r"v has shape \(2, 1, 2, 8\); .*kv_heads, head_dim\]=\[2, 3,"
    ):
        put(new, new[:, :1])
    with pytest.raises(ValueError, match=r"k has shape \(2, 3, 8\)"):
        put(new[:, :, 0], new)
    with pytest.raises(ValueError, match=r"a length is 17; the cache holds 16"):
        append(CONTIGUOUS, new, new, np.array([3, 17]))


def test_explain_needs_only_shapes():
    shapes = jax.eval_shape(lambda: (Q, CONTIGUOUS, jnp.zeros(2, int)))
    said = explain_decode(shapes[0], shapes[1], lengths=shapes[2])
    assert said == "xla: a loop over blocks of keys, up to the longest row"
