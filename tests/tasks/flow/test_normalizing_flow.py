"""Glow: exact inverses and determinants, and a run on digits."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax import evaluate, sample
from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.invertible.glow import Glow, GlowConfig, squeeze, unsqueeze
from genai_jax.tasks.flow.task import NormalizingFlow
from tests.tasks.runs import resumed, run_to

TINY = (
    "--task=normalizing_flow",
    "--data.batch_size=8",
    "--eval.batches=1",
    "--normalizing_flow.condition=class",
    "--glow.steps_per_level=1",
    "--glow.hidden_channels=4",
    "--optimizer.schedule=constant",
    "--optimizer.warmup_steps=0",
)
LABELS = np.array([[1], [0], [2]], np.int32)


@pytest.fixture(scope="module")
def flow():
    """A flow with every parameter moved away from its start, and images."""
    network = Glow(GlowConfig(levels=2, steps_per_level=2, hidden_channels=6), (3,))
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (3, 4, 8, 1)).astype(np.float32)
    params = jax.jit(network.init)(jax.random.key(0), x, LABELS)["params"]
    moved = lambda p: p + 0.15 * rng.normal(size=p.shape).astype(np.float32)
    params = jax.tree.map(moved, params)
    call = lambda name: jax.jit(
        lambda x, labels: network.apply({"params": params}, x, labels, method=name)
    )
    return network, call("forward"), call("inverse"), x


def test_there_and_back(flow):
    network, forward, inverse, x = flow
    latents, *_ = forward(x, LABELS)
    assert [z.shape[1:] for z in latents] == network.latent_shapes((4, 8, 1))
    np.testing.assert_allclose(inverse(latents, LABELS), x, atol=1e-5)
    drawn = [np.random.default_rng(1).normal(size=z.shape).astype(np.float32) for z in latents]
    again, *_ = forward(inverse(drawn, LABELS), LABELS)
    for z, back in zip(drawn, again, strict=True):
        np.testing.assert_allclose(back, z, atol=2e-4)
    assert np.abs(inverse(drawn, LABELS * 0) - inverse(drawn, LABELS)).max() > 1e-4


def test_the_log_determinant_is_that_of_the_jacobian(flow):
    """Of images to latents in units of their prior, so the priors' scales are part of it."""
    _, forward, _, x = flow

    def flat(x):
        latents, _, _ = forward(x.reshape(1, 4, 8, 1), LABELS[:1])
        return jnp.concatenate([z.ravel() for z in latents])

    jacobian = jax.jit(jax.jacfwd(flat))(x[0].ravel())
    expected = np.linalg.slogdet(np.asarray(jacobian, np.float64))[1]
    latents, log_det, log_prior = forward(x[:1], LABELS[:1])
    standard = sum(-(np.square(z).sum() + z.size * math.log(2 * math.pi)) / 2 for z in latents)
    found = float(log_det[0] + log_prior[0]) - float(standard)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_fresh_flow_makes_activations_standard_and_squeezes_back():
    x = 3 + 5 * np.random.default_rng(0).normal(size=(64, 4, 4, 1)).astype(np.float32)
    network = Glow(GlowConfig(levels=1, steps_per_level=2, hidden_channels=4))
    variables = jax.jit(network.init)(jax.random.key(0), x)
    (z,), _, _ = jax.jit(lambda x: network.apply(variables, x, method="forward"))(x)
    np.testing.assert_allclose(np.mean(z, (0, 1, 2)), 0, atol=1e-4)
    # Each channel of its own before the mixing, a rotation, which keeps the sum of variances.
    assert np.var(z, (0, 1, 2)).mean() == pytest.approx(1, abs=1e-2)
    np.testing.assert_array_equal(unsqueeze(squeeze(x)), x)
    assert float(squeeze(x)[0, 1, 0, 2]) == x[0, 3, 0, 0]


def test_the_density_of_a_fresh_flow_is_that_of_a_normal_fit():
    """One step without a coupling that acts: a normal density of independent mixed channels."""
    rng = np.random.default_rng(0)
    x = 2 + 0.5 * rng.normal(size=(500, 2, 2, 1)).astype(np.float32)
    network = Glow(GlowConfig(levels=1, steps_per_level=1, hidden_channels=4))
    density = jax.jit(network.apply)(jax.jit(network.init)(jax.random.key(0), x), x)
    flat = x.reshape(-1, 4).astype(np.float64)
    z = (flat - flat.mean(0)) / (flat.std(0) + 1e-3)
    expected = -(np.square(z).sum(1) + 4 * math.log(2 * math.pi)) / 2
    expected -= np.log(flat.std(0) + 1e-3).sum()
    np.testing.assert_allclose(density, expected, atol=1e-3)


def test_a_run_goes_on_is_scored_and_shown(tmp_path, capsys):
    flags = (*TINY, "--checkpoint.every=2")
    whole = run_to(tmp_path / "whole", 4, *flags)
    assert resumed(tmp_path / "whole", 2, tmp_path / "on", 4, *flags) == whole and len(whole) == 4
    capsys.readouterr()
    workdir = f"--workdir={tmp_path / 'whole'}"
    assert evaluate.main([workdir, "--batches=1"]) == 0
    assert 1 < json.loads(capsys.readouterr().out)["bits_per_dim"] < 8
    for request in (("--label=3",), ("--show=interpolation", "--columns=3")):
        assert sample.main([workdir, "--num_samples=2", *request]) == 0
        assert pathlib.Path(capsys.readouterr().out.strip()).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--glow.levels=4",), "--glow.levels=4 needs images whose .* multiples of 16, not 8x8"),
        (("--dtype=bfloat16",), "--dtype=bfloat16: a flow is inverted only in float32"),
    ],
    ids=["size", "dtype"],
)
def test_bad_flags_are_refused_in_one_line(flags, said):
    with pytest.raises(ConfigError, match=said) as error:
        NormalizingFlow(parse_run([*TINY, *flags]))
    assert "\n" not in str(error.value)
