"""Runs the TPU kernels in an interpreter, and the definition that they must match."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import reference
from kernels_pallas.spec import Spec
from kernels_pallas.tpu import flash
from kernels_pallas.tpu.visits import Blocks
from kernels_pallas.validate import prepare

from .cases import FAST, FEATURES

SMALL = Blocks(64, 128, 32)
PLAIN = flash.Settings(SMALL, SMALL, interpret=True)
# Fills uninitialized memory with nan, and waits for data as late as it may.
STRICT = flash.Settings(SMALL, SMALL, interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
# The kernels do not support bias arrays.
NAMES = [name for name in FEATURES if "bias" not in name]
SIZES = dict(q_length=141, kv_length=301, head_dim=16)


def split(arrays, static):
    """(operands, spec) of `cases.make`."""
    x, spec = prepare(**arrays, **static)
    return jax.tree.map(jnp.asarray, x), spec


def results(run, x, spec: Spec):
    """((out, lse), gradients of x) for a loss with uneven weights on out and lse; run(x, spec)."""
    floats = lambda x: {n: a for n, a in x._asdict().items() if _is_float(a)}

    def loss(arrays):
        out, lse = run(x._replace(**arrays), spec)
        seen = jnp.where(lse == -jnp.inf, 0.0, lse)
        weigh = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        total = jnp.sum(weigh * out) + jnp.sum(weigh[..., 0] * seen.swapaxes(1, 2))
        return total.astype(lse.dtype), (out, lse)

    gradients, out = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(floats(x))
    return jax.tree.map(np.asarray, (out, gradients))


def _is_float(a):
    return a is not None and jnp.issubdtype(a.dtype, jnp.floating)


def kernel(settings=PLAIN):
    return functools.partial(flash.attention, settings=settings)


def exact(arrays, static):
    """`results` of the definition in float64."""
    with jax.enable_x64(True):
        wide = lambda a: np.asarray(a, np.float64) if _is_float(np.asarray(a)) else a
        return results(reference.attention, *split(jax.tree.map(wide, arrays), static))
