"""Reading compiled programs: loops, matmuls, collectives, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from genai_jax.networks.flops import count_flops
from genai_jax.scaling.chips import CHIPS
from genai_jax.scaling.collectives import _bandwidth, _group, collectives
from genai_jax.scaling.estimate import estimate, traffic
from genai_jax.scaling.memory import refused, stacked_buffers
from genai_jax.scaling.program import executed, flops_of, parse, trip_count

TEXT = """HloModule jit_step

%body (p: (s32[], bf16[64,128], f32[4,64,128])) -> (s32[], bf16[64,128], f32[4,64,128]) {
  %p = (s32[], bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, f32[4,64,128]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %kept = f32[4,64,128] get-tuple-element(%p), index=2
  %gathered = bf16[64,512] all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
  %row = f32[1,64,128] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1000"}}
  %zero = s32[] constant(0)
  %update = f32[4,64,128] dynamic-update-slice(%kept, %row, %i, %zero, %zero)
  ROOT %out = (s32[], bf16[64,128], f32[4,64,128]) tuple(%i, %x, %update)
}

%condition (q: (s32[], bf16[64,128], f32[4,64,128])) -> pred[] {
  %q = (s32[], bf16[64,128], f32[4,64,128]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%all-reduce-scatter.1 (a: f32[64,128]) -> f32[16,128] {
  %a = f32[64,128] parameter(0)
  %all-reduce.3 = f32[64,128] all-reduce(%a), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %cut = f32[16,128] slice(%all-reduce.3), slice={[0:16], [0:128]}
}

ENTRY %main (w: f32[4,64,128], g: f32[64,128]) -> f32[16,128] {
  %w = f32[4,64,128] parameter(0)
  %g = f32[64,128] parameter(1)
  %start = (s32[], bf16[64,128], f32[4,64,128]) custom-call(), custom_call_target="AllocateBuffer"
  %loop = (s32[], bf16[64,128], f32[4,64,128]) while(%start), condition=%condition, body=%body
  ROOT %scatter = f32[16,128] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


class Device:
    """Stands for a device of a slice."""

    platform = device_kind = "TPU v5p"

    def __init__(self, *coords, slice_index=None, process_index=0):
        self.coords, self.slice_index, self.process_index = coords, slice_index, process_index


def mesh_of(*sizes: int) -> Mesh:
    """A mesh of a 2 x 4 torus, or one of `sizes`, with axes "a" and "b"."""
    sizes = sizes or (2, 4)
    devices = np.empty(sizes, object)
    for at in np.ndindex(*sizes):
        devices[at] = Device(*at, 0)
    mesh = object.__new__(FakeMesh)
    mesh.devices, mesh.axis_names = devices, ("a", "b")
    return mesh


class FakeMesh:
    """The attributes of a mesh that counting collectives needs."""


def test_loop_bodies_count_once_per_iteration():
    program = parse(TEXT)
    loop = program.computations["main"]["loop"]
    assert trip_count(program, loop) == 4
    total = sum(
        run.times * flops_of(run.instruction, program.computations[run.where])
        for run in executed(program)
    )
    assert total == 4 * 1000
    assert stacked_buffers(program) == [((4, 64, 128), 0, 4 * 64 * 128 * 4)]


def test_collectives_have_kind_axes_and_bytes():
    gather, scatter = collectives(parse(TEXT), mesh_of(), None)
    assert (gather.kind, gather.axes, gather.times) == ("all-gather", ("b",), 4)
    assert gather.bytes == 64 * 512 * 2 and gather.sent == 4 * 64 * 512 * 2 * 3 / 4
    assert (scatter.kind, scatter.times, scatter.size) == ("reduce-scatter", 1, 4)
    assert scatter.bytes == 64 * 128 * 4


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", [0, 4]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", list(range(8))),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
    ],
)
def test_all_notations_of_device_groups(text, group):
    line = f"  %r = f32[8] all-reduce(%x), {text}, to_apply=%add"
    instruction = parse("ENTRY %e (x: f32[8]) -> f32[8] {\n" + line + "\n}").computations["e"]["r"]
    assert _group(instruction, 8).tolist() == group


def test_a_permute_goes_along_its_axis():
    line = (
        "  %r = f32[8] collective-permute-start(%x), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}"
    )
    head = "ENTRY %e (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n"
    (permute,) = collectives(parse(head + line + "\n}"), mesh_of(), None)
    assert (permute.kind, permute.axes, permute.bytes) == ("collective-permute", ("a",), 32)
    assert permute.hidden


def test_matmul_flops_of_a_compiled_loop_match_its_jaxpr():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    shapes = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), "f4")
    step = jax.grad(f, (0, 1))
    program = parse(jax.jit(step).lower(*shapes).compile().as_text())
    counted = sum(
        run.times * flops_of(run.instruction, program.computations[run.where])
        for run in executed(program, into_fusions=True)
    )
    assert counted == count_flops(step, *shapes) == 3 * 5 * 2 * 32 * 64 * 64


