"""--train.wandb: what is sent to Weights & Biases, here to a module that stands for its package."""

import pathlib
import signal
import sys
import types

import pytest

from genai_jax import train
from genai_jax.config import ConfigError
from genai_jax.training.metrics_log import MetricsLog
from tests.tasks.runs import copy_until
from tests.test_train import rows
from tests.toy_tasks import Points
from tests.training.test_samples import EVERY, files

KEY = "0123456789abcdef0123456789abcdef01234567"
FLAGS = (*EVERY, "--train.wandb=us/toys")


class Settings:
    model_fields = ("console", "quiet")

    def __init__(self, **settings):
        assert set(settings) == set(self.model_fields)


class FakeRun:
    """Refuses a step that is over, as W&B does."""

    def __init__(self, step: int):
        self.step, self.sent, self.ended, self.axes = step, [], None, {}

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False):
        self.axes[name] = step_metric

    def log(self, values: dict, step: int):
        assert step >= self.step
        self.step = step
        self.sent.append((step, values))

    def finish(self, exit_code: int):
        self.ended = exit_code


class FakeWandb(types.ModuleType):
    """The parts of the package in use; `runs` are those begun, with their arguments."""

    def __init__(self):
        super().__init__("wandb")
        self.Settings, self.runs, self.broken, self.step = Settings, [], False, 0
        self.Image = lambda path: ("image", pathlib.Path(path).read_bytes())
        self.Html = lambda text, inject: ("html", text)

    def init(self, **arguments):
        if self.broken:
            raise RuntimeError("not\nlogged in")
        self.runs.append((arguments, FakeRun(self.step)))
        return self.runs[-1][1]


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return fake


def numbers(sent: list) -> dict[int, dict]:
    """Step -> its row, without timings, as the metrics file has it."""
    found: dict[int, dict] = {}
    for step, values in sent:
        kept = {n: x for n, x in values.items() if not n.startswith(("perf/", "sample"))}
        found[step] = found.get(step, {"step": step}) | kept
    return found


def test_every_row_and_the_samples_are_sent_and_no_key_is_kept(wandb, tmp_path):
    assert train.main([*FLAGS, f"--workdir={tmp_path}"]) == 0
    ((arguments, sent),) = wandb.runs
    assert (arguments["entity"], arguments["project"]) == ("us", "toys")
    assert arguments["config"]["train.steps"] == 8 and arguments["dir"] == str(tmp_path)
    assert list(numbers(sent.sent).values()) == rows(tmp_path) and sent.ended == 0
    pictures = {step: x["samples"][1] for step, x in sent.sent if "samples" in x}
    assert all(x["sample_step"] == step for step, x in sent.sent if "samples" in x)
    assert sent.axes == {"sample_step": None, "samples*": "sample_step"}
    assert {f"step_{step:08}.png": x for step, x in pictures.items()} == files(tmp_path)
    for path in filter(pathlib.Path.is_file, tmp_path.rglob("*")):
        assert KEY.encode() not in path.read_bytes()


def test_a_resumed_run_continues_the_same_one_and_repeats_nothing(wandb, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "on"
    assert train.main([*FLAGS, f"--workdir={whole}"]) == 0
    copy_until(whole, 4, workdir)
    wandb.step = 7  # what was sent before the run was killed: more than is saved
    assert train.main([*FLAGS, f"--workdir={workdir}"]) == 0
    (first, before), (second, after) = wandb.runs
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert sorted(numbers(after.sent)) == [7, 8]
    assert numbers(after.sent).items() <= numbers(before.sent).items()


def test_what_has_changed_is_said_to_be_missing_from_steps_that_are_there(wandb, tmp_path, capsys):
    whole, workdir = tmp_path / "whole", tmp_path / "on"
    assert train.main([*FLAGS, f"--workdir={whole}"]) == 0
    copy_until(whole, 4, workdir)
    wandb.step, changed = 7, ("--optimizer.learning_rate=0.2", "--resume_with_changes")
    capsys.readouterr()
    assert train.main([*FLAGS, *changed, f"--workdir={workdir}"]) == 0
    said = "warning: W&B keeps the rows of steps 5 to 6 as they were before the changes\n"
    assert capsys.readouterr().err.count(said) == 1
    assert sorted(numbers(wandb.runs[1][1].sent)) == [7, 8]


def test_samples_left_to_a_resumed_run_are_sent_with_their_step(wandb, tmp_path, monkeypatch):
    """W&B has the row of step 4 already, and takes nothing for that step again."""

    def stops(self, max_batches, rows=None):
        if asked:  # the first evaluation; a run looks for held-out data before
            signal.raise_signal(signal.SIGTERM)
        asked.append(max_batches)
        yield self.batch(10_000, rows)

    asked: list[int] = []
    flags = (*FLAGS, "--sample.every=4", f"--workdir={tmp_path}")
    with monkeypatch.context() as patched:
        patched.setattr(Points, "held_out", stops)
        assert train.main(flags) == 128 + signal.SIGTERM
    wandb.step = 5
    assert train.main(flags) == 0
    sent = wandb.runs[1][1].sent
    pictures = [(step, x["sample_step"], x["samples"][1]) for step, x in sent if "samples" in x]
    expected = files(tmp_path)
    assert pictures == [
        (5, 4, expected["step_00000004.png"]),
        (8, 8, expected["step_00000008.png"]),
    ]


@pytest.mark.parametrize("folder", [True, False])
def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch, tmp_path, folder):
    """A folder ./wandb, which W&B itself leaves behind, can be imported and is not the package."""
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb") if folder else None)
    with pytest.raises(ConfigError) as error:
        train.main([*FLAGS, f"--workdir={tmp_path / 'run'}"])
    install = 'pip install -e ".[wandb]"'
    assert str(error.value) == f"--train.wandb=us/toys needs a package: {install}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("project", ["", "us/", "/toys", "a/b/c", "my toys"])
