"""The TPU kernels split over a mesh: 8 devices match one."""

import json
import os
import subprocess
import sys

import pytest

from kernels_pallas.partition import mesh_axes

pytestmark = pytest.mark.depends_on("interpreted TPU kernels")


def test_eight_devices_match_one():
    command = [sys.executable, "-m", "tests.kernels_pallas.tpu_mesh"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 3
    for name, difference in differences.items():
        assert difference < 2e-6, name


@pytest.mark.parametrize(
    "axes, match",
    [
        (dict(batch="data"), r"mesh_axes\(batch='data'\); allowed: a tuple"),
        (dict(batch=("data",), heads=("data",)), "'data' is named twice"),
    ],
)
def test_invalid_axis_names(axes, match):
    with pytest.raises(ValueError, match=match), mesh_axes(**axes):
        pass
