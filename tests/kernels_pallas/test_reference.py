"""The reference against the definition of attention as a loop in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas import Alibi, Causal, Full, attention

from .cases import FEATURES, close, make, run


def loop(q, k, v, *, mask, bias=None, segment_ids=None, scale=None, logits_soft_cap=None,
         sinks=None, q_offset=0):  # fmt: skip
    """One query and one key at a time, using only the mask's predicate."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, q_length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    offset = np.broadcast_to(q_offset, (batch,))
    shape = (batch, heads, q_length, k.shape[1])
    if bias is not None and not isinstance(bias, Alibi):
        bias = np.broadcast_to(np.asarray(bias, np.float64), shape)
    out, lse = np.zeros(q.shape), np.full(shape[:3], -np.inf)
    for b, h, i in np.ndindex(*shape[:3]):
        weights, values = [], []
        for j in range(k.shape[1]):
            position = offset[b] + i
            if not mask.allowed(position, np.int64(j)):
                continue
            if segment_ids is not None and segment_ids[0][b, i] != segment_ids[1][b, j]:
                continue
            s = scale * q[b, i, h] @ k[b, j, h // group]
            if logits_soft_cap is not None:
                s = logits_soft_cap * np.tanh(s / logits_soft_cap)
            if isinstance(bias, Alibi):
                s -= float(bias.slopes[h]) * abs(position - j)
            elif bias is not None:
                s += bias[b, h, i, j]
            weights.append(np.exp(s))
            values.append(v[b, j, h // group])
        total = sum(weights) + (0 if sinks is None else np.exp(float(sinks[h])))
        if total > 0:
            lse[b, h, i] = np.log(total)
            out[b, i, h] = sum((w * x for w, x in zip(weights, values, strict=True)), 0) / total
    return out, lse


@pytest.mark.smoke
@pytest.mark.parametrize("name", FEATURES)
def test_reference_matches_the_loop(name):
    arrays, static = make(**FEATURES[name])
    got = run(arrays, static, "xla", return_lse=True)
    assert got[0].dtype == got[1].dtype == jnp.float32
    close(got, loop(**arrays, **static), 2e-6)


def test_gradient_of_the_reference():
    with jax.enable_x64(True):
        arrays, static = make(q_length=5, kv_length=6, head_dim=3, **FEATURES["everything"])
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
        f = jax.jit(lambda arrays: attention(**arrays, **static, backend="xla"))
        check_grads(f, (arrays,), order=1, modes=("rev", "fwd"))


@pytest.mark.parametrize("backend", ["xla", "xla_chunked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(backend, dtype):
    arrays, static = make(kv_heads=2)
    want = run(arrays, static)
    half = {n: x.astype(jnp.dtype(dtype)) for n, x in arrays.items()}
    out, lse = run(half, static, backend, return_lse=True)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    close(out, want, 2e-2)


def test_matches_jax_nn():
    arrays, _ = make(q_length=61, kv_heads=2)
    for mask, causal in ((Causal(), True), (Full(), False)):
        want = jax.nn.dot_product_attention(*arrays.values(), is_causal=causal)
        close(run(arrays, dict(mask=mask)), want, 2e-6)