def test_a_project_has_a_name(wandb, tmp_path, project):
    with pytest.raises(ConfigError, match="is neither PROJECT nor ENTITY/PROJECT"):
        train.main([*EVERY, f"--train.wandb={project}", f"--workdir={tmp_path}"])


def test_a_failure_in_the_middle_only_warns(wandb, tmp_path, monkeypatch, capsys):
    def log(self, values, step):
        raise BrokenPipeError("the service\nis gone")

    monkeypatch.setattr(FakeRun, "log", log)
    assert train.main([*FLAGS, f"--workdir={tmp_path}"]) == 0
    said = "warning: nothing more is sent to W&B: the service is gone\n"
    assert capsys.readouterr().err == said and len(rows(tmp_path)) == 8


def test_a_failure_at_the_start_ends_only_a_run_that_has_not_begun(wandb, tmp_path, capsys):
    wandb.broken = True
    with pytest.raises(ConfigError, match="W&B cannot begin: not logged in; log in with `wandb"):
        train.main([*FLAGS, f"--workdir={tmp_path}"])
    wandb.broken = False
    assert train.main([*FLAGS, f"--workdir={tmp_path}"]) == 0
    wandb.broken = True
    capsys.readouterr()
    assert train.main([*FLAGS, "--train.steps=9", f"--workdir={tmp_path}"]) == 0
    assert "warning: W&B cannot begin: not logged in; the run goes" in capsys.readouterr().err
    assert len(rows(tmp_path)) == 9


@pytest.mark.parametrize("content", ["[]", '{"id": "../x"}', '{"id": 3}', "{"])
def test_a_damaged_name_of_the_run_is_one_line(wandb, tmp_path, content):
    (tmp_path / "wandb.json").write_text(content)
    with pytest.raises(ConfigError, match=r"wandb\.json") as error:
        train.main([*FLAGS, f"--workdir={tmp_path}"])
    assert "\n" not in str(error.value) and not wandb.runs


def test_a_damaged_name_does_not_stop_a_run_that_goes_on(wandb, tmp_path, capsys):
    assert train.main([*FLAGS, f"--workdir={tmp_path}"]) == 0
    (tmp_path / "wandb.json").write_text("{")
    capsys.readouterr()
    assert train.main([*FLAGS, "--train.steps=9", f"--workdir={tmp_path}"]) == 0
    err = capsys.readouterr().err
    assert "warning: W&B cannot begin: " in err and "wandb.json" in err
    assert len(rows(tmp_path)) == 9 and len(wandb.runs) == 1


@pytest.mark.parametrize("task", ["Drawing", "Averages"])
def test_a_run_that_fails_is_shown_as_failed_and_no_other(wandb, tmp_path, monkeypatch, task):
    flags = FLAGS
    if task == "Averages":  # a fitted one
        flags = ("--task=tests.toy_tasks:Averages", "--train.steps=2", "--train.wandb=us/toys")
    try:
        raise ValueError("of the code that calls")
    except ValueError:
        assert train.main([*flags, f"--workdir={tmp_path / 'good'}"]) == 0

    def fails(self, *rows):
        if rows:
            raise ValueError("of the run")
        return True

    monkeypatch.setattr(MetricsLog, "write", fails)
    with pytest.raises(ValueError, match="of the run"):
        train.main([*flags, f"--workdir={tmp_path / 'bad'}"])
    assert [run.ended for _, run in wandb.runs] == [0, 1]


def test_a_fitted_task_sends_its_row(wandb, tmp_path):
    flags = ("--task=tests.toy_tasks:Averages", "--train.steps=2", "--train.wandb=toys")
    assert train.main([*flags, f"--workdir={tmp_path}"]) == 0
    ((arguments, run),) = wandb.runs
    assert arguments["entity"] is None and list(numbers(run.sent).values()) == rows(tmp_path)
