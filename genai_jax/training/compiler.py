"""XLA compiler options for the training step, in named groups with one purpose each.

They are passed to `jax.jit` rather than set for the process in XLA_FLAGS or LIBTPU_INIT_ARGS, so
that a run's flags record all of them and a compile check on another machine compiles the same
program.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from genai_jax.config import ConfigError, field
from kernels_pallas.targets import TARGETS

Options = Mapping[str, bool | int | str]


class Group(NamedTuple):
    """Options that only make sense together."""

    platform: str  # "tpu" or "gpu"
    meaning: str
    options: Options
    chips: tuple[
        str, ...
    ] = ()  # that it applies to, by their names in kernels_pallas.targets; (): all


# How the sparse cores share a chip with the tensor cores, whichever collective they run.
_SPARSE_CORE = {
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_enable_instruction_fusion": False,
    "xla_sc_disable_megacore_partitioning": True,
}
_SPARSE_CORE_CHIPS = ("v5p", "v6e", "7x")  # chips with sparse cores
_COMBINED = 2**30  # bytes

# libtpu 0.0.50 refuses fused collectives on chips other than v5e because they may compute wrong
# results there; 0.0.42 accepts them silently.
GROUPS = {
    "large_vmem": Group(
        "tpu", "one fusion may use 96 MiB of the 128 MiB of on-chip memory",
        {"xla_tpu_scoped_vmem_limit_kib": 98304}, ("v5e", "v6e"),
    ),
    "fused_all_gather": Group(
        "tpu", "all-gathers run inside fused matmuls, and may span several of them",
        {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_gather": True,
        },
        ("v5e",),
    ),
    "fused_all_reduce": Group(
        "tpu", "all-reduces run inside fused matmuls, and may span several of them",
        {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_reduce": True,
        },
        ("v5e",),
    ),
    "async_all_to_all": Group(
        "tpu", "the exchange of tokens between experts overlaps computation",
        {"xla_tpu_enable_async_all_to_all": True},
    ),
    "pipelined_all_gather": Group(
        "tpu", "the backward loop gathers the next layer's parameters during this layer",
        {"xla_tpu_enable_ag_backward_pipelining": True},
    ),
    "data_parallel_all_reduce": Group(
        "tpu", "all-reduces of gradients, also of different sizes, overlap the backward pass",
        {
            "xla_tpu_enable_data_parallel_all_reduce_opt": True,
            "xla_tpu_data_parallel_opt_different_sized_ops": True,
        },
    ),
    "reduce_scatter_layout": Group(
        "tpu", "layouts are chosen so that an all-reduce plus slice becomes a reduce-scatter",
        {
            "xla_tpu_assign_all_reduce_scatter_layout": True,
            "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
            "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
        },
    ),
    "sparse_core_all_gather": Group(
        "tpu", "all-gathers run on the sparse cores instead of the tensor cores",
        {
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
            "xla_tpu_enable_all_gather_offload_tracing": True,
            **_SPARSE_CORE,
        },
        _SPARSE_CORE_CHIPS,
    ),
    "sparse_core_reduce_scatter": Group(
        "tpu", "reduce-scatters run on the sparse cores instead of the tensor cores",
        {
            "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
            "xla_tpu_enable_reduce_scatter_offload_tracing": True,
            **_SPARSE_CORE,
        },
        _SPARSE_CORE_CHIPS,
    ),
    "sparse_core_all_reduce": Group(
        "tpu", "all-reduces run on the sparse cores instead of the tensor cores",
        {
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
            "xla_tpu_enable_all_reduce_offload_tracing": True,
            **_SPARSE_CORE,
        },
        _SPARSE_CORE_CHIPS,
    ),
    "windowed_einsum": Group(
        "tpu", "matmuls with a gathered operand, of any size, become rings of small ones",
        {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 0},
    ),
    "no_windowed_einsum": Group(
        "tpu", "matmuls with a gathered operand gather first, then multiply; none becomes a ring",
        {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    ),
    "reschedule": Group(
        "tpu", "a schedule that does not fit in memory is retried with less overlap, five times",
        {"xla_latency_hiding_scheduler_rerun": 5},
    ),
    "host_offload": Group(
        "tpu", "many transfers to and from the host run at once and overlap computation",
        {
            "xla_tpu_enable_all_experimental_scheduler_features": True,
            "xla_tpu_enable_scheduler_memory_pressure_tracking": True,
            "xla_tpu_host_transfer_overlap_limit": 24,
            "xla_max_concurrent_host_send_recv": 100,
            "xla_tpu_scheduler_percent_shared_memory_limit": 100,
            "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
            "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
        },
    ),
    "gpu_latency_hiding": Group(
        "gpu", "collectives start early and are awaited late",
        {"xla_gpu_enable_latency_hiding_scheduler": True},
    ),
    "gpu_priority": Group(
        "gpu", "collectives take priority over other work on the device",
        {"xla_gpu_enable_highest_priority_async_stream": True},
    ),
    "gpu_double_buffering": Group(
        "gpu", "loops over layers are unrolled by two, so that the collectives of both overlap",
        {"xla_gpu_enable_while_loop_double_buffering": True},
    ),
    "gpu_pipelined_stages": Group(
        "gpu", "sends between pipeline stages overlap the next iteration of their loop",
        {"xla_gpu_enable_pipelined_p2p": True},
    ),
    "gpu_combine": Group(
        "gpu", "collectives of one kind are combined up to 1 GiB, whatever their dimension",
        {
            "xla_gpu_all_gather_combine_threshold_bytes": _COMBINED,
            "xla_gpu_reduce_scatter_combine_threshold_bytes": _COMBINED,
            "xla_gpu_all_reduce_combine_threshold_bytes": _COMBINED,
            "xla_gpu_enable_all_gather_combine_by_dim": False,
            "xla_gpu_enable_reduce_scatter_combine_by_dim": False,
        },
    ),
    "gpu_windowed_einsum": Group(
        "gpu", "matmuls with a gathered operand become rings of small ones on several streams",
        {
            "xla_gpu_threshold_for_windowed_einsum_mib": 0,
            "xla_gpu_multi_streamed_windowed_einsum": True,
        },
    ),
    "gpu_library_matmul": Group(
        "gpu", "all matmuls use cuBLAS instead of generated kernels",
        {"xla_gpu_enable_triton_gemm": False},
    ),
}  # fmt: skip

# Used whatever the groups. On CPU, XLA's YNNPACK fusions slow the step down by 10 to 25 percent
# (jax 0.10.2).
_ALWAYS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}
# A program that runs once is not worth optimizing: the init of a small network compiles in 2 s
# instead of 23 s.
_INIT = {"cpu": {"xla_backend_optimization_level": 0}}


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    groups: str = field(
        "",
        f"Comma-separated groups of compiler options: {', '.join(GROUPS)}. Each applies only to "
        "its own platform.",
        changeable=True,
    )

    def __post_init__(self):
        for name in self.names:
            if name not in GROUPS:
                raise ValueError(
                    f"--compiler.groups={self.groups}: {name!r} is not one of {', '.join(GROUPS)}"
                )
        for platform in {group.platform for group in GROUPS.values()}:
            _merge_options(self.names, platform)

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.groups.split(",") if name.strip()]


def options(config: CompilerConfig, platform: str, device_kind: str = "") -> Options | None:
    """The options to compile the step with; None for the compiler's defaults.

    Args:
      config: the groups.
      platform: "cpu", "gpu" or "tpu".
      device_kind: as jax names it, e.g. "TPU v6 lite".

    Raises:
      ConfigError: a group that does not apply to such a device.
    """
    kinds = {target.device_kind: name for name, target in TARGETS.items()}
    for name in config.names:
        group, chip = GROUPS[name], kinds.get(device_kind)
        if chip and group.platform == platform and chip not in (group.chips or (chip,)):
            raise ConfigError(
                f"--compiler.groups={config.groups}: {name} is for {', '.join(group.chips)}, not "
                f"for {chip}"
            )
    return {**_ALWAYS.get(platform, {}), **_merge_options(config.names, platform)} or None


def init_options(platform: str) -> Options | None:
    """The options to compile the initialization of the state with."""
    return _INIT.get(platform)


def _merge_options(names: list[str], platform: str) -> Options:
    """The options of the groups for a platform; ValueError if two groups contradict each other."""
    merged, owner = {}, {}
    for name in names:
        group = GROUPS[name]
        if group.platform != platform:
            continue
        for option, value in group.options.items():
            if merged.setdefault(option, value) != value:
                raise ValueError(
                    f"--compiler.groups: {owner[option]} sets {option} to {merged[option]}, {name} "
                    f"to {value}; leave one out"
                )
            owner.setdefault(option, name)
    return merged
