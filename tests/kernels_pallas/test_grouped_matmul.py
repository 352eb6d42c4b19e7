"""The grouped matmul and its gradients against the definition, on every backend."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from kernels_pallas import Unsupported
from kernels_pallas.choose import Backend
from kernels_pallas.gpu import grouped_matmul as gpu
from kernels_pallas.group_visits import group_visits
from kernels_pallas.tpu import grouped_matmul as tpu

from .cases import FAST, close, finished

module = importlib.import_module("kernels_pallas.grouped_matmul")
grouped_matmul, reference = module.grouped_matmul, module.reference

# Boundaries inside blocks; empty groups first, last and in between; rows past the sum; no rows.
SIZES = {
    "uneven": (10, 0, 20, 3, 20),
    "rest": (0, 30, 0, 9, 0),
    "whole blocks": (16, 32, 0, 5, 0),
    "one row each": (1, 1, 1, 1, 1),
    "nothing": (0, 0, 0, 0, 0),
}


def make(sizes, tokens=53, width=8, out=6, dtype=np.float32):
    rng = np.random.default_rng(0)
    lhs = rng.standard_normal((tokens, width)).astype(dtype)
    rhs = rng.standard_normal((len(sizes), width, out)).astype(dtype)
    return lhs, rhs, np.array(sizes, np.int32)


def results(call, lhs, rhs, sizes):
    """(out, (gradient of lhs, of rhs)) for a loss with uneven weights on the rows."""

    def loss(lhs, rhs):
        out = call(lhs, rhs, sizes)
        return jnp.sum(jnp.cos(jnp.arange(out.size)).reshape(out.shape) * out), out

    f = jax.grad(loss, (0, 1), has_aux=True)
    gradients, out = jax.jit(f, compiler_options=FAST)(lhs, rhs)
    return out, gradients


def exact(lhs, rhs, sizes):
    """The same in float64."""
    with jax.enable_x64(True):
        return results(reference, np.float64(lhs), np.float64(rhs), sizes)


@pytest.mark.smoke
@pytest.mark.parametrize("name", SIZES)
def test_xla_matches_the_definition(name):
    lhs, rhs, sizes = make(SIZES[name])
    out, gradients = results(grouped_matmul, lhs, rhs, sizes)
    want, slopes = exact(lhs, rhs, sizes)
    assert out.dtype == jnp.float32
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)
    assert not np.asarray(out)[sum(SIZES[name]) :].any()
    assert not np.asarray(gradients[1])[sizes == 0].any()


def interpreted(kernels, settings, lhs, rhs, sizes):
    """A kernel backend in its interpreter: (out, gradients) as from `results`."""
    weigh = np.cos(np.arange(lhs.shape[0] * rhs.shape[2], dtype=np.float32))
    weigh = jnp.asarray(weigh.reshape(lhs.shape[0], rhs.shape[2]), lhs.dtype)

    def all_three(lhs, rhs, weigh, sizes):
        return (
            kernels.product(lhs, rhs, sizes, jnp.float32, False, settings),
            (
                kernels.product(weigh, rhs, sizes, jnp.float32, True, settings),
                kernels.outer(lhs, weigh, sizes, jnp.float32, settings),
            ),
        )

    return finished(jax.jit(all_three), lhs, rhs, weigh, sizes)


# Sizes that are not multiples of the blocks, and several blocks along every dimension.
@pytest.mark.parametrize("sizes, shape", [("uneven", (53, 24, 130)), ("rest", (70, 256, 200))])
def test_tpu_kernels_match_the_definition(sizes, shape):
    arrays = make(SIZES[sizes], *shape)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    settings = tpu.Settings(tpu.Blocks(32, 128, 128), interpret)
    out, gradients = interpreted(tpu, settings, *arrays)
    want, slopes = exact(*arrays)
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)


def test_tpu_kernels_have_no_race(capfd):
    arrays = make((10, 0, 9), 21, 8, 200)
    interpret = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan"
    )
    settings = tpu.Settings(tpu.Blocks(16, 128, 128), interpret)
    out, gradients = interpreted(tpu, settings, *arrays)
    want, slopes = exact(*arrays)
    close((out, gradients), (want, slopes), 2e-5)
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.smoke
@pytest.mark.depends_on("interpreted GPU kernels")
@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="jax has no GPU interpreter")
def test_gpu_kernels_match_the_definition():
    """Also checks for races: the interpreter raises an error if there is one."""
    lhs, rhs, sizes = make((101, 0, 150), 300, 128, 128)
    lhs, rhs = jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(rhs, jnp.bfloat16)
    settings = gpu.Settings(plgpu.InterpretGPUParams(detect_races=True))
    out, gradients = interpreted(gpu, settings, lhs, rhs, sizes)
    close(out, exact(lhs, rhs, sizes)[0], 2e-6)  # products of bfloat16 are exact in float32
    xla = module.BACKENDS["xla"].run
    weigh = jnp.asarray(np.cos(np.arange(out.size, dtype=np.float32)).reshape(out.shape), lhs.dtype)
    close(gradients[0], xla.product(weigh, rhs, sizes, jnp.float32, True), 2e-6)
    close(gradients[1], xla.outer(lhs, weigh, sizes, jnp.float32), 2e-6)


def test_gradient_of_the_reference():
    with jax.enable_x64(True):
        lhs, rhs, sizes = make((2, 0, 3), 7, 3, 2, np.float64)
        check_grads(lambda a, b: reference(a, b, sizes), (lhs, rhs), order=1, modes=("rev",))


def test_one_group_is_a_matmul():
    lhs, rhs, _ = make((0,))
    close(grouped_matmul(lhs, rhs, np.array([53])), lhs @ rhs[0], 1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_backends_count_in_int32(monkeypatch, dtype):
    """Group sizes may sum to more than the rows: the number of rows left must not wrap around as an
    unsigned integer."""
    lhs, rhs, sizes = make((50, 0, 10))
    xla, seen = module.BACKENDS["xla"].run, []
    noted = lambda f: lambda *a: (seen.append(a[2].dtype), f(*a))[1]
    backend = Backend(module.Operation(noted(xla.product), noted(xla.outer)))
    monkeypatch.setitem(module.BACKENDS, "xla", backend)
    got = results(grouped_matmul, lhs, rhs, sizes.astype(dtype))
    assert seen == [jnp.int32] * 3
    close(got, results(grouped_matmul, lhs, rhs, sizes), 1e-6)


def test_permuting_the_rows_of_a_group_permutes_its_results():
    lhs, rhs, sizes = make(SIZES["uneven"])
    order = np.arange(53)
    order[10:30] = np.random.default_rng(1).permutation(order[10:30])
    out = np.asarray(grouped_matmul(lhs, rhs, sizes))
    close(grouped_matmul(lhs[order], rhs, sizes), out[order], 1e-6)


def test_bfloat16_is_as_accurate_as_xla():
    lhs, rhs, sizes = make((200, 56), 256, 64, 32)
    lhs, rhs = jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(rhs, jnp.bfloat16)
    want = np.asarray(exact(lhs, rhs, sizes)[0])
    error = lambda out: np.sqrt(np.mean((np.float64(out) - want) ** 2))
    got = grouped_matmul(lhs, rhs, sizes)
    assert got.dtype == jnp.bfloat16
    assert error(got) <= 1.2 * error(jax.lax.ragged_dot(lhs, rhs, sizes))
    wide = grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32 and error(wide) < 1e-5


def test_other_rows_do_not_leak():
    """Non-finite values in another group's rows, or past all groups, do not spread."""
    lhs, rhs, sizes = make((10, 20, 7))
    lhs[30:] = np.inf
    out, gradients = results(grouped_matmul, lhs, rhs, sizes)
    assert np.isfinite(np.asarray(out)[:30]).all() and not np.asarray(out)[37:].any()
    assert np.isfinite(np.asarray(gradients[1])[:2]).all()


