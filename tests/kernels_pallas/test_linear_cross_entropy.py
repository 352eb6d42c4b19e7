"""The fused linear cross-entropy and its gradients against the definition."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .cases import FAST, close

module = importlib.import_module("kernels_pallas.linear_cross_entropy")
linear_cross_entropy, reference = module.linear_cross_entropy, module.reference

OPTIONS = {
    "plain": {},
    "z-loss": dict(z_loss=0.1),
    "z-loss, soft cap": dict(z_loss=0.1, logits_soft_cap=3.0),
}


def make(rows=(3,), tokens=11, embed=8, vocab=17):
    """x, w, targets (some outside the vocabulary), weights."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*rows, tokens, embed), np.float32)
    w = rng.standard_normal((embed, vocab), np.float32)
    targets = rng.integers(-2, vocab + 2, (*rows, tokens))
    weights = rng.uniform(size=targets.shape).astype(np.float32)
    return x, w, targets, weights


def results(call, x, w, targets, weights, **options):
    """(values, gradients of x and w) of a loss that weighs the tokens, and their lse, unevenly."""

    def loss(x, w):
        out = call(x, w, targets, **options)
        return jnp.sum(out.loss * weights + 0.3 * out.lse * weights**2), out

    f = jax.grad(loss, (0, 1), has_aux=True)
    gradients, out = jax.jit(f, compiler_options=FAST)(x, w)
    return out, gradients


def exact(x, w, targets, weights, **options):
    """The same in float64."""
    with jax.enable_x64(True):
        return results(reference, np.float64(x), np.float64(w), targets, weights, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 0, 1, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_xla_is_the_definition(options, chunk_size):
    arguments, options = make(), OPTIONS[options]
    out, gradients = results(linear_cross_entropy, *arguments, chunk_size=chunk_size, **options)
    want, slopes = exact(*arguments, **options)
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_sums_are_those_of_the_tokens(options, chunk_size):
    x, w, targets, weights = make()
    options = OPTIONS[options]

    def summed(x, w):
        out = linear_cross_entropy(x, w, targets, weights=weights, chunk_size=chunk_size, **options)
        return 0.5 * out.loss + out.nll + out.lse + out.correct, out  # the last three: constants

    def each(x, w):
        out = linear_cross_entropy(x, w, targets, **options)
        out = jax.tree.map(lambda a: jnp.sum(a * weights), out)
        return 0.5 * out.loss, out

    got, want = (
        jax.jit(jax.grad(f, (0, 1), has_aux=True), compiler_options=FAST)(x, w)
        for f in (summed, each)
    )
    close(got, want, 5e-6)
