"""A stopped run of an image task goes on as if it had not been stopped.

Adversarial and quantized ones, which carry more than parameters, are in test_gan and
test_autoencoder."""

import json
import pathlib

import pytest

from genai_jax import evaluate, sample
from genai_jax.config import ConfigError
from tests.tasks.eight_devices import TASK_FLAGS
from tests.tasks.runs import resumed, run_to

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


def test_resumed_metrics_equal_those_of_an_uninterrupted_run(tmp_path, capsys):
    flags = (*COMMON, *TASK_FLAGS["shortcut"])
    whole = tmp_path / "whole"
    rows = run_to(whole, 4, *flags)
    assert resumed(whole, 2, tmp_path / "on", 4, *flags) == rows and len(rows) == 4
    capsys.readouterr()
    assert sample.main([f"--workdir={whole}", "--num_samples=4", "--ema=0.9"]) == 0
    for path in capsys.readouterr().out.split():
        assert pathlib.Path(path).read_bytes().startswith(b"\x89PNG")
    assert evaluate.main([f"--workdir={whole}", "--batches=1"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    with pytest.raises(ConfigError, match="--max_tokens is not a flag of a run of --task=few_step"):
        sample.main([f"--workdir={whole}", "--max_tokens=3"])
