"""The Hopper kernels in an interpreter that detects races, forward and backward, against the
definition; and unsupported calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from kernels_pallas import Causal, Full, Unsupported, Window, merge, reference
from kernels_pallas.gpu import flash
from kernels_pallas.gpu.plan import SHARED_MEMORY, Blocks
from kernels_pallas.spec import Operands, Spec

from .cases import FEATURES, close, finished, make
from .tpu_calls import NAMES, exact, results, split

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax has no interpreter for Mosaic GPU"
)
SMALL = Blocks(rows=128, columns=64, stages=2)
SIZES = dict(batch=1, q_length=100, kv_length=130, head_dim=16)


def kernel():
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    settings = flash.Settings(SMALL, SMALL, SMALL, interpret)
    return functools.partial(flash.attention, settings=settings)


def narrow(arrays, dtype="bfloat16"):
    return {n: a.astype(jnp.dtype(dtype)) if n in "qkv" else a for n, a in arrays.items()}


def check_all(got, xla, want):
    """lse is accurate to float32 precision, the rest as accurate as XLA in the same dtype."""
    (out, lse), gradients = got
    close(lse, want[0][1], 2e-6)
    for mine, theirs, exact_ in (
        (out, xla[0][0], want[0][0]),
        (gradients, xla[1], want[1]),
    ):
        size = distance(exact_, jax.tree.map(np.zeros_like, exact_))
        assert distance(mine, exact_) <= 1.2 * distance(theirs, exact_) + 1e-6 * size
    assert all(np.isfinite(np.float32(g)).all() for g in jax.tree.leaves(gradients))


def distance(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return np.sqrt(sum(np.sum((np.float64(a) - b) ** 2) for a, b in pairs))


def check(arrays, static):
    x, spec = split(arrays, static)
    got, xla = results(kernel(), x, spec), results(reference.attention, x, spec)
    check_all(got, xla, exact(arrays, static))
    return got


@interpreted
@pytest.mark.depends_on("interpreted GPU kernels")
@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_kernels_match_the_reference(name):
    heads = dict(heads=2, kv_heads=1 if "kv_heads" in FEATURES[name] else 2)
    arrays, static = make(**SIZES | FEATURES[name] | heads)
    (out, lse), _ = check(narrow(arrays), static)
    empty = np.swapaxes(lse, 1, 2) == -np.inf
    assert (out[empty] == 0).all()
    assert empty.any() or name != "no key for some"


@interpreted
@pytest.mark.depends_on("interpreted GPU kernels")
@pytest.mark.smoke
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_half_precision_is_as_accurate_as_xla(head_dim):
    sizes = dict(batch=1, heads=1, kv_heads=1, q_length=70, kv_length=70, head_dim=head_dim)
    arrays, static = make(**sizes)
    dtype = "float16" if head_dim % 128 else "bfloat16"
    (out, _), _ = check(narrow(arrays, dtype), static)
    assert out.dtype == dtype


@interpreted
@pytest.mark.depends_on("interpreted GPU kernels")
@pytest.mark.smoke
@pytest.mark.parametrize("q_length, kv_length", [(1, 1), (1, 129), (130, 1), (257, 200)])
def test_lengths(q_length, kv_length):
    arrays, static = make(
        batch=1, heads=1, kv_heads=1, q_length=q_length, kv_length=kv_length, mask=Window(90, 70)
    )
    check(narrow(arrays), static)


@interpreted
@pytest.mark.depends_on("interpreted GPU kernels")
@pytest.mark.smoke
def test_gradients_of_parts_of_the_keys_add_up():
    """As in ring attention: each part's gradients are computed from the lse of all keys."""
    arrays, static = make(**SIZES, heads=2, kv_heads=1, mask=Full())
    x, spec = split(narrow(arrays), static)
    dout = jnp.cos(jnp.arange(x.q.size, dtype=jnp.float32)).reshape(x.q.shape)
    parts = [x._replace(k=x.k[:, a:b], v=x.v[:, a:b]) for a, b in ((0, 64), (64, 130))]
    attend = jax.jit(kernel(), static_argnums=1)
    of_parts = [finished(attend, part, spec) for part in parts]
    wide = [(out.astype(jnp.float32), lse) for out, lse in of_parts]
    out, lse = merge(*wide[0], *wide[1])
    delta = jnp.sum(out * dout, -1).swapaxes(1, 2)
    settings = kernel().keywords["settings"]
    run = jax.jit(functools.partial(flash.gradients, settings=settings), static_argnums=1)
    one, two = (finished(run, part, spec, dout, lse, delta) for part in parts)
    assert one.q_offset is one.q_segment_ids is one.slopes is one.sinks is None

    def loss(qkv):
        return jnp.sum(reference.attention(x._replace(**qkv), spec)[0] * dout)

    floats = {n: getattr(x, n).astype(jnp.float32) for n in "qkv"}
    want = jax.jit(jax.grad(loss))(floats)
    close(np.float32(one.q) + np.float32(two.q), want["q"], 1e-2)
    close(np.concatenate((one.k, two.k), 1), want["k"], 1e-2)
    close(np.concatenate((one.v, two.v), 1), want["v"], 1e-2)


def test_a_mesh_splits_batch_and_heads():
    q, k = operands(heads=4).q, operands(heads=2).q
    loss = lambda q, k, v: flash.attention(Operands(q, k, v), SPEC)[0].astype(jnp.float32).sum()
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k)
    assert [a.shape for a in traced.out_avals] == [q.shape, k.shape, k.shape]
    text = str(traced)
    assert text.count("shard_map") == 2
    assert "bf16[2,256,2,64]" in text and "bf16[2,256,1,64]" in text


def operands(dtype="bfloat16", head_dim=64, heads=2, **more):
    x = jax.ShapeDtypeStruct((4, 256, heads, head_dim), jnp.dtype(dtype))
    return Operands(x, x, x, **more)


SPEC = Spec(Causal(), 1.0)


@pytest.mark.parametrize(
    "x, reason",
    [
        (operands("float32"), r"dtype float32; allowed: bfloat16, float16"),
        (operands(head_dim=12), r"head_dim 12; allowed: multiples of 8 up to 256"),
        (operands(head_dim=320), r"head_dim 320; allowed: multiples of 8 up to 256"),
        (operands(bias=jnp.zeros((1, 1, 1, 1))), r"bias is an array; allowed: None or Alibi"),
    ],
)
def test_unsupported_calls(x, reason):
    with pytest.raises(Unsupported, match=reason):
        flash.check(x, SPEC)


@pytest.mark.parametrize("which", ["forward", "queries", "keys"])
def test_blocks_that_exceed_shared_memory_raise_before_compilation(which):
    settings = flash.Settings(**{which: Blocks(128, 128, 4)})
    with pytest.raises(Unsupported, match=f"{which} .* bytes of shared memory; .*{SHARED_MEMORY}"):
        flash.check(operands(head_dim=256), SPEC, settings)
    flash.check(operands(head_dim=64), SPEC, settings)


@pytest.mark.parametrize("head_dim", flash.HEAD_DIMS)
def test_default_blocks_fit(head_dim):
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)
    x = operands(head_dim=head_dim, q_segment_ids=ids, kv_segment_ids=ids, slopes=slopes)
    flash.check(x, SPEC)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((64, 64, 2), r"rows=64; allowed: multiples of 128"),
        ((128, 80, 2), r"columns=80; allowed: multiples of 64 up to 256"),
        ((128, 64, 0), r"stages=0; allowed: 1 or more"),
    ],
)
def test_invalid_block_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        Blocks(*sizes)
