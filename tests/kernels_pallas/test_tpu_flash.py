"""The TPU kernels in an interpreter, forward and backward, against the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Causal, Full, Unsupported, Window, merge, reference
from kernels_pallas.spec import Operands, Spec
from kernels_pallas.tpu import flash, layout
from kernels_pallas.tpu.visits import Blocks

from .cases import FEATURES, close, make
from .tpu_calls import NAMES, PLAIN, SIZES, SMALL, STRICT, exact, kernel, results, split

pytestmark = pytest.mark.depends_on("interpreted TPU kernels")


def check_all(got, want):
    (out, lse), gradients = got
    close((out, lse), want[0], 2e-6)
    close(gradients, want[1], 2e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", NAMES)
def test_kernels_match_the_reference(name):
    arrays, static = make(**SIZES | FEATURES[name])
    got = results(kernel(), *split(arrays, static))
    want = exact(arrays, static)
    check_all(got, want)
    (out, lse), _ = got
    empty = np.swapaxes(lse, 1, 2) == -np.inf
    assert (out[empty] == 0).all()
    assert empty.any() or name != "no key for some"


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["no key for some", "everything"])
def test_uninitialized_memory_is_never_read(name):
    sizes = dict(batch=1, q_length=75, kv_length=141, head_dim=8)
    arrays, static = make(**sizes | FEATURES[name])
    check_all(results(kernel(STRICT), *split(arrays, static)), exact(arrays, static))


@pytest.mark.parametrize(
    "dtype, head_dim",
    [("bfloat16", 64), ("float16", 96), ("bfloat16", 128), ("float16", 192), ("bfloat16", 256)],
)
def test_half_precision_is_as_accurate_as_xla(dtype, head_dim):
    sizes = dict(batch=1, heads=2, kv_heads=1, q_length=150, kv_length=150, head_dim=head_dim)
    arrays, static = make(**sizes)
    arrays = {name: a.astype(jnp.dtype(dtype)) for name, a in arrays.items()}
    want = exact(arrays, static)
    x, spec = split(arrays, static)
    got, xla = results(kernel(), x, spec), results(reference.attention, x, spec)
    dtypes = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]
    assert dtypes(got) == dtypes(xla)
    # The gradients as one vector: which of them has the least rounding depends on where the weights
    # are normalized, which one implementation does before the matmul and the other after it.
    for part in (0, 1):
        mine, theirs, size = (_distance(a[part], want[part]) for a in (got, xla, _zeros(want)))
        assert mine <= 1.2 * theirs + 1e-6 * size


def _distance(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return np.sqrt(sum(np.sum((np.float64(a) - b) ** 2) for a, b in pairs))


def _zeros(tree):
    return jax.tree.map(np.zeros_like, tree)


@pytest.mark.parametrize("q_length, kv_length", [(1, 1), (1, 129), (130, 1), (257, 384)])
def test_lengths(q_length, kv_length):
    arrays, static = make(
        batch=1, heads=1, kv_heads=1, q_length=q_length, kv_length=kv_length, mask=Window(90, 70)
    )
    check_all(results(kernel(), *split(arrays, static)), exact(arrays, static))


def test_keys_are_split_over_calls_if_vmem_is_small():
    arrays, static = make(**SIZES | FEATURES["everything"])
    one_block = dataclasses.replace(PLAIN, key_gradients=1)
    check_all(results(kernel(one_block), *split(arrays, static)), exact(arrays, static))


def test_gradients_of_parts_of_the_keys_add_up():
    """As in ring attention: each part's gradients are computed from the lse of all keys."""
    arrays, static = make(**SIZES, kv_heads=2, segments=True, mask=Full())
    x, spec = split(arrays, static)
    dout = jnp.cos(jnp.arange(x.q.size, dtype=jnp.float32)).reshape(x.q.shape)
    parts = []
    for keys in (slice(0, 128), slice(128, None)):
        ids = x.kv_segment_ids[:, keys]
        parts.append(x._replace(k=x.k[:, keys], v=x.v[:, keys], kv_segment_ids=ids))
    attend = jax.jit(kernel(), static_argnums=1)
    first, second = (attend(part, spec) for part in parts)
    out, lse = merge(*first, *second)
    delta = jnp.sum(out * dout, -1).swapaxes(1, 2)
    run = jax.jit(functools.partial(flash.gradients, settings=PLAIN), static_argnums=1)
    one, two = (run(part, spec, dout, lse, delta) for part in parts)
    assert one.q_offset is one.q_segment_ids is one.slopes is one.sinks is None

    def loss(qkv):
        x_ = x._replace(**qkv)
        return jnp.sum(reference.attention(x_, spec)[0] * dout)

    want = jax.jit(jax.grad(loss))(dict(q=x.q, k=x.k, v=x.v))
    close(one.q + two.q, want["q"], 2e-5)
    close(jnp.concatenate((one.k, two.k), 1), want["k"], 2e-5)
    close(jnp.concatenate((one.v, two.v), 1), want["v"], 2e-5)


