"""The fused linear cross-entropy and its gradients against the definition, on every backend."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from kernels_pallas import Unsupported, chunked_cross_entropy
from kernels_pallas.chunked_cross_entropy import Spec, Tokens, losses
from kernels_pallas.gpu import linear_cross_entropy as gpu
from kernels_pallas.tpu import linear_cross_entropy as tpu

from .cases import FAST, close, finished

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
    w = rng.standard_normal((embed, vocab), np.float32) * (8 / embed) ** 0.5
    targets = rng.integers(-2, vocab + 2, (*rows, tokens))
    weights = rng.uniform(size=targets.shape).astype(np.float32)
    return x, w, targets, weights


def results(call, x, w, targets, weights, **options):
    """(values, gradients of x and w) for a loss with uneven weights on the tokens and their lse."""

    def loss(x, w):
        out = call(x, w, targets, **options)
        return jnp.sum(out.loss * weights + 0.3 * out.lse * weights**2), out

    f = jax.grad(loss, (0, 1), has_aux=True)
    gradients, out = finished(jax.jit(f, compiler_options=FAST), x, w)
    return out, gradients


def exact(x, w, targets, weights, **options):
    """The same in float64."""
    with jax.enable_x64(True):
        return results(reference, np.float64(x), np.float64(w), targets, weights, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 0, 1, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_xla_matches_the_definition(options, chunk_size):
    arguments, options = make(), OPTIONS[options]
    out, gradients = results(linear_cross_entropy, *arguments, chunk_size=chunk_size, **options)
    want, slopes = exact(*arguments, **options)
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_sums_match_the_per_token_values(options, chunk_size):
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


def test_gradients_are_rounded_after_scaling():
    """The gradients of the weighted sum overflow float16; those of the requested mean do not."""
    x, w, targets, _ = make((1,), 40, 8, 17)
    x, w = np.float16(10 * x), np.float16(10 * w)
    weights = np.full(targets.shape, 1e4)
    total = lambda x, w: linear_cross_entropy(x, w, targets, weights=weights).loss
    got = jax.grad(lambda x, w: total(x, w) / weights.sum(), (0, 1))(x, w)
    assert {a.dtype for a in got} == {jnp.dtype("float16")}
    with jax.enable_x64(True):
        mean = lambda x, w: jnp.sum(reference(x, w, targets).loss) / weights.size
        want = jax.jit(jax.grad(mean, (0, 1)))(np.float64(x), np.float64(w))
    close(got, want, 2e-3)


def on_tpu(interpret, blocks):
    settings = tpu.Settings(blocks, blocks, interpret)

    def call(x, w, targets, z_loss=0.0, logits_soft_cap=None):
        spec = Spec(logits_soft_cap, z_loss)
        tokens = tpu.per_token(x, w, targets, spec, settings)
        return module.CrossEntropy(*losses(tokens, targets, w.shape[1], z_loss))

    return call


# Sizes that are not multiples of the blocks, and several blocks along both dimensions.
@pytest.mark.parametrize("vocab, options", [(300, "z-loss"), (256, "z-loss, soft cap")])
def test_tpu_kernels_match_the_definition(vocab, options):
    arguments, options = make((1,), 150, 24, vocab), OPTIONS[options]
    call = on_tpu(pltpu.InterpretParams(uninitialized_memory="nan"), tpu.Blocks(128, 128))
    out, gradients = results(call, *arguments, **options)
    want, slopes = exact(*arguments, **options)
    close(out, want, 2e-6)
    close(gradients, slopes, 2e-5)


def test_tpu_kernels_ignore_targets_in_the_last_block_beyond_the_vocabulary():
    x, w, targets, weights = make((1,), 20, 8, 130)
    targets[0, ::2] = 130 + np.arange(10)
    call = on_tpu(pltpu.InterpretParams(uninitialized_memory="nan"), tpu.Blocks(128, 128))
    got = results(call, x, w, targets, weights, logits_soft_cap=3.0)
    close(got, exact(x, w, targets, weights, logits_soft_cap=3.0), 2e-5)


def test_tpu_kernels_have_no_race(capfd):
    arguments = make((1,), 150, 16, 200)
    interpret = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan"
    )
    got = results(on_tpu(interpret, tpu.Blocks(128, 128)), *arguments)
    close(got, exact(*arguments), 2e-5)
    assert "RACE" not in capfd.readouterr().out.upper()


@pytest.mark.depends_on("interpreted GPU kernels")
@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="jax has no GPU interpreter")
@pytest.mark.parametrize(
    "options", ["plain", pytest.param("z-loss, soft cap", marks=pytest.mark.smoke)]
)
def test_gpu_kernel_matches_the_definition(options):
    """Also checks for races: the interpreter raises an error if there is one."""
    x, w, targets, _ = make((), 200, 64, 450)
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    cap = OPTIONS[options].get("logits_soft_cap")
    settings = gpu.Settings(2, plgpu.InterpretGPUParams(detect_races=True))
    tokens = gpu.forward(x, w, targets, Spec(cap), settings)
    with jax.enable_x64(True):
        want = reference(np.float64(x), np.float64(w), targets, logits_soft_cap=cap)
    _, nll, lse, correct = losses(tokens, targets, 450, 0.0)
    close((nll, lse, correct), (want.nll, want.lse, want.correct), 2e-6)


def test_gpu_gradients_match_those_of_the_chunks(monkeypatch):
    """Both share one gradient rule: with a substitute for the forward kernel, all values agree."""
    arguments = make()

    def forward(x, w, targets, spec):
        tokens = chunked_cross_entropy.per_token(x[None], w, targets[None], spec)
        return jax.tree.map(lambda a: a[0], tokens)

    monkeypatch.setattr(gpu, "forward", forward)
    x, w, targets, weights = arguments
    for options in OPTIONS.values():
        spec = Spec(options.get("logits_soft_cap"), options.get("z_loss", 0.0))

        def call(operation, spec=spec):
            f = lambda x, w: (
                operation.summed(x, w, targets, weights, spec)[0]
                + jnp.sum(jnp.cos(operation.per_token(x, w, targets, spec).lse))
            )
            return jax.value_and_grad(f, (0, 1))(x, w)

        close(call(module.BACKENDS["gpu"].run), call(module.BACKENDS["xla"].run), 5e-6)


def test_gradient_of_the_reference():
    with jax.enable_x64(True):
        x, w, targets, _ = (np.asarray(a, np.float64) for a in make((), 5, 3, 4))
        call = lambda x, w: reference(x, w, targets.astype(int), z_loss=0.1, logits_soft_cap=2.0)[
            :3
        ]
        check_grads(jax.jit(call), (x, w), order=1, modes=("rev",))


def test_matches_the_dense_computation():
    x, w, targets, _ = make()
    targets = np.clip(targets, 0, 16)
    probabilities = jax.nn.softmax(x @ w)
    chosen = np.take_along_axis(np.asarray(probabilities), targets[..., None], -1)[..., 0]
    out = linear_cross_entropy(x, w, targets)
    close(out.nll, -np.log(chosen), 2e-6)
    assert (np.asarray(out.correct) == (np.argmax(x @ w, -1) == targets)).all()
    close(linear_cross_entropy(x, w, targets, logits_soft_cap=1e4).loss, out.loss, 1e-6)


def test_targets_outside_the_vocabulary_are_ignored():
    x, w, targets, weights = make()
    outside = (targets < 0) | (targets >= 17)
    assert outside.any()
    out = linear_cross_entropy(x, w, targets, z_loss=0.1)
    assert not np.asarray(out.loss)[outside].any() and not np.asarray(out.correct)[outside].any()
    loss = lambda x: linear_cross_entropy(x, w, targets, weights=weights, z_loss=0.1).loss
    gradient = np.abs(jax.grad(loss)(x)).sum(-1)
    assert not gradient[outside].any() and gradient[~outside].all()


def test_targets_narrower_than_the_vocabulary():
    x, w, targets, _ = make((), 11, 8, 300)
    targets %= 128
    wide = linear_cross_entropy(x, w, targets).loss
    assert wide.all() and (linear_cross_entropy(x, w, targets.astype(np.int8)).loss == wide).all()


def test_bfloat16_is_as_accurate_as_xla():
    """XLA's logits come from a bfloat16 matmul, like those of a dense layer."""
    x, w, targets, weights = make((), 64, 128, 200)
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)

    def plain(x, w, targets):
        logits = (x @ w).astype(jnp.float32)
        lse = jax.nn.logsumexp(logits, -1)
        tokens = Tokens(
            lse, jnp.sum(jnp.where(jnp.arange(200) == targets[:, None], logits, 0), -1), lse
        )
        return module.CrossEntropy(*losses(tokens, targets, 200, 0.0))

    want = exact(x, w, targets, weights)

    def errors(call):
        out, gradients = results(call, x, w, targets, weights)
        pairs = zip((out.loss, *gradients), (want[0].loss, *want[1]), strict=True)
        return [np.sqrt(np.mean((np.float64(a) - np.float64(b)) ** 2)) for a, b in pairs]

    for ours, theirs in zip(errors(linear_cross_entropy), errors(plain), strict=True):
        assert ours <= 1.2 * theirs


