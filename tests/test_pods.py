"""The flagfiles of experiments/pods: they parse, and are what their comments say."""

import importlib.util
import json
import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh

from genai_jax.components import make_task, parse_run
from genai_jax.scaling.chips import Topology
from genai_jax.scaling.compile_text import as_text
from genai_jax.scaling.whole_run import hours_text, whole_run
from genai_jax.training.sharding import MESH_AXES, batch_shards, logical_axes, path_name, spec_of
from tests.conftest import ROOT

PODS = ROOT / "experiments" / "pods"
FLAGFILES = {p.stem: p for p in sorted(PODS.glob("*.flags")) if p.stem != "base"}
# Parameters as published: config.json and weights of each, or the papers that the shapes name.
PUBLISHED = {
    "llama3_1b": 1.236e9,
    "llama3_8b": 8.03e9,
    "llama3_70b": 70.55e9,
    "llama3_405b": 405.9e9,
    "llama2_70b": 68.98e9,
    "mixtral_8x7b": 46.7e9,
    "minimax_m2": 228.7e9,
    "latent_dit_xl2": 675e6,
}


@pytest.fixture(scope="module", autouse=True)
def at_the_root():
    """Paths in flagfiles are relative to the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def runs(at_the_root):
    """{name: (config, task, shapes of the parameters)}; a network is traced once."""
    found, traced = {}, {}
    for name, path in FLAGFILES.items():
        config = parse_run([f"--flagfile={path}"])
        task = make_task(config)
        networks = ("transformer", "moe", "dit", "language_model")
        key = str([config.components.get(name) for name in networks])
        if key not in traced:
            traced[key], _ = jax.eval_shape(task.init, jax.random.key(0))
        found[name] = config, task, traced[key]
    return found


def comment(name: str, pattern: str) -> re.Match:
    """The one place of a flagfile that matches."""
    (found,) = re.finditer(pattern, FLAGFILES[name].read_text(), re.MULTILINE)
    return found


def mesh_of(config, chips: int) -> AbstractMesh:
    sizes = config.mesh.sizes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: chips // fixed if size == -1 else size for axis, size in sizes.items()}
    assert math.prod(sizes.values()) == chips
    return AbstractMesh(tuple(sizes.values()), MESH_AXES)


def size_of(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.smoke
@pytest.mark.parametrize("name", FLAGFILES)
def test_mesh_and_batch_fit_the_topology(name, runs):
    config, task, params = runs[name]
    topology, sizes = comment(name, r"^# topology: (\w+:([\dx]+))$").groups()
    chips = math.prod(int(size) for size in sizes.split("x"))
    mesh = mesh_of(config, chips)
    jax.tree_util.tree_map_with_path(
        lambda path, x, axes: spec_of(path_name(path), x.shape, axes, mesh),
        params,
        logical_axes(params, task.partition_rules),
    )
    for entry, x in task.data.batch_spec.items():
        spec_of(entry, x.shape, x.axes, mesh)
    rows = config.data.batch_size
    assert rows % (batch_shards(mesh) * config.train.accumulate) == 0

    said = comment(name, r"^# ([\d,]+) chips, ([\d,]+) (tokens|images) a step")
    step = rows if said[3] == "images" else rows * config.data.sequence_length
    assert [int(number.replace(",", "")) for number in said.groups()[:2]] == [chips, step]
    path = FLAGFILES[name].relative_to(ROOT)
    comment(name, rf"compile_check --topology={topology} ")
    assert len(re.findall(f"--flagfile={path}", FLAGFILES[name].read_text())) == 2


@pytest.mark.parametrize("name", [n for n in FLAGFILES if not n.startswith("ladder")])
def test_parameters_are_as_many_as_published(name, runs):
    _, _, params = runs[name]
    model = next(model for model in PUBLISHED if name.startswith(model))
    assert size_of(params["model"]) == pytest.approx(PUBLISHED[model], rel=0.01)


@pytest.mark.parametrize(
    ("name", "matmul_parameters", "layers", "width", "expected"),
    [
        ("llama3_8b_v6e_256", 8.03e9 - 128_256 * 4096, 32, 4096, 0.404),
        ("llama3_70b_v6e_256", 70.55e9 - 128_256 * 8192, 80, 8192, 0.470),
    ],
)
def test_published_figures_are_in_our_convention(name, matmul_parameters, layers, width, expected):
    spec = importlib.util.spec_from_file_location("check", PODS / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    full = 12 * layers * width * 8192  # a token: pairs of queries and keys, forward and backward
    dense = 6 * matmul_parameters
    by_hand = check.PUBLISHED[name].mfu * (dense + full / 2) / (dense + full)
    assert check.in_our_convention(name) == pytest.approx(by_hand, rel=1e-3)
    assert by_hand == pytest.approx(expected, abs=5e-4)
    assert f"| {expected:.1%} ({check.PUBLISHED[name].mfu:.1%} reported) |" in (
        PODS / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FLAGFILES)
def test_the_stored_cost_of_the_whole_run_is_that_of_its_steps(name, runs):
    config, _, _ = runs[name]
    report = json.loads((PODS / f"{name}.json").read_text())
    topology = Topology(report["topology"], report["slices"])
    run = whole_run(report, config.train.steps, config.run.dtype, topology, 0.4)
    assert report["run"] == run
    flagfile = FLAGFILES[name].relative_to(ROOT)
    assert (PODS / f"{name}.txt").read_text() == as_text(str(flagfile), report) + "\n"
    (row,) = [x for x in (PODS / "README.md").read_text().splitlines() if f"[{name}]" in x]
    hours = run["predicted"]["chip_hours"]
    assert hours_text(hours) == row.split(" | ")[-1].removesuffix(" |")
    assert hours == pytest.approx(
        report["predicted"]["step_seconds"] * config.train.steps * run["chips"] / 3600
    )


def test_every_published_shape_has_a_run():
    assert all(any(name.startswith(model) for name in FLAGFILES) for model in PUBLISHED)


def test_the_ladder_is_as_its_comments_say(runs):
    rungs = [name for name in FLAGFILES if name.startswith("ladder")]
    widths = {runs[name][0].transformer.embed_dim for name in rungs}
    assert len(widths) == len(rungs) >= 5
    for name in rungs:
        config, task, params = runs[name]
        n = size_of(params) - size_of(params["model"]["embed"])
        d = task.tokens_per_step() * config.train.steps
        c = task.flops_per_step()["flops_per_step"] * config.train.steps
        number = r"([\d.e+]+)"
        said = comment(name, f"^# N = {number}, D = {number}, C = {number}, D / N = {number}$")
        assert [float(x) for x in said.groups()] == pytest.approx([n, d, c, d / n], rel=5e-3)
        assert config.optimizer.learning_rate == pytest.approx(0.3118 * c**-0.125, rel=0.05)
