"""One device and eight give the same state."""

import json
import subprocess
import sys

import pytest

from tests.commands import environment
from tests.conftest import ROOT


def report_of(script: str, *names: str) -> dict:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "tasks" / script), *names],
        env=environment(devices=8), cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "names",
    [("dit_text", "unet_class", "shortcut"), ("classifier", "gan", "ladder", "flow", "rbm")],
    ids=["diffusion", "others"],
)
def test_the_whole_state_of_every_image_task(names):
    report = report_of("eight_devices.py", *names)
    assert set(report) == set(names)
    for name, facts in report.items():
        assert facts["difference"] < 1e-5, (name, facts)
        assert facts["sharded"], name


def test_codebooks_and_parameters_of_a_quantized_autoencoder():
    for name, facts in report_of("eight_devices_vq.py").items():
        assert facts["codebooks"] == pytest.approx(0, abs=1e-5), (name, facts)
        assert facts["params"] == pytest.approx(0, abs=2e-5), (name, facts)