def test_memory_is_a_tenth_of_that_for_all_logits():
    """At vocabulary 128k, forward and backward: XLA's temporary memory."""

    def temporary(call):
        f = jax.grad(lambda x, w, targets: jnp.sum(call(x, w, targets)), (0, 1))
        shapes = (
            jax.ShapeDtypeStruct((8192, 64), jnp.bfloat16),
            jax.ShapeDtypeStruct((64, 131_072), jnp.bfloat16),
            jax.ShapeDtypeStruct((8192,), jnp.int32),
        )
        return jax.jit(f).lower(*shapes).compile(FAST).memory_analysis().temp_size_in_bytes

    all_at_once = temporary(lambda *a: reference(*a).loss)
    ones = np.ones(8192, np.float32)
    assert temporary(lambda *a: linear_cross_entropy(*a).loss) <= 0.1 * all_at_once
    weighted = lambda *a: linear_cross_entropy(*a, weights=ones).loss
    assert temporary(weighted) <= 0.1 * all_at_once


X, W, TARGETS, WEIGHTS = make()


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=X[0, 0]), r"x has shape \(8,\); allowed: \[..., tokens, embed\]"),
        (dict(w=W[0]), r"w has shape \(17,\); allowed: \[embed, vocab\]"),
        (dict(w=W[:5]), r"x has embed=8 and w embed=5; they must be equal"),
        (dict(w=W[:, :0]), r"w has shape \(8, 0\); every size must be >= 1"),
        (dict(x=X.astype(int)), r"x has dtype int(32|64); allowed: float32"),
        (dict(targets=TARGETS[:2]), r"targets has shape \(2, 11\).*=\[3, 11\]"),
        (dict(targets=WEIGHTS), r"targets .* dtype float32; allowed: integers"),
        (dict(weights=WEIGHTS[0]), r"weights has shape \(11,\).*=\[3, 11\]"),
        (dict(z_loss=-1), r"z_loss is -1; allowed: a finite number >= 0"),
        (dict(logits_soft_cap=0), r"logits_soft_cap is 0; allowed: None or a finite number > 0"),
        (dict(chunk_size=-3), r"chunk_size is -3; allowed: None or an integer >= 0"),
        (dict(backend="gpu"), r"backend 'gpu' is not available on cpu: allowed: auto, xla"),
        (dict(backend="cuda"), r"backend 'cuda' is unknown; for cpu: allowed: auto, xla"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    arguments = dict(x=X, w=W, targets=TARGETS) | change
    for f in (linear_cross_entropy, module.explain):
        with pytest.raises(ValueError, match=match) as error:
            f(**arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kernels, embed, dtype, match",
    [
        (tpu, 64, jnp.float64, r"dtype float64; allowed: float32, bfloat16, float16"),
        (tpu, 100_000, jnp.float32, r"embed 100000: a block of it does not fit VMEM, \d+ MiB"),
        (gpu, 64, jnp.float32, r"dtype float32; allowed: bfloat16, float16"),
        (gpu, 72, jnp.bfloat16, r"embed 72; allowed: multiples of 64"),
    ],
)
def test_unsupported_calls(kernels, embed, dtype, match):
    with jax.enable_x64(True), pytest.raises(Unsupported, match=match):
        x = jax.ShapeDtypeStruct((1, 8, embed), dtype)
        kernels.check(x, jax.ShapeDtypeStruct((embed, 100), dtype), Spec())
