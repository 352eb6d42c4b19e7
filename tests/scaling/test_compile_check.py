"""The compile_check command on simulated devices: what it counts, what it refuses."""

import json
import os
import re
import subprocess
import sys
import types

import pytest

from genai_jax.compile_check import CheckRequest, _split
from genai_jax.config import ConfigError
from genai_jax.scaling.chips import CHIPS, EXAMPLES, Topology, gpu_description
from genai_jax.scaling.compile_text import side_by_side
from genai_jax.scaling.whole_run import hours_text, time_text, whole_run
from genai_jax.training.hardware import peak_of
from tests.commands import environment
from tests.conftest import ROOT

TINY = (
    "--transformer.num_layers=2", "--transformer.embed_dim=64", "--transformer.num_heads=4",
    "--data.batch_size=8", "--data.sequence_length=32",
)  # fmt: skip


def check(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "genai_jax.compile_check", *flags]
    return subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def report_of(folder, *flags: str) -> tuple[dict, str]:
    path = folder / "report.json"
    result = check("--topology=cpu:8", f"--output={path}", *TINY, *flags)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text()), result.stdout


def by_kind(report: dict) -> dict[str, float]:
    sums: dict[str, float] = {}
    for c in report["collectives"]:
        sums[c["kind"]] = sums.get(c["kind"], 0) + c["bytes_sent"]
    return sums


@pytest.mark.smoke
def test_data_parallelism_adds_only_the_all_reduce_of_the_gradients(tmp_path):
    report, text = report_of(tmp_path, "--mesh.data=8")
    assert set(by_kind(report)) == {"all-reduce"}
    # In a ring, an all-reduce sends 2 (n - 1) / n of an array.
    reduced = by_kind(report)["all-reduce"] / (2 * 7 / 8)
    assert reduced == pytest.approx(4 * report["parameters"], rel=0.01)
    assert report["devices"] == 8 and report["mesh"] == {"data": 8}
    assert report["memory"]["parameters"] == 4 * report["parameters"]
    assert report["memory"]["optimizer"] == pytest.approx(8 * report["parameters"], rel=0.01)
    # Without rematerialization the program computes the FLOPs of the model, except that on a CPU
    # it also computes the masked half of causal attention.
    assert report["program_flops"] * 8 == pytest.approx(report["flops_per_step"], rel=0.1)
    assert "fits" in text and "all-reduce" in text


def test_sharded_parameters_are_gathered_a_layer_at_a_time(tmp_path):
    placements, program = tmp_path / "placements.txt", tmp_path / "program.txt"
    report, _ = report_of(
        tmp_path, "--mesh.data=1", "--mesh.fsdp=8", f"--dump_shardings={placements}",
        f"--program={program}",
    )  # fmt: skip
    assert report["memory"]["parameters"] == pytest.approx(4 * report["parameters"] / 8, rel=0.01)
    line = next(x for x in placements.read_text().splitlines() if "mlp/up/kernel" in x)
    assert line == "model/layers/mlp/up/kernel 2x64x160 [-, fsdp, -] 2x8x160"
    gathers = [c for c in report["collectives"] if c["kind"] == "all-gather"]
    # The forward pass gathers each parameter once, and the backward pass may do so again. Gathering
    # the stacked layers in every iteration would send a multiple of that.
    sent = sum(c["bytes_sent"] for c in gathers)
    assert sent <= 2.1 * 4 * report["parameters"] * 7 / 8
    from genai_jax.scaling.program import executed, parse

    largest = max(
        run.instruction.bytes
        for run in executed(parse(program.read_text()), into_fusions=True)
        if run.instruction.opcode.startswith("all-gather")
    )
    assert largest <= 4 * 320 * 64  # an embedding; the stacked layers are larger


def test_two_runs_are_compared(tmp_path):
    flagfile = tmp_path / "other.flags"
    flagfile.write_text("\n".join((*TINY, "--mesh.data=1", "--mesh.tensor=4")) + "\n")
    result = check(
        "--topology=cpu:4", "--compiles=false", f"--compare={flagfile}", f"--flagfile={flagfile}"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cpu:4: 4 devices as tensor 4") == 2
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("parameters ")]
    _, first, second, ratio = line.split()
    assert first == second and ratio == "1.000"