def test_a_matmul_written_as_a_convolution():
    head = "ENTRY %e (x: f32[8]) -> f32[8] {\n"
    operands = "  %a = bf16[4,32,16] parameter(0)\n  %b = bf16[4,16,8] parameter(1)\n"
    # A batch of four matmuls: only one element of each window of four falls on an input.
    line = (
        "  %r = bf16[4,32,8] convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, "
        "dim_labels=0bf_0io->0bf\n}"
    )
    computation = parse(head + operands + line).computations["e"]
    assert flops_of(computation["r"], computation) == 2 * 4 * 32 * 16 * 8


def test_bytes_of_slices_and_in_place_updates():
    program = parse(TEXT)
    body = program.computations["body"]
    assert traffic(body["update"], body, program) == 2 * 64 * 128 * 4
    assert traffic(body["gathered"], body, program) == 64 * 128 * 2 + 64 * 512 * 2
    assert traffic(body["out"], body, program) == 0


def test_time_on_the_links_of_a_torus():
    chip = CHIPS["v5p"]
    mesh = mesh_of(8, 4)
    whole_ring = list(mesh.devices[:, 0])
    assert _bandwidth(whole_ring, mesh, chip) == (2 * chip.link, 8)
    half = whole_ring[:4]  # not a closed ring: every link carries all of the traffic
    assert _bandwidth(half, mesh, chip) == (chip.link, 8)
    both = list(mesh.devices.flat)
    assert _bandwidth(both, mesh, chip) == (4 * chip.link, 8)
    apart = [Device(0, 0, 0, slice_index=0), Device(0, 0, 0, slice_index=1)]
    assert _bandwidth(apart, mesh, chip) == (chip.network, 0)


def test_devices_of_a_host_share_its_network():
    chip = CHIPS["h200"]
    hosts = [Device(0, 0, 0, process_index=i // 8) for i in range(32)]
    assert _bandwidth(hosts, mesh_of(), chip) == (min(8 * chip.network, chip.link), 0)
    assert _bandwidth(hosts[::4], mesh_of(), chip) == (2 * chip.network, 0)
    assert _bandwidth(hosts[:8], mesh_of(), chip) == (chip.link, 0)


def test_bytes_of_asynchronous_copies():
    text = """ENTRY %e (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128] parameter(0)
  %in = (f32[8,128]{1,0:S(1)}, f32[8,128], u32[]) copy-start(%x)
  %part = ((f32[8,128]), f32[2,128]{1,0:S(1)}, u32[]) async-start(%x), calls=%slice
  %all = (f32[8,128], f32[32,128]) all-gather-start(%x), replica_groups=[2,4]<=[8]
}"""
    body = parse(text).computations["e"]
    program = parse(text)
    assert traffic(body["in"], body, program) == 8 * 128 * 4
    assert traffic(body["part"], body, program) == 2 * 128 * 4
    assert traffic(body["all"], body, program) == 8 * 128 * 4 + 32 * 128 * 4


def test_asynchronous_collectives_overlap_with_computation():
    chip, mesh = CHIPS["v5p"], mesh_of()
    exposed = estimate(parse(TEXT), mesh, chip)
    hidden = estimate(parse(TEXT.replace("all-gather(", "all-gather-start(")), mesh, chip)
    gather = next(c for c in exposed.collectives if c.kind == "all-gather")
    assert gather.seconds == pytest.approx(gather.sent / (2 * chip.link))
    assert exposed.flops == hidden.flops == 4000
    assert hidden.exposed_seconds < exposed.exposed_seconds


def test_the_message_of_a_compiler_that_runs_out_of_memory():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm. "
        "Exceeded hbm capacity by 4.35G.\n  Largest program allocations in hbm:\n\n"
        "  1. Size: 8.00G\n"
        '     Operator: op_name="jit(step)/layers/mlp/up"\n     Shape: bf16[32,8192,14336]{2,1,0}\n'
    )
    assert refused(message) == [
        "Used 20.1G of 15.75G hbm",
        "8.00G bf16[32,8192,14336]{2,1,0} layers/mlp/up",
    ]
    assert refused("INVALID_ARGUMENT: something else") is None