def test_gradients_match_finite_differences():
    """Along a random direction of all inputs, by central differences of the float64 definition."""
    arrays, static = make(**SIZES | FEATURES["everything"])
    x, spec = split(arrays, static)
    _, gradients = results(kernel(), x, spec)
    rng = np.random.default_rng(1)
    step = {name: rng.standard_normal(g.shape) for name, g in gradients.items()}
    with jax.enable_x64(True):

        def loss(t):
            moved = {n: jnp.asarray(getattr(x, n), jnp.float64) + t * step[n] for n in step}
            out, lse = reference.attention(x._replace(**moved), spec)
            weigh = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
            return jnp.sum(weigh * out) + jnp.sum(weigh[..., 0] * lse.swapaxes(1, 2))

        loss = jax.jit(loss)
        want = (loss(1e-5) - loss(-1e-5)) / 2e-5
    got = sum(np.sum(np.float64(g) * step[name]) for name, g in gradients.items())
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_backward_is_deterministic():
    x, spec = split(*make(**SIZES, kv_heads=2))
    once, again = (results(kernel(), x, spec) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_a_sink_of_minus_infinity_has_no_effect():
    arrays, static = make(**SIZES | FEATURES["no key for some"])
    x, spec = split(arrays, static)
    with_sinks = x._replace(sinks=jnp.full(x.q.shape[2], -jnp.inf))
    (out, lse), gradients = results(kernel(), with_sinks, spec)
    (want, want_lse), want_gradients = results(kernel(), x, spec)
    close((out, lse), (want, want_lse), 1e-6)
    assert (gradients.pop("sinks") == 0).all()
    close(gradients, want_gradients, 1e-6)


RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def backward_with_two_cores() -> str:
    """The text of the error that newer interpreters raise in addition to what they print."""
    x, spec = split(*make(batch=1, q_length=40, kv_length=130, heads=6, kv_heads=3))
    settings = flash.Settings(SMALL, SMALL, interpret=RACES)
    row = jnp.zeros((1, 6, 40))
    run = functools.partial(flash.gradients, settings=settings)
    try:
        jax.block_until_ready(jax.jit(run, static_argnums=1)(x, spec, x.q, row, row))
    except jax.errors.JaxRuntimeError as error:
        pltpu.reset_tpu_interpret_mode_state()
        return str(error)
    return ""


def test_forward_has_no_race(capfd):
    x, spec = split(*make(batch=1, q_length=70, kv_length=130, segments=True, sinks=True))
    settings = flash.Settings(SMALL, SMALL, interpret=RACES)
    jax.block_until_ready(jax.jit(kernel(settings), static_argnums=1)(x, spec))
    assert "RACE" not in capfd.readouterr().out


def test_backward_has_no_race(capfd):
    assert backward_with_two_cores() == ""
    assert "RACE" not in capfd.readouterr().out


def test_the_race_detector_finds_a_race(capfd, monkeypatch):
    """Query heads that share a key head add to the same gradient, so they must not run in
    parallel."""
    parallel = functools.partial(layout.compiler_params, sequential_groups=False)
    monkeypatch.setattr(layout, "compiler_params", lambda plan, sequential_groups: parallel(plan))
    raised = backward_with_two_cores()
    assert "RACE" in raised + capfd.readouterr().out


def shapes(dtype="bfloat16", head_dim=128, **more):
    qkv = jax.ShapeDtypeStruct((1, 4096, 8, head_dim), jnp.dtype(dtype))
    return Operands(qkv, qkv, qkv, **more), Spec(Causal(), 1.0)


@pytest.mark.parametrize(
    "call, settings, match",
    [
        (dict(dtype="float64"), None, "dtype float64; allowed: float32, bfloat16, float16"),
        (dict(head_dim=264), None, "head_dim 264; allowed: multiples of 8 up to 256"),
        (dict(head_dim=100), None, "head_dim 100; allowed: multiples of 8"),
        (dict(bias=1), None, r"bias is an array; allowed: None or Alibi\(slopes\)"),
        (
            {},
            flash.Settings(forward=Blocks(2048, 4096, 256)),
            "forward blocks 2048x4096 at head_dim 128 need about .* MiB of VMEM; allowed: 12 MiB",
        ),
        (
            {},
            flash.Settings(backward=Blocks(1024, 1024, 256)),
            "backward blocks 1024x1024 at head_dim 128 need about .* MiB of VMEM; allowed: 12 MiB",
        ),
    ],
)
def test_unsupported_calls_have_one_line_errors(call, settings, match):
    with pytest.raises(Unsupported, match=match) as error:
        flash.check(*shapes(**call), settings)
    assert "\n" not in str(error.value)


def test_a_list_of_visits_that_exceeds_smem_is_an_error():
    x, spec = shapes()
    long = x._replace(q=jax.ShapeDtypeStruct((1, 2**15, 8, 128), jnp.bfloat16))
    long = long._replace(k=long.q, v=long.q)
    small = Blocks(128, 128, 128)
    match = "forward visits 32896 blocks .* listed in 394752 bytes; allowed: 100000"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Unsupported, match=match):
        patch.setattr(flash, "SMEM_BYTES", 100_000)
        flash.check(long, spec, flash.Settings(forward=small, backward=small))
    flash.check(long, spec)


@pytest.mark.parametrize("dtype", flash.DTYPES)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_default_blocks_fit_the_smallest_vmem(dtype, head_dim):
    flash.check(*shapes(dtype, head_dim))


@pytest.mark.parametrize("sizes", [(100, 128, 64), (128, 100, 128), (0, 128, 128)])
def test_invalid_block_sizes(sizes):
    with pytest.raises(ValueError, match="allowed: q a multiple of sub_q, k one of 128"):
        Blocks(*sizes)
