"""The sharding table: what it refuses, and that a mesh changes nothing but the placement."""

import jax
import jax.numpy as jnp
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.training.sharding import MESH_AXES, MeshConfig, logical_axes, make_mesh, spec_of
from tests.commands import report_of


def test_a_parameter_that_no_rule_matches_is_named():
    params = {"model": {"odd": {"kernel": jnp.zeros((2, 3))}}}
    with pytest.raises(ConfigError, match=r"no sharding rule matches parameter model/odd/kernel"):
        logical_axes(params, ((r"even/kernel", ("embed", "mlp")),))
    with pytest.raises(ConfigError, match=r"model/odd/kernel \(2, 3\) does not fit its axes"):
        logical_axes(params, ((r"odd/kernel", ("embed",)),))


def test_position_tables_are_not_split_as_vocabulary():
    params = {"model": {"position_embed": {"embedding": jnp.zeros((5, 4))}}}
    axes = logical_axes(params, make_task(parse_run([])).partition_rules)
    assert axes["model"]["position_embed"]["embedding"] == (None, "embed")


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"--mesh.tensor=3 does not fit 1 device"):
        make_mesh(MeshConfig(data=1, tensor=3), jax.devices()[:1])
    with pytest.raises(ConfigError, match="one of them may be -1"):
        make_mesh(MeshConfig(data=-1, tensor=-1))


def test_a_size_that_its_axis_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 4, 1, 1, 1, 1), MESH_AXES)
    with pytest.raises(
        ConfigError, match=r"parameter x \(6, 4\): embed of size 6 .* --mesh.fsdp=4"
    ):
        spec_of("parameter x", (6, 4), ("embed", "mlp"), mesh)


@pytest.mark.depends_on("whole runs")
def test_eight_devices_equal_one_in_the_whole_state():
    report = report_of("training/eight_devices.py")
    meshes = {"data", "fsdp", "tensor", "mixed", "log_probs_mixed", "log_probs_sequence"}
    assert set(report) == meshes | {"dirac"}
    for name, facts in report.items():
        assert facts["difference"] < 2e-5, (name, facts)
    assert all(report[name]["sharded"] for name in meshes - {"data"})
