"""A population's members are the runs that they would be alone."""

import json

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from genai_jax import evaluate, sample, train
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.training.population import Population
from genai_jax.training.sharding import MESH_AXES
from tests.commands import TINY, run
from tests.tasks.runs import resumed, run_to

GAN = (
    "--task=gan", "--generator.channels=4", "--generator.latent_dim=6", "--critic.channels=4",
    "--data.batch_size=8", "--gan.r1=1", "--gan.r1_every=2", "--eval.batches=0",
    "--optimizer.warmup_steps=0",
)  # fmt: skip
RBM = ("--task=rbm", "--rbm.num_hidden=8", "--rbm.chains=8", "--data.batch_size=8",
       "--eval.batches=0")  # fmt: skip
TOLERANCE = 1e-5  # relative: a matmul of all members sums in another order than one member's


@pytest.fixture
def text(text_folder):
    return (*TINY, f"--data.dataset=text:{text_folder}", "--checkpoint.every=2", "--seed=5")


def assert_member(rows: list[dict], member: int, alone: list[dict]):
    """What the population logged of a member is what its own run logged."""
    for row, own in zip(rows, alone, strict=True):
        assert row["step"] == own["step"]
        for name, value in own.items():
            if name.startswith("train/"):
                np.testing.assert_allclose(row[f"{name}/{member}"], value, TOLERANCE, 1e-6)


def test_members_with_seeds_equal_their_own_runs(text, tmp_path, capsys):
    """Parameters, dropout and data order of a member are its seed's; so are samples and scores."""
    flags = (*text, "--transformer.dropout=0.1")
    rows = run_to(tmp_path / "all", 4, *flags, "--population.size=3")
    assert rows[-1]["train/loss"] == pytest.approx(
        np.mean([rows[-1][f"train/loss/{k}"] for k in range(3)])
    )
    alone = run_to(tmp_path / "7", 4, *flags, "--seed=7")
    assert_member(rows, 2, alone)
    capsys.readouterr()
    results = []
    for folder, *which in (("all", "--member=2"), ("7",)):
        workdir = f"--workdir={tmp_path / folder}"
        assert evaluate.main([workdir, *which]) == 0
        results.append(json.loads(capsys.readouterr().out)["loss"])
        assert sample.main([workdir, "--temperature=0", "--max_tokens=12", *which]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == pytest.approx(results[2], rel=TOLERANCE) and results[1] == results[3]
    with pytest.raises(ConfigError, match="--member=3 is not one of 0 to 2"):
        evaluate.main([f"--workdir={tmp_path / 'all'}", "--member=3"])


def test_members_with_learning_rates_equal_their_own_runs_and_resume(text, tmp_path, capsys):
    """One that diverges is named and left out, and the others go on."""
    rates = ("--population.size=3", "--population.learning_rates=1e-2,1e30,3e-3")
    population = (*text, *rates, "--checkpoint.every=2")
    rows = run_to(tmp_path / "all", 4, *population)
    assert capsys.readouterr().err.count("member 1 has diverged") == 1
    assert "train/loss/1" not in rows[-1] and np.isfinite(rows[-1]["train/loss"])
    alone = run_to(tmp_path / "one", 4, *text, "--optimizer.learning_rate=3e-3")
    assert_member(rows, 2, alone)
    assert resumed(tmp_path / "all", 2, tmp_path / "on", 4, *population) == rows


@pytest.mark.parametrize(
    "flags", [GAN, pytest.param(RBM, marks=pytest.mark.smoke)], ids=["gan", "rbm"]
)
def test_phases_and_mutables_have_members_as_well(flags, tmp_path):
    rows = run_to(tmp_path / "all", 3, *flags, "--population.size=2")
    assert_member(rows, 1, run_to(tmp_path / "1", 3, *flags, "--seed=1"))


def test_members_are_split_over_devices(text, tmp_path, capsys):
    flags = (
        *text, "--population.size=4", "--train.steps=3", "--train.log_every=1", "--eval.batches=1",
    )  # fmt: skip
    run("train", *flags, f"--workdir={tmp_path / '4'}", devices=4)
    assert train.main([*flags, f"--workdir={tmp_path / '1'}"]) == 0
    four, one = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("4", "1")
    )
    for row, own in zip(four, one, strict=True):
        for name, value in own.items():
            if name.startswith(("train/", "eval/")):
                np.testing.assert_allclose(row[name], value, TOLERANCE, 1e-6)
    capsys.readouterr()
    assert evaluate.main([f"--workdir={tmp_path / '4'}", "--member=3", "--batches=1"]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert loss == pytest.approx(four[-1]["eval/loss/3"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--population.size=0"], "population.size"),
        (["--population.learning_rates=1e-3,1e-2"], "has 2 rate.s. for --population.size=1"),
        (["--population.size=2", "--population.learning_rates=1,x"], "is not a list of numbers"),
        (["--population.size=2", "--population.learning_rates=1,-1"], "finite and at least 0"),
    ],
)
def test_a_population_that_contradicts_itself_is_refused(flags, said, text, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train.main([*text, *flags, f"--workdir={tmp_path}"])


def test_a_mesh_that_splits_a_member_is_refused(text):
    config = parse_run([*text, "--population.size=3"])
    sizes = dict.fromkeys(MESH_AXES, 1)

    def population(**split):
        mesh = AbstractMesh(tuple((sizes | split).values()), MESH_AXES)
        return Population(make_task(config), config, mesh)

    with pytest.raises(ConfigError, match=r"--population.size=3 is not divisible by --mesh.data=2"):
        population(data=2)
    with pytest.raises(ConfigError, match=r"--mesh.fsdp=2: a member of a population is whole"):
        population(fsdp=2)