def test_a_number_that_only_one_of_two_runs_has():
    one = {"parameters": 4, "batch_size": 2, "flops_per_step": 8, "devices": 2}
    more = {
        "memory": {"total": 2**30}, "program_flops": 1, "hbm_bytes": 1,
        "collectives": [{"kind": "all-to-all", "bytes_sent": 3}],
    }  # fmt: skip
    lines = side_by_side(one, {**one, **more, "batch_size": 4}).splitlines()
    assert lines[2].split() == ["batch_size", "2", "4", "2.000"]
    assert lines[-1].split() == ["sent", "by", "all-to-all", "-", "3"]


def test_flags_of_the_command_and_of_the_run_are_separated():
    assert _split(["--flagfile", "a b", "--topology=cpu:2"])[1] == ["--flagfile=a b"]
    request, rest = _split(["--topology=cpu:2", "--nocompiles", "--mesh.data=2"])
    assert request == CheckRequest(topology="cpu:2", compiles=False) and rest == ["--mesh.data=2"]


def test_ignored_flags_and_bad_topologies_are_refused():
    with pytest.raises(ConfigError, match="--topology needs a value: write --topology=VALUE"):
        _split(["--topology", "cpu:2"])
    with pytest.raises(ConfigError, match="--program needs the compiled step"):
        _split(["--topology=cpu:2", "--nocompiles", "--program=x.txt"])
    for text in ("cpu:0", "v5e:0x4"):
        with pytest.raises(ConfigError, match=f"{text}: sizes must be at least 1$"):
            Topology(text)
    with pytest.raises(ConfigError, match="cpu:2x4: cpu takes a single size, as cpu:8"):
        Topology("cpu:2x4")
    for text in ("h200:1x1x8", "a100_80:1x1x8", "cpu:2"):
        with pytest.raises(ConfigError, match=f"--slices=2 works for TPUs only, not for {text}"):
            Topology(text, 2)


def test_an_unknown_topology_lists_examples():
    for text in ("v9:2x2", "v5p", "v5p:", "cpu:2x", "h200"):
        with pytest.raises(ConfigError, match=r"--topology=.* is unknown; examples are v3:"):
            Topology(text)
    tpus = {"v3", "v4", "v5e", "v5p", "v6e", "7x"}
    assert set(CHIPS) == tpus | {"a100_40", "a100_80", "h100", "h200", "b200"}
    assert {text.split(":")[0] for text in EXAMPLES.split(", ")} <= {*CHIPS, "cpu"}


KINDS = {
    "v3": "TPU v3", "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite",
    "7x": "TPU7x", "a100_40": "NVIDIA A100-SXM4-40GB", "a100_80": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200",
}  # fmt: skip


def test_the_peak_of_a_chip_is_the_one_that_runs_on_it_measure_their_mfu_by():
    for name, chip in CHIPS.items():
        device = types.SimpleNamespace(device_kind=KINDS[name], platform="other")
        assert peak_of([device]).flops_per_second == pytest.approx(chip.flops, rel=1e-3), name
        # A float32 run can be no faster, and a memory is read in less than a second.
        assert chip.peak("float32") <= chip.peak("bfloat16") == chip.flops
        assert 0.004 < chip.memory / chip.hbm < 0.1 and chip.network < chip.link, name


def test_chips_and_devices_are_counted_apart():
    assert Topology("v3:4x4").num_chips == 16 and Topology("v3:4x4").num_devices == 32
    assert Topology("7x:2x2x2", 2).num_chips == 16 and Topology("7x:2x2x2", 2).num_devices == 32
    assert Topology("h100:1x2x8").num_chips == Topology("h100:1x2x8").num_devices == 16


def test_gpus_are_described_to_the_compiler():
    given = {kind: gpu_description(kind) for kind in ("a100_40", "a100_80", "h100", "h200")}
    assert len(set(given.values())) == 4
    for kind, text in given.items():
        assert text.count(f'"{KINDS[kind]}"') == 2, kind  # the device and the whole
        assert f"memory_bandwidth: {CHIPS[kind].hbm:.0f}\n" in text
        capability = int(re.search(r"cuda_compute_capability:? \{ major: (\d)", text)[1])
        assert capability == (8 if kind.startswith("a100") else 9)