@pytest.mark.parametrize("empty", [None, "rows", "groups"])
@pytest.mark.parametrize("name", SIZES)
def test_visits_cover_each_row_once(name, empty):
    sizes = np.array(SIZES[name])
    visits = group_visits(jnp.asarray(sizes), 53, 16, empty=empty)
    block, group, start, stop, count = map(np.asarray, visits)
    owner = np.full(53, -1)
    for v in range(count[0]):
        assert stop[v] == start[v] or block[v] * 16 <= start[v] <= stop[v] <= (block[v] + 1) * 16
        assert (owner[start[v] : stop[v]] == -1).all()
        owner[start[v] : stop[v]] = group[v]
    want = np.repeat(np.arange(5), sizes)
    assert (owner[: len(want)] == want).all() and (owner[len(want) :] == -1).all()
    assert (stop[count[0] :] == start[count[0] :]).all()
    if empty == "rows":
        assert (np.diff(block[: count[0]]) >= 0).all() and set(block[: count[0]]) == set(range(4))
    if empty == "groups":
        assert (np.diff(group[: count[0]]) >= 0).all() and set(group[: count[0]]) == set(range(5))


def test_work_and_memory_do_not_grow_with_the_groups():
    def program(groups):
        lhs = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
        rhs = jax.ShapeDtypeStruct((groups, 64, 64), jnp.float32)
        sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
        return jax.jit(grouped_matmul).lower(lhs, rhs, sizes).compile(FAST).memory_analysis()

    few, many = (program(n).temp_size_in_bytes for n in (2, 32))
    assert many <= few + 2048 * 64 * 4  # a single group would add as much


