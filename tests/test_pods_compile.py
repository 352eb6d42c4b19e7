"""Experiments of experiments/pods compile for the TPU slices that they are for."""

import json
import os
import subprocess
import sys

import pytest

from genai_jax.scaling.chips import CHIPS
from genai_jax.scaling.program import executed, parse
from tests.conftest import ROOT
from tests.kernels_pallas.target_process import COMPILERS, need

pytestmark = pytest.mark.depends_on("pods")
SMALL = (
    "--transformer.num_layers=2", "--transformer.embed_dim=256", "--transformer.num_heads=2",
    "--data.batch_size=16", "--data.sequence_length=256",
)  # fmt: skip
NAMES = ("ladder_512_v5e_16", "ladder_768_v5e_16", "ladder_1024_v5e_16")


def check(*flags: str, compiler: str = "libtpu") -> subprocess.CompletedProcess:
    """Runs the command where it finds the compilers."""
    need(compiler)
    # The compiler takes a third of its time when it is asked for little effort.
    more = {"PYTHONPATH": str(COMPILERS), "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}
    command = [sys.executable, "-m", "genai_jax.compile_check", *flags]
    return subprocess.run(
        command, env=os.environ | more, cwd=ROOT, capture_output=True, text=True, timeout=900
    )


def test_what_does_not_fit_names_the_largest_buffers():
    done = check(
        "--topology=v5e:2x2", "--dtype=bfloat16", "--mesh.data=4", "--transformer.num_layers=2",
        "--transformer.embed_dim=8192", "--transformer.num_heads=64", "--data.batch_size=4",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    *_, verdict, first, _, _, _, _ = done.stdout.splitlines()
    assert verdict.startswith("does not fit: memory required")
    assert "available HBM (15.75G)" in verdict
    assert first == "  1.33 GiB params/model/layers/mlp/down/kernel (2, 21856, 8192)"


def test_a_slice_that_the_compiler_does_not_know():
    done = check("--topology=v5e:3x5")
    assert done.returncode == 2
    message = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "--topology=v5e:3x5" in message[0] and "examples are" in message[0]


def test_an_axis_spans_the_slices():
    shared = ("--topology=v5p:2x2x2", "--slices=2", "--nocompiles", "--data.batch_size=16")
    done = check(*shared, "--mesh.data=2", "--mesh.fsdp=8")
    assert done.returncode == 0, done.stderr
    assert "v5p:2x2x2, 2 slices: 16 devices as data 2 x fsdp 8" in done.stdout
    done = check(*shared, "--mesh.data=1", "--mesh.fsdp=16")
    assert done.returncode == 2 and "--mesh.data=1 is not divisible by the 2 slices" in done.stderr


@pytest.mark.parametrize("gpu", ["a100_40", "h100"])
def test_gpus_that_are_described_by_how_they_differ(gpu, tmp_path):
    output = tmp_path / "report.json"
    done = check(
        f"--topology={gpu}:1x1x8", "--mesh.fsdp=8", "--mesh.data=1", *SMALL, f"--output={output}",
        compiler="jax_cuda13_plugin",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(output.read_text())
    seconds = report["predicted"]["step_seconds"] * report["run"]["steps"]
    assert report["run"]["predicted"] == pytest.approx(
        {"seconds": seconds, "chip_hours": seconds * 8 / 3600}
    )
    # In float32 the matrix units are half as fast.
    assert f"peak {CHIPS[gpu].flops / 2e12:.0f} TFLOP/s in float32" in done.stdout


def test_a_chip_that_cannot_run_our_kernels():
    done = check("--topology=v3:2x2", "--mesh.data=8", "--dtype=bfloat16", *SMALL)
    assert done.returncode == 2
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--topology=v3:2x2: the compiler cannot build a kernel of this run for v3" in message


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_and_fits(name, tmp_path):
    output, text = tmp_path / "report.json", tmp_path / "program.txt"
    done = check(
        "--topology=v5e:4x4", f"--flagfile=experiments/pods/{name}.flags", f"--output={output}",
        f"--program={text}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(output.read_text())
    assert report["fits"] and report["devices"] == 16
    # The program computes what the model's count says, and what it rematerializes.
    work = report["program_flops"] * 16 / report["flops_per_step"]
    assert 0.9 < work < 1.5
    assert {c["axes"] for c in report["collectives"]} == {"fsdp"}
    program = parse(text.read_text())
    runs = list(executed(program, into_fusions=True))
    assert any(r.instruction.name.startswith("flash_attention_forward") for r in runs)
    # Each pass gathers a parameter once, the backward pass again; never all layers in each of them.
    sent = sum(c["bytes_sent"] for c in report["collectives"] if c["kind"] == "all-gather")
    assert 0 < sent < 2.1 * 4 * report["parameters"]
