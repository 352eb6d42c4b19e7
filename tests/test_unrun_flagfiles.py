"""Flagfiles that nobody could run here say so, with what they aim for and what they cost."""

import json
import re

import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.data.images import sources as images
from genai_jax.data.shapes_only import shapes_only
from genai_jax.data.text import sources as text
from genai_jax.scaling.chips import Topology
from genai_jax.scaling.whole_run import hours_text, whole_run
from genai_jax.tasks.protocol import batch_rows, step_spec
from genai_jax.training.flops import flops_of
from tests.conftest import ROOT

EXPERIMENTS = ROOT / "experiments"
PODS = EXPERIMENTS / "pods"
# Only included by others.
PARTS = {PODS / "base.flags", *(PODS / "shapes").glob("*.flags")}
SCRIPT = "therapist"  # of the responder
EMBEDDED = {*text.EMBEDDED, *text.VALUES, *text.SYNTHETIC, *text.PAIRED, *images.BUILT_IN, SCRIPT}
# Networks that are quick to count.
COUNTED = ("gan/celeba64", "normalizing_flow/cifar10")


def unrun():
    """The flagfiles of runs whose data set is not embedded, and those for pods."""
    found = []
    for path in sorted(EXPERIMENTS.rglob("*.flags")):
        if path.name == "study.flags" or path in PARTS:
            continue
        config = parse_run([f"--flagfile={path}"])
        dataset = getattr(config.components.get("data"), "dataset", "digits")
        if dataset.partition(":")[0] not in EMBEDDED or path.parent == PODS:
            found.append(path)
    return found


def header(path) -> dict[str, str]:
    """The paragraphs of the comment at the top: first words -> the rest, in one line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    comment = " ".join(lines)
    parts = re.split(r"(Not run|Aims for|Differs|Cost): ", comment)
    return dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))


def hours(cost: str) -> str:
    return re.match(r"([\d,.]+) chip-hours", cost)[1]


def test_each_says_that_it_has_not_been_run_and_what_for(monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = unrun()
    assert len(paths) > 25 and {p.parent.name for p in paths} == {
        "gan", "image_diffusion", "normalizing_flow", "pods", "vae",
    }  # fmt: skip
    for path in paths:
        said = header(path)
        assert list(said) == ["Not run", "Aims for", "Differs", "Cost"], path
        assert all(len(part) > 20 for part in said.values()), path
        if path.parent == PODS:
            report = json.loads(path.with_suffix(".json").read_text())
            assert hours(said["Cost"]) == hours_text(report["run"]["predicted"]["chip_hours"])
            assert f"({path.stem}.txt)" in said["Cost"]
        else:
            assert "if the MFU is 40%, an assumption" in said["Cost"]
            assert f"--flagfile={path.relative_to(ROOT)}" in said["Cost"]


@pytest.mark.parametrize("name", COUNTED)
def test_the_cost_is_the_one_that_its_command_gives(name, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.chdir(ROOT)
    cost = header(EXPERIMENTS / f"{name}.flags")["Cost"]
    topology = Topology(re.search(r"--topology=(\S+)", cost)[1])
    flags = re.findall(r"--[\w.]+=\S*", cost.split("--topology", 1)[1])
    config = parse_run([*flags, "--attention=auto"])
    with shapes_only():
        task = make_task(config)
        report = {"batch_size": batch_rows(step_spec(task)), "tokens_per_step": None}
        report |= flops_of(task, config)
    run = whole_run(report, config.train.steps, config.run.dtype, topology, 0.4)
    assert hours(cost) == hours_text(run["assumed"]["chip_hours"])
