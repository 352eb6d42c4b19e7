"""The selective scan against the recurrence: whole, in pieces, packed and padded."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from kernels_pallas import Unsupported
from kernels_pallas.choose import Backend
from kernels_pallas.tpu import selective_scan as tpu

from .cases import FAST, close, finished

pytestmark = pytest.mark.depends_on("interpreted TPU kernels")

module = importlib.import_module("kernels_pallas.selective_scan")
selective_scan, reference = module.selective_scan, module.reference
BACKENDS = ("xla", "xla_parallel")
# Padding before, within, between and after the documents; a document that is one token; an id that
# returns; a row that is all padding.
IDS = np.array(
    [
        [7, 7, 7, 7, 7, 2, 0, 0, 5, 5, 0, 5, 2, 2, 2, 2, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


def make(batch=2, length=19, channels=6, state=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return dict(
        x=normal(batch, length, channels),
        delta=np.log1p(np.exp(normal(batch, length, channels) - 1)),
        a=-np.exp(normal(channels, state)),
        b=normal(batch, length, state),
        c=normal(batch, length, state),
        d=normal(channels),
        initial_state=normal(batch, channels, state),
    )


def results(call, arrays):
    """(values, gradients of all arrays) of a loss with uneven weights on y and the final state."""

    def loss(arrays):
        y, state = call(**arrays)
        weigh = lambda v: jnp.sum(jnp.cos(jnp.arange(v.size)).reshape(v.shape) * v)
        return weigh(y) + weigh(state), (y, state)

    gradient = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)
    gradients, out = finished(gradient, arrays)
    return out, gradients


def expected(arrays, segment_ids=None):
    """`results` of the reference in float64."""
    with jax.enable_x64(True):
        call = lambda **arrays: reference(**arrays, segment_ids=segment_ids)
        return results(call, jax.tree.map(np.float64, arrays))


def loop(x, delta, a, b, c, d, initial_state, segment_ids=None):
    """One number at a time, float64."""
    state, y = np.float64(initial_state), np.zeros(x.shape)
    ids = np.ones(x.shape[:2], int) if segment_ids is None else segment_ids
    for n, t, k in np.ndindex(*x.shape):
        if ids[n, t] == 0:
            continue
        before = ids[n, :t][ids[n, :t] != 0]
        if before.size and before[-1] != ids[n, t]:
            state[n, k] = 0
        state[n, k] = np.exp(delta[n, t, k] * a[k]) * state[n, k] + delta[n, t, k] * (
            b[n, t] * x[n, t, k]
        )
        y[n, t, k] = c[n, t] @ state[n, k] + d[k] * x[n, t, k]
    return y, state


def test_the_reference_is_the_recurrence():
    arrays = make()
    close(reference(**arrays), loop(**arrays), 2e-6)
    arrays = make(len(IDS))
    close(reference(**arrays, segment_ids=IDS), loop(**arrays, segment_ids=IDS), 2e-6)


def test_gradient_of_the_reference():
    with jax.enable_x64(True):
        arrays = make(1, 3, 2, 2, np.float64)
        check_grads(jax.jit(lambda a: reference(**a)), (arrays,), order=1, modes=("rev",))


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
@pytest.mark.parametrize("segment_ids", [None, IDS], ids=["whole", "packed"])
def test_matches_the_definition(backend, chunk_size, segment_ids):
    arrays = make(len(IDS))
    call = functools.partial(
        selective_scan, segment_ids=segment_ids, chunk_size=chunk_size, backend=backend
    )
    out, gradients = results(call, arrays)
    want, want_gradients = expected(arrays, segment_ids)
    close(out, want, 2e-6)
    close(gradients, want_gradients, 2e-5)


def test_one_float64_array_makes_the_states_float64():
    with jax.enable_x64(True):
        arrays = make() | dict(delta=np.float64(make()["delta"]))
        for backend in BACKENDS:
            y, state = selective_scan(**arrays, backend=backend)
            assert y.dtype == jnp.float32 and state.dtype == jnp.float64
            close(state, loop(**jax.tree.map(np.float64, arrays))[1], 1e-12)


@pytest.fixture
def interpret_tpu(monkeypatch):
    """Makes backend="tpu" available: interpreted, with chunks of 4 and blocks of 128 channels.
    Call it, with further options of the interpreter."""
    monkeypatch.setattr(tpu, "CHUNK", 4)

    def start(**options):
        params = pltpu.InterpretParams(uninitialized_memory="nan", **options)
        run = functools.partial(tpu.scan, settings=tpu.Settings(128, params))
        monkeypatch.setitem(module.BACKENDS, "tpu", Backend(run))

    return start


@pytest.mark.parametrize("segment_ids", [None, IDS[:1, 5:12]], ids=["whole", "packed"])
def test_tpu_kernels_match_the_definition(interpret_tpu, segment_ids):
    interpret_tpu()
    arrays = make(1, 7, 130, 8)  # two chunks, and two blocks of channels, neither full
    call = functools.partial(selective_scan, segment_ids=segment_ids, backend="tpu")
    out, gradients = results(call, arrays)
    want, want_gradients = expected(arrays, segment_ids)
    close(out, want, 2e-6)
    close(gradients, want_gradients, 2e-5)


def test_tpu_kernels_have_no_race(interpret_tpu, capfd):
    interpret_tpu(detect_races=True, num_cores_or_threads=2)
    arrays, ids = make(2, 6, 16, 8), IDS[:2, 4:10]
    call = functools.partial(selective_scan, segment_ids=ids, backend="tpu")
    close(results(call, arrays), expected(arrays, ids), 2e-5)
    assert "RACE" not in capfd.readouterr().out.upper()


ALONG = ("x", "delta", "b", "c")  # arrays with a length


def cut(arrays, rows, positions):
    """The arrays of some rows (a slice) and positions (a slice)."""
    part = {n: v[rows, positions] if n in ALONG else v for n, v in arrays.items()}
    return part | dict(initial_state=arrays["initial_state"][rows])


@pytest.mark.parametrize("backend", [*BACKENDS, "tpu"])
def test_packed_documents_match_separate_documents(interpret_tpu, backend):
    interpret_tpu()
    arrays = make(2, 11, 16, 8)
    documents = ((0, 0, 4), (0, 4, 5), (0, 5, 9), (1, 0, 7), (1, 7, 11))  # row, start, end
    ids = np.zeros((2, 11), int)
    for number, (row, start, end) in enumerate(documents, 1):
        ids[row, start:end] = number
    call = functools.partial(selective_scan, chunk_size=4, backend=backend)

    def separately(**arrays):
        y, states = jnp.zeros_like(arrays["x"]), jnp.zeros_like(arrays["initial_state"])
        for row, start, end in documents:
            part = cut(arrays, slice(row, row + 1), slice(start, end))
            if start:
                del part["initial_state"]
            y_part, state = call(**part)
            y, states = y.at[row, start:end].set(y_part[0]), states.at[row].set(state[0])
        return y, states

    packed = functools.partial(call, segment_ids=ids)
    out, gradients = results(packed, arrays)
    want, want_gradients = results(separately, arrays)
    close(out, want, 1e-6)
    close(gradients, want_gradients, 1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "tpu"])
@pytest.mark.parametrize("length", [4, 5, 7])
def test_padding_on_the_right_changes_nothing(interpret_tpu, backend, length):
    """So that decoding starts from the state that the prompt itself leaves."""
    interpret_tpu()
    arrays = make(2, 9, 16, 8)
    ids = np.zeros((2, 9), int)
    ids[:, :length] = 1
    call = functools.partial(selective_scan, chunk_size=4, backend=backend)
    compiled = jax.jit(call, compiler_options=FAST)
    y, state = finished(functools.partial(compiled, segment_ids=ids, **arrays))
    unpadded = cut(arrays, slice(None), slice(0, length))
    want = finished(functools.partial(compiled, segment_ids=ids[:, :length], **unpadded))
    tolerance = 1e-6 if backend == "xla_parallel" else 0.0  # its sums are grouped differently
    close((y[:, :length], state), want, tolerance)
    assert not y[:, length:].any()


@pytest.mark.parametrize("backend", [*BACKENDS, "tpu"])
def test_padding_has_no_gradient(interpret_tpu, backend):
    interpret_tpu()
    arrays, ids = make(2, 9, 16, 8), IDS[:2, 4:13]
    call = functools.partial(selective_scan, segment_ids=ids, chunk_size=4, backend=backend)
    _, gradients = results(call, arrays)
    assert all((gradients[name][ids == 0] == 0).all() for name in ALONG)
    assert all((gradients[name][ids != 0] != 0).all() for name in ALONG)


@pytest.mark.parametrize(
    "dtype, state, match",
    [
        (jnp.float64, 16, r"dtype float64; allowed: float32, bfloat16, float16"),
        (jnp.float32, 12, r"state 12; allowed: multiples of 8 up to 128"),
    ],
)
def test_kernel_errors_name_what_is_unsupported(dtype, state, match):
    with jax.enable_x64(True), pytest.raises(Unsupported, match=match):
        shape = jax.ShapeDtypeStruct
        tpu.check(shape((1, 8, 4), dtype), shape((4, state), dtype))


@pytest.mark.parametrize("mib, widths", [(16, (512, 128, None)), (64, (512, 512, 128))])
def test_blocks_are_as_wide_as_vmem_allows(monkeypatch, mib, widths):
    monkeypatch.setattr(tpu, "vmem_limit", lambda: mib * 3 // 4 << 20)
    shape = jax.ShapeDtypeStruct
    for state, width in zip((16, 32, 128), widths, strict=True):
        x, a = shape((1, 128, 1024), jnp.float32), shape((state, 1024), jnp.float32)
        if width:
            tpu.check(x, shape((1024, state), jnp.float32))
            assert tpu._Specs(x, a, tpu.DEFAULT).width == width
        else:
            with pytest.raises(Unsupported, match=r"state 128: .* not fit VMEM, 12 MiB"):
                tpu.check(x, shape((1024, state), jnp.float32))


def test_without_skip_or_initial_state():
    arrays = make()
    plain = {n: v for n, v in arrays.items() if n not in ("d", "initial_state")}
    zeros = {n: np.zeros_like(arrays[n]) for n in ("d", "initial_state")}
    close(selective_scan(**plain), selective_scan(**plain, **zeros), 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_pieces_match_the_whole(backend):
    arrays = make()
    call = functools.partial(selective_scan, chunk_size=4, backend=backend)
    first, state = call(**cut(arrays, slice(None), slice(0, 7)))
    rest = cut(arrays, slice(None), slice(7, None)) | dict(initial_state=state)
    second, state = call(**rest)
    close((np.concatenate([first, second], 1), state), call(**arrays), 1e-6)


def test_half_precision_is_rounded_once():
    arrays = make(length=64)
    half = {n: jnp.asarray(v, jnp.bfloat16) for n, v in arrays.items()}
    y, state = selective_scan(**half)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    want = loop(**{n: np.float64(v) for n, v in half.items()})[0]
    close(y, want, 2**-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_holds_the_states_of_one_chunk(backend):
    arrays = make(1, 1024, 8, 16)
    gradient = jax.grad(lambda arrays: selective_scan(**arrays, backend=backend)[0].sum())
    program = jax.jit(gradient).lower(arrays).compile(FAST)
    shapes = re.findall(r"\bf32\[([\d,]+)\]", program.as_text())
    largest = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
    assert largest <= 2 * module.CHUNK * 8 * 16 < 1024 * 8 * 16


OK = make(2, 5, 6, 4)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=OK["x"][0]), r"x has shape \(5, 6\); allowed: \[batch, length, channels\]"),
        (dict(a=OK["a"][:5]), r"a has shape \(5, 4\); allowed: \[channels, state\]=\[6, >= 1\]"),
        (dict(delta=OK["delta"][:, :4]), r"delta has shape \(2, 4, 6\).*=\[2, 5, 6\]"),
        (
            dict(c=OK["c"][..., :3]),
            r"c has shape \(2, 5, 3\).*\[batch, length, state\]=\[2, 5, 4\]",
        ),
        (dict(d=OK["a"]), r"d has shape \(6, 4\); allowed: \[channels\]=\[6\]"),
        (dict(initial_state=OK["a"]), r"initial_state has shape .*=\[2, 6, 4\]"),
        (dict(b=OK["b"].astype(int)), r"b has dtype int(32|64); allowed: float32"),
        (
            dict(segment_ids=IDS[:2, :4]),
            r"segment_ids have shape \(2, 4\), dtype int64; allowed: integers .*=\[2, 5\]",
        ),
        (dict(segment_ids=OK["x"][..., 0]), r"segment_ids have .* dtype float32; allowed: int"),
        (dict(chunk_size=0), r"chunk_size is 0; allowed: an integer >= 1"),
        (dict(backend="gpu"), r"backend 'gpu' is unknown; for cpu: allowed: auto, xla"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    with pytest.raises(ValueError, match=match) as error:
        selective_scan(**(OK | change))
    assert "\n" not in str(error.value)
