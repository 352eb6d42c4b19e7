"""The blocked backend against the reference, and its memory."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Causal, Full, Window, attention, chunked

from .cases import FAST, FEATURES, close, make, run

pytestmark = pytest.mark.depends_on("interpreted TPU kernels")

# Small blocks make it cheap to compile both paths with several blocks and groups.
PATHS = {
    "unrolled": dict(ROWS=32, UNROLLED_LENGTH=1024),
    "mapped": dict(ROWS=8, UNROLLED_LENGTH=0, MAX_GROUPS=2),
}


def results(backend, arrays, static):
    """((out, lse), gradients of the arrays) for a loss with uneven weights on out and lse."""

    def loss(arrays):
        out, lse = attention(**arrays, **static, backend=backend, return_lse=True)
        seen = jnp.where(lse == -jnp.inf, 0.0, lse)
        weigh = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return jnp.sum(weigh * out) + jnp.sum(weigh[..., 0] * seen.swapaxes(1, 2)), (out, lse)

    gradients, out = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(arrays)
    return out, gradients


@functools.cache
def reference(name):
    return results("xla", *make(**FEATURES[name]))


# "everything" has a separate test; "unrolled" shares everything but the slicing with "mapped".
BOTH = ("causal", "two-sided window, segments", "no key for some")
CASES = [("mapped", n) for n in FEATURES if n != "everything"] + [("unrolled", n) for n in BOTH]


@pytest.mark.parametrize("path, name", CASES)
def test_chunked_matches_the_reference(path, name, monkeypatch):
    for constant, value in PATHS[path].items():
        monkeypatch.setattr(chunked, constant, value)
    arrays, static = make(**FEATURES[name])
    out, gradients = results("xla_chunked", arrays, static)
    want, want_gradients = reference(name)
    close(out, want, 2e-6)
    close(gradients, want_gradients, 2e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("path", PATHS)
def test_chunked_matches_the_reference_in_float64(path, monkeypatch):
    for constant, value in PATHS[path].items():
        monkeypatch.setattr(chunked, constant, value)
    with jax.enable_x64(True):
        arrays, static = make(**FEATURES["everything"])
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
        got, want = (results(b, arrays, static) for b in ("xla_chunked", "xla"))
        close(got, want, 1e-13)


@pytest.mark.parametrize("length", [1, 129, 1300])
def test_lengths_at_the_real_block_size(length):
    arrays, static = make(batch=1, q_length=length, kv_length=length, heads=1, kv_heads=1)
    for mask in (Causal(), Window(100)):
        static["mask"] = mask
        got, want = (run(arrays, static, b, return_lse=True) for b in ("xla_chunked", "xla"))
        close(got, want, 2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_forward_mode(path, monkeypatch):
    for constant, value in PATHS[path].items():
        monkeypatch.setattr(chunked, constant, value)
    arrays, static = make(kv_heads=2, sinks=True)
    tangents = jax.tree.map(np.sin, arrays)
    got, want = (
        jax.jit(
            lambda a, t, b=b: jax.jvp(lambda a: attention(**a, **static, backend=b), (a,), (t,)),
            compiler_options=FAST,
        )(arrays, tangents)
        for b in ("xla_chunked", "xla")
    )
    close(got, want, 1e-5)


def compiled(mask, length, backend="xla_chunked"):
    """Forward and backward with two heads, compiled from shapes only."""
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

    def loss(q, k, v):
        return attention(q, k, v, mask=mask, backend=backend).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile(FAST)


def largest_buffer(program):
    shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_memory_is_linear_at_long_lengths():
    half, whole = compiled(Causal(), 2048), compiled(Causal(), 4096)
    assert largest_buffer(whole) <= 2 * chunked.ROWS * 4096  # the scores of one block, both heads
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (half, whole)]
    assert sizes[1] < 4096**2 * 4 / 2 and sizes[1] < 2.5 * sizes[0]


def test_a_window_reads_fewer_keys():
    assert largest_buffer(compiled(Window(256), 4096)) <= 2 * chunked.ROWS * (256 + 4 * 128)


def test_short_causal_skips_nearly_half_of_the_work():
    flops = [compiled(m, 1024).cost_analysis()["flops"] for m in (Causal(), Full())]
    assert flops[0] < 0.6 * flops[1]


def test_no_warning_is_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for q_length in (17, 1030):
            arrays, static = make(q_length=q_length, **FEATURES["everything"])
            for backend in ("auto", "xla", "xla_chunked"):
                jax.eval_shape(
                    jax.grad(lambda a, s=static, b=backend: attention(**a, **s, backend=b).sum()),
                    arrays,
                )
