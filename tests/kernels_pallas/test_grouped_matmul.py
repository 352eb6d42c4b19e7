"""The grouped matmul and its gradients against the definition, and what makes it cheap."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .cases import FAST, close

module = importlib.import_module("kernels_pallas.grouped_matmul")
grouped_matmul, reference = module.grouped_matmul, module.reference

# Boundaries inside blocks, empty groups first, last and between, rows past the sum, none at all.
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
    """(out, (gradient of lhs, of rhs)) of a loss that weighs the rows unevenly."""

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
def test_xla_is_the_definition(name):
    lhs, rhs, sizes = make(SIZES[name])
    out, gradients = results(grouped_matmul, lhs, rhs, sizes)
    want, slopes = exact(lhs, rhs, sizes)
    assert out.dtype == jnp.float32
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)
    assert not np.asarray(out)[sum(SIZES[name]) :].any()
    assert not np.asarray(gradients[1])[sizes == 0].any()
