"""RMSNorm with a residual against its definition."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from .cases import FAST, close

module = importlib.import_module("kernels_pallas.rms_norm")
rms_norm, reference = module.rms_norm, module.reference


def make(shape=(3, 7, 16), dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return normal(*shape), 1 + 0.3 * normal(shape[-1]), normal(*shape)


def results(call, x, scale, residual):
    """(values, gradients) for a loss with uneven weights on both outputs."""

    def loss(x, scale, residual):
        normed, h = call(x, scale, residual)
        weigh = jnp.cos(jnp.arange(h.size)).reshape(h.shape)
        return jnp.sum(weigh * normed + jnp.square(weigh * h)), (normed, h)

    f = jax.grad(loss, (0, 1) if residual is None else (0, 1, 2), has_aux=True)
    gradients, out = jax.jit(f, compiler_options=FAST)(x, scale, residual)
    return out, gradients


@pytest.mark.smoke
@pytest.mark.parametrize("with_residual", [True, False])
def test_matches_the_definition(with_residual):
    x, scale, residual = make()
    residual = residual if with_residual else None
    out, gradients = results(rms_norm, x, scale, residual)
    with jax.enable_x64(True):
        wide = [None if a is None else np.float64(a) for a in (x, scale, residual)]
        want, slopes = results(reference, *wide)
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)


def test_gradient_of_the_reference():
    with jax.enable_x64(True):
        arrays = make((2, 5), np.float64)
        check_grads(jax.jit(reference), arrays, order=1, modes=("rev",))


def test_a_larger_input_gives_the_same_direction():
    x, scale, _ = make()
    close(rms_norm(8 * x, scale, eps=0.0)[0], rms_norm(x, scale, eps=0.0)[0], 1e-6)


def test_half_precision_has_float32_statistics():
    x, scale, residual = (jnp.asarray(a, jnp.bfloat16) for a in make((64, 256)))
    normed, h = rms_norm(x, scale, residual)
    assert normed.dtype == h.dtype == jnp.bfloat16
    want = reference(*(np.float64(a) for a in (h, scale)))[0]
    rounding = np.abs(np.float64(want.astype(jnp.bfloat16)) - want)
    assert np.all(np.abs(np.float64(normed) - want) <= rounding + 1e-5 * np.abs(want))


X = jnp.zeros((2, 6))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=jnp.zeros(())), r"x has shape \(\); allowed: \[..., features\]"),
        (dict(x=X.astype(int)), r"x has dtype int32; allowed: float32"),
        (dict(scale=jnp.zeros(5)), r"scale has shape \(5,\); allowed: \[features\]=\[6\]"),
        (dict(scale=jnp.zeros(6, int)), r"scale has dtype int32"),
        (dict(residual=X[:1]), r"residual has shape \(1, 6\).*like x, \(2, 6\), float32"),
        (dict(residual=X.astype("bfloat16")), r"residual .* dtype bfloat16"),
        (dict(eps=-1), r"eps is -1; allowed: a finite number >= 0"),
        (dict(backend="tpu"), r"backend 'tpu' is unknown; for cpu: allowed: auto, xla"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    with pytest.raises(ValueError, match=match) as error:
        rms_norm(**(dict(x=X, scale=jnp.zeros(6)) | change))
    assert "\n" not in str(error.value)
