"""The selective scan against the recurrence, whole and in pieces."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from kernels_pallas import Unsupported
from kernels_pallas.tpu import selective_scan as tpu

from .cases import FAST, close, finished

module = importlib.import_module("kernels_pallas.selective_scan")
selective_scan, reference = module.selective_scan, module.reference
BACKENDS = ("xla", "xla_parallel")


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
    """(values, gradients of all arrays) of a loss that weighs y and the last state unevenly."""

    def loss(arrays):
        y, state = call(**arrays)
        weigh = lambda v: jnp.sum(jnp.cos(jnp.arange(v.size)).reshape(v.shape) * v)
        return weigh(y) + weigh(state), (y, state)

    gradient = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)
    gradients, out = finished(gradient, arrays)
    return out, gradients


def loop(x, delta, a, b, c, d, initial_state):
    """One number at a time, float64."""
    state, y = np.float64(initial_state), np.zeros(x.shape)
    for n, t, k in np.ndindex(*x.shape):
        state[n, k] = np.exp(delta[n, t, k] * a[k]) * state[n, k] + delta[n, t, k] * (
            b[n, t] * x[n, t, k]
        )
        y[n, t, k] = c[n, t] @ state[n, k] + d[k] * x[n, t, k]
    return y, state


def test_the_reference_is_the_recurrence():
    arrays = make()
    close(reference(**arrays), loop(**arrays), 2e-6)


def test_gradient_of_the_reference_is_its_slope():
    with jax.enable_x64(True):
        arrays = make(1, 3, 2, 2, np.float64)
        check_grads(jax.jit(lambda a: reference(**a)), (arrays,), order=1, modes=("rev",))


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_is_the_definition(backend, chunk_size):
    arrays = make()
    call = lambda **arrays: selective_scan(**arrays, chunk_size=chunk_size, backend=backend)
    out, gradients = results(call, arrays)
    with jax.enable_x64(True):
        want, slopes = results(reference, jax.tree.map(np.float64, arrays))
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)


def test_one_wide_array_widens_the_sums():
    with jax.enable_x64(True):
        arrays = make() | dict(delta=np.float64(make()["delta"]))
        for backend in BACKENDS:
            y, state = selective_scan(**arrays, backend=backend)
            assert y.dtype == jnp.float32 and state.dtype == jnp.float64
            close(state, loop(**jax.tree.map(np.float64, arrays))[1], 1e-12)


def on_tpu(monkeypatch, arrays, **interpret):
    """(values, gradients) by the kernels, in chunks of 4 and blocks of 128 channels."""
    monkeypatch.setattr(tpu, "CHUNK", 4)
    params = pltpu.InterpretParams(uninitialized_memory="nan", **interpret)
    call = lambda d, initial_state, **arrays: tpu.scan(
        **arrays, state=initial_state, chunk_size=0, settings=tpu.Settings(128, params)
    )
    return results(call, arrays)


def without_skip(arrays):
    """The same in float64, d left out as in the kernels."""
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, arrays)
        return results(lambda d, **arrays: reference(**arrays), wide)


def test_tpu_kernels_are_the_definition(monkeypatch):
    arrays = make(1, 7, 130, 8)  # two chunks, and two blocks of channels, neither full
    out, gradients = on_tpu(monkeypatch, arrays)
    want, slopes = without_skip(arrays)
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)


def test_tpu_kernels_have_no_race(monkeypatch, capfd):
    arrays = make(2, 6, 16, 8)
    got = on_tpu(monkeypatch, arrays, detect_races=True, num_cores_or_threads=2)
    close(got, without_skip(arrays), 2e-5)
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.parametrize(
    "dtype, state, match",
    [
        (jnp.float64, 16, r"dtype float64; allowed: float32, bfloat16, float16"),
        (jnp.float32, 12, r"state 12; allowed: multiples of 8 up to 128"),
    ],
)
def test_the_kernels_say_what_they_cannot_do(dtype, state, match):
    with jax.enable_x64(True), pytest.raises(Unsupported, match=match):
        shape = jax.ShapeDtypeStruct
        tpu.check(shape((1, 8, 4), dtype), shape((4, state), dtype))


@pytest.mark.parametrize("mib, widths", [(16, (512, 128, None)), (64, (512, 512, 128))])
def test_blocks_are_as_wide_as_fast_memory_allows(monkeypatch, mib, widths):
    monkeypatch.setattr(tpu, "vmem_limit", lambda: mib * 3 // 4 << 20)
    shape = jax.ShapeDtypeStruct
    for state, width in zip((16, 32, 128), widths, strict=True):
        x, a = shape((1, 128, 1024), jnp.float32), shape((state, 1024), jnp.float32)
        if width:
            tpu.check(x, shape((1024, state), jnp.float32))
            assert tpu._Specs(x, a, tpu.DEFAULT).width == width
        else:
            with pytest.raises(Unsupported, match=r"state 128: more than VMEM .*, 12 MiB"):
                tpu.check(x, shape((1024, state), jnp.float32))


def test_without_skip_or_initial_state():
    arrays = make()
    plain = {n: v for n, v in arrays.items() if n not in ("d", "initial_state")}
    zeros = {n: np.zeros_like(arrays[n]) for n in ("d", "initial_state")}
    close(selective_scan(**plain), selective_scan(**plain, **zeros), 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_pieces_are_the_whole(backend):
    arrays = make()
    along = ("x", "delta", "b", "c")
    part = lambda where: {n: v[:, where] if n in along else v for n, v in arrays.items()}
    call = lambda arrays: selective_scan(**arrays, chunk_size=4, backend=backend)
    first, state = call(part(slice(0, 7)))
    second, state = call(part(slice(7, None)) | dict(initial_state=state))
    close((np.concatenate([first, second], 1), state), call(arrays), 1e-6)


def test_half_precision_is_rounded_once():
    arrays = make(length=64)
    half = {n: jnp.asarray(v, jnp.bfloat16) for n, v in arrays.items()}
    y, state = selective_scan(**half)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    want = loop(**{n: np.float64(v) for n, v in half.items()})[0]
    close(y, want, 2**-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_that_of_a_chunk(backend):
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
        (dict(chunk_size=0), r"chunk_size is 0; allowed: an integer >= 1"),
        (dict(backend="gpu"), r"backend 'gpu' is unknown; for cpu: allowed: auto, xla"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    with pytest.raises(ValueError, match=match) as error:
        selective_scan(**(OK | change))
    assert "\n" not in str(error.value)
