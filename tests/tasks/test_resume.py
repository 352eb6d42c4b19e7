"""A stopped run of every image task goes on as if it had not been stopped."""

import json
import pathlib

import pytest

from genai_jax import evaluate, sample, train
from tests.tasks.eight_devices import TASK_FLAGS
from tests.tasks.runs import run_to

COMMON = (
    "--data.batch_size=8",
    "--ema.decay=0.9",
    "--optimizer.schedule=constant",
    "--optimizer.warmup_steps=0",
    "--train.log_every=1",
    "--train.progress=false",
    "--eval.batches=1",
    "--checkpoint.every=2",
)
RUNS = {
    "unet_class": TASK_FLAGS["unet_class"],
    "shortcut": (*TASK_FLAGS["shortcut"], "--sampler.solver=euler", "--sampler.steps=2"),
    "rvq": (
        "--task=autoencoder", "--autoencoder.latent=rvq", "--autoencoder.channels=8",
        "--quantizer.codebooks=2", "--quantizer.codes=16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_resumed_metrics_equal_those_of_an_uninterrupted_run(name, tmp_path, capsys):
    flags = (*COMMON, *RUNS[name])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    rows = run_to(whole, 4, *flags)
    run_to(stopped, 2, *flags)
    assert run_to(stopped, 4, *flags) == rows and len(rows) == 4
    if name == "unet_class":
        return
    capsys.readouterr()
    assert sample.main([f"--workdir={whole}", "--num_samples=4", "--ema=0.9"]) == 0
    for path in capsys.readouterr().out.split():
        assert pathlib.Path(path).read_bytes().startswith(b"\x89PNG")
    assert evaluate.main([f"--workdir={whole}", "--batches=1"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0


def test_requests_of_another_task_are_refused(tmp_path):
    from genai_jax.config import ConfigError

    flags = (*COMMON, *RUNS["rvq"], "--train.steps=1", "--eval.batches=0")
    assert train.main([*flags, f"--workdir={tmp_path}"]) == 0
    with pytest.raises(ConfigError, match="--prompt is not used by a run of --task=autoencoder"):
        sample.main([f"--workdir={tmp_path}", "--prompt=x"])
