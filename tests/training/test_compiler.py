"""Named groups of compiler options."""

import pytest

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.training.compiler import CompilerConfig, init_options, options


def test_groups_join_on_their_own_platform_alone():
    config = parse_run(["--compiler.groups=large_vmem, pipelined_all_gather,gpu_priority"]).compiler
    assert options(config, "tpu") == {
        "xla_tpu_scoped_vmem_limit_kib": 98304,
        "xla_tpu_enable_ag_backward_pipelining": True,
    }
    assert options(config, "gpu") == {"xla_gpu_enable_highest_priority_async_stream": True}
    assert options(config, "cpu") == options(CompilerConfig(), "cpu") != {}
    assert options(CompilerConfig(), "tpu") is None
    assert init_options("cpu") and init_options("tpu") is None


def test_an_unknown_group_is_one_line_with_the_known():
    with pytest.raises(ConfigError, match="'fast' is not one of large_vmem, ") as error:
        parse_run(["--compiler.groups=large_vmem,fast"])
    assert "\n" not in str(error.value)


def test_groups_that_contradict_each_other_are_named():
    with pytest.raises(ConfigError, match=r"fused_all_gather sets .*, sparse_core_all_gather to"):
        parse_run(["--compiler.groups=fused_all_gather,sparse_core_all_gather"])


def test_a_group_is_refused_on_a_chip_that_it_is_not_for():
    config = CompilerConfig("fused_all_gather,gpu_priority")
    assert options(config, "tpu", "TPU v5 lite")
    assert options(config, "gpu", "NVIDIA A100")
    with pytest.raises(ConfigError, match="fused_all_gather is for v5e, not for v6e"):
        options(config, "tpu", "TPU v6 lite")