def test_the_cost_of_the_whole_run_follows_from_its_steps():
    step = {"batch_size": 4, "tokens_per_step": 40, "flops_per_step": 61.5e12 * 6}
    run = whole_run(step, 3600, "bfloat16", Topology("v3:1x1"), 0.5)
    assert run["examples"] == 4 * 3600 and run["tokens"] == 40 * 3600 and run["chips"] == 1
    assert run["flops"] == 3600 * 61.5e12 * 6 and run["peak"] == 123e12
    assert run["at_peak"] == pytest.approx({"seconds": 3 * 3600, "chip_hours": 3})
    assert run["assumed"] == pytest.approx({"mfu": 0.5, "seconds": 6 * 3600, "chip_hours": 6})
    step |= {"predicted": {"step_seconds": 5.0}, "tokens_per_step": None}
    run = whole_run(step, 3600, "float32", Topology("a100_80:1x1x8"), 0.5)
    assert run["predicted"] == {"seconds": 5 * 3600, "chip_hours": 40} and "assumed" not in run
    assert run["peak"] == 156e12 and run["tokens"] is None
    on_cpu = whole_run(step, 3600, "float32", Topology("cpu:8"), 0.5)
    assert set(on_cpu) == {"steps", "examples", "tokens", "flops"}


def test_times_and_hours_have_three_digits():
    assert [time_text(s) for s in (0.12345, 119, 121, 7200, 86400 * 1.5, 86400 * 1234)] == [
        "0.123 seconds", "119 seconds", "2.02 minutes", "2 hours", "36 hours", "1,234 days",
    ]  # fmt: skip
    assert [hours_text(h) for h in (0.01234, 12.34, 123.4, 1234567)] == [
        "0.0123", "12.3", "123", "1,234,567",
    ]  # fmt: skip


@pytest.mark.parametrize("topology", ["v3:2x2", "b200:1x1x8"])
def test_without_a_compiler_the_whole_run_has_a_cost(topology, tmp_path):
    path = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "genai_jax.compile_check", f"--topology={topology}", *TINY,
        "--compiles=false", "--assumed_mfu=0.25", f"--output={path}", "--train.steps=500",
        "--mesh.data=8", "--dtype=bfloat16",
    ]  # fmt: skip
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    run = report["run"]
    assert run["steps"] == 500 and run["tokens"] == 500 * 8 * 32
    assert run["flops"] == 500 * report["flops_per_step"]
    seconds = run["flops"] / (CHIPS[topology.split(":")[0]].flops * 8)
    assert run["at_peak"]["seconds"] == pytest.approx(seconds)
    assert run["assumed"]["chip_hours"] == pytest.approx(4 * run["at_peak"]["chip_hours"])
    assert "if the MFU is 25%, which is an assumption" in done.stdout
    assert f"FLOPs: {report['convention']}" in done.stdout


def test_a_chip_without_a_description_is_refused_only_by_the_compiler():
    done = check("--topology=b200:1x1x8", *TINY)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "the compiler has no description of b200; --compiles=false" in done.stderr


def test_a_population_has_no_step_of_one_model():
    done = check("--topology=cpu:1", *TINY, "--population.size=2", "--compiles=false")
    assert done.returncode == 2 and "error: --population.size=2: only the step" in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "--topology is not set"),
        (("--topology=cpu:4", "--mesh.data=3"), "--mesh.data=3 does not fit 4 device"),
        (
            ("--topology=cpu:8", "--mesh.data=1", "--mesh.tensor=8", *TINY),
            "parameter model/layers/attention/key/kernel (2, 64, 4, 16): kv_heads of size 4 is not "
            "divisible by --mesh.tensor=8",
        ),
    ],
)
def test_mistakes_are_one_line(flags, message):
    result = check(*flags)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_a_missing_compiler_is_an_error(tmp_path):
    environment_ = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "genai_jax.compile_check", "--topology=v5e:2x2", *TINY]
    result = subprocess.run(
        command, env=environment_, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if "libtpu" not in result.stderr and result.returncode == 0:
        pytest.skip("libtpu is installed next to jax")
    assert result.returncode == 2
    assert "needs libtpu, which is not installed: run `make targets`" in result.stderr
    assert os.linesep not in result.stderr.strip()


def test_nothing_is_opened_or_needed_that_a_request_can_do_without():
    result = check("--topology=v5p:2x2x2", "--slices=2", "--nocompiles", *TINY, "--mesh.fsdp=8",
                   "--data.batch_size=16")  # fmt: skip
    assert result.returncode == 0 and "16 devices as data 2 x fsdp 8" in result.stdout, (
        result.stderr
    )
    result = check("--topology=cpu:1", "--mesh.tensor=3", "--data.dataset=text:/no/such", *TINY)
    assert result.returncode == 2 and "does not fit 1 device" in result.stderr