LHS, RHS, COUNTS = make((3, 2), 6)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(lhs=LHS[0]), r"lhs has shape \(8,\); allowed: \[tokens, in\]"),
        (dict(rhs=RHS[0]), r"rhs has shape \(8, 6\); allowed: \[groups, in, out\]"),
        (dict(lhs=LHS[:, :5]), r"lhs has in=5 and rhs in=8; they must be equal"),
        (dict(lhs=LHS[:0]), r"lhs has shape \(0, 8\); every size must be >= 1"),
        (dict(lhs=LHS.astype(int)), r"lhs has dtype int(32|64); allowed: float32"),
        (dict(lhs=LHS.astype(np.float16)), r"dtypes float16, float32; must be equal"),
        (dict(group_sizes=COUNTS[:1]), r"group_sizes has shape \(1,\).*\[groups\]=\[2\]"),
        (dict(group_sizes=COUNTS * 1.0), r"group_sizes .* dtype float(32|64); allowed: integers"),
        (dict(preferred_element_type=int), r"preferred_element_type is int64; allowed: None or"),
        (dict(backend="tpu"), r"backend 'tpu' is not available on cpu: allowed: auto, xla"),
        (dict(backend="cuda"), r"backend 'cuda' is unknown; for cpu: allowed: auto, xla"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    arguments = dict(lhs=LHS, rhs=RHS, group_sizes=COUNTS) | change
    for f in (grouped_matmul, module.explain):
        with pytest.raises(ValueError, match=match) as error:
            f(**arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kernels, shape, dtype, match",
    [
        (tpu, (8, 8, 8), jnp.float64, r"dtype float64; allowed: float32, bfloat16, float16"),
        (gpu, (8, 128, 128), jnp.float32, r"dtype float32; allowed: bfloat16, float16"),
        (gpu, (8, 100, 128), jnp.bfloat16, r"in 100; allowed: multiples of 128"),
    ],
)
def test_unsupported_calls(kernels, shape, dtype, match):
    tokens, width, out = shape
    lhs, rhs = (
        jax.ShapeDtypeStruct((tokens, width), dtype),
        jax.ShapeDtypeStruct((2, width, out), dtype),
    )
    with jax.enable_x64(True), pytest.raises(Unsupported, match=match):
        kernels.check(lhs, rhs, None)
