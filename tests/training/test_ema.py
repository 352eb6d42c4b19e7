"""Averages of the parameters: power-function profiles, and those reconstructed afterwards."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax import evaluate, train
from genai_jax.components import make_task, read_config
from genai_jax.config import ConfigError
from genai_jax.training.ema import EmaConfig, gamma_of, init_ema, update_ema
from genai_jax.training.ema_profiles import inner_product, profile_weights, reconstruct
from genai_jax.training.restore import restore_model
from tests.tasks.diffusion.test_diffusion import TINY_DIT


def test_the_exponent_of_a_width():
    assert gamma_of(0.05) == pytest.approx(16.97220, abs=1e-5)
    gamma = gamma_of(0.1)
    width = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5
    assert width == pytest.approx(0.1, rel=1e-9)
    assert gamma_of((1 / 12) ** 0.5) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"relative_width=0.3 is outside \(0, 0.2887\]"):
        gamma_of(0.3)


def test_inner_products_are_integrals():
    t = (np.arange(200_000) + 0.5) / 200_000 * 10
    profile = lambda end, gamma: np.where(t < end, (gamma + 1) * t**gamma / end ** (gamma + 1), 0)
    for a, b in (((10, 6.0), (10, 2.0)), ((4, 6.0), (10, 2.0)), ((10, 3.0), (5, 8.0))):
        wanted = np.mean(profile(*a) * profile(*b)) * 10
        assert inner_product(*a, *b) == pytest.approx(wanted, rel=1e-3)


def test_an_average_of_uniform_profile_is_the_mean():
    averages = EmaConfig(relative_width=str((1 / 12) ** 0.5)).averages()
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    ema = init_ema({"x": jnp.float32(100)}, averages)
    for i, value in enumerate(values):
        ema = update_ema(ema, {"x": jnp.float32(value)}, averages, jnp.int32(i + 1))
    (found,) = (v["x"] for v in ema.values())
    assert float(found) == pytest.approx(values.mean(), abs=1e-5)


def test_a_third_profile_is_reconstructed_from_snapshots_of_two():
    """Within a thousandth of the one tracked directly, on a random walk with drift."""
    rng = np.random.default_rng(0)
    steps = 4000
    path = np.cumsum(rng.normal(size=(steps, 8)), 0) * 0.05 + np.linspace(0, 20, steps)[:, None]
    gammas = {w: gamma_of(w) for w in (0.05, 0.1, 0.07)}
    tracked, snapshots = {w: np.zeros(8) for w in gammas}, []
    for t in range(1, steps + 1):
        for w, gamma in gammas.items():
            kept = (1 - 1 / t) ** (gamma + 1)
            tracked[w] = kept * tracked[w] + (1 - kept) * path[t - 1]
        if t % 100 == 0:
            snapshots += [(t, gammas[w], tracked[w].copy()) for w in (0.05, 0.1)]
    weights = profile_weights(
        [s[0] for s in snapshots], [s[1] for s in snapshots], steps, gammas[0.07]
    )
    found = sum(w * s[2] for w, s in zip(weights, snapshots, strict=True))
    np.testing.assert_allclose(found, tracked[0.07], rtol=1e-3)


def test_profiles_out_of_the_files_of_a_run(tmp_path, capsys):
    flags = [*TINY_DIT, "--ema.relative_width=0.1,0.2,0.15", "--ema.snapshot_every=2"]
    flags += ["--train.steps=12", "--eval.batches=1", "--train.progress=false"]
    flags += ["--ema.use=width0.15", f"--workdir={tmp_path}"]
    assert train.main(flags) == 0
    config = read_config(str(tmp_path))
    task = make_task(config)
    direct = restore_model(task, config)
    assert direct.ema == "width0.15"
    found = reconstruct(tmp_path, 0.15, 12, direct.params)
    kernel = lambda params: np.asarray(params["model"]["patch_out"]["kernel"])
    scale = np.abs(kernel(direct.params)).max()
    np.testing.assert_allclose(kernel(found), kernel(direct.params), atol=1e-3 * scale)
    other = restore_model(task, config, ema="width:0.12")
    assert other.ema == "width:0.12"
    assert np.any(kernel(other.params) != kernel(direct.params))
    plain = restore_model(task, config, ema="none")
    assert plain.ema is None and np.any(kernel(plain.params) != kernel(direct.params))

    # The record has both losses, and the best checkpoint is that of the average.
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    for name, flags in (("eval/ema/loss", ()), ("eval/loss", ("--ema=none",))):
        capsys.readouterr()
        assert evaluate.main([f"--workdir={tmp_path}", "--batches=1", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last[name], rel=1e-6)
    saved = json.loads((tmp_path / "checkpoints" / "12" / "metrics" / "metrics").read_text())
    assert saved["loss"] == last["eval/ema/loss"] != last["eval/loss"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"snapshot_every": 5}, "needs --ema.relative_width"),
        ({"use": "0.9"}, "is not an average of this run; it keeps none"),
        ({"relative_width": "a"}, "is not a list of numbers"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValueError, match=said):
        EmaConfig(**settings).averages()
