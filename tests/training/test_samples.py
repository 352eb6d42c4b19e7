"""--sample.every: what a run shows of its model, which changes nothing else about the run."""

import errno
import io
import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from genai_jax import sample, train
from genai_jax.config import ConfigError
from genai_jax.sampled import Arrays, Files
from tests.commands import TINY, run
from tests.tasks.runs import copy_until, steps_in
from tests.test_train import rows
from tests.toy_tasks import Drawing, Points
from tests.training.test_metrics_log import events

FLAGS = (
    "--task=tests.toy_tasks:Drawing", "--train.steps=8", "--train.log_every=1",
    "--train.progress=false", "--checkpoint.every=4", "--eval.every=4", "--ema.decay=0.5",
    "--ema.use=0.5", "--optimizer.warmup_steps=0", "--optimizer.learning_rate=0.1",
    "--optimizer.schedule=constant",
)  # fmt: skip
EVERY = (*FLAGS, "--sample.every=3")
SMALL = (
    "--unet.channel_multipliers=1", "--unet.blocks_per_level=1", "--unet.attention_resolutions=",
    "--eval.batches=0", "--data.batch_size=4",
)  # fmt: skip
TASK = "--task=tests.toy_tasks:Drawing"


def trained(workdir: pathlib.Path, *flags: str) -> pathlib.Path:
    assert train.main([*flags, f"--workdir={workdir}"]) == 0
    return workdir


def files(workdir: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((workdir / "samples").iterdir())}


def shown(workdir: pathlib.Path, kind: str) -> dict[int, object]:
    """Step -> what TensorBoard shows of the samples, as it reads the events."""
    found: dict[int, object] = {}
    for event in events(workdir / "tensorboard"):
        if event.HasField("session_log"):  # what came after this step is forgotten
            found = {step: value for step, value in found.items() if step < event.step}
        for value in event.summary.value:
            if value.tag.startswith("samples"):
                assert event.step not in found
                found[event.step] = getattr(value, kind)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """An uninterrupted run."""
    Drawing.compiled = 0
    return trained(tmp_path_factory.mktemp("whole"), *EVERY)


def test_a_run_is_the_same_with_samples_and_without(whole, tmp_path):
    assert rows(trained(tmp_path, *FLAGS)) == rows(whole)
    assert not (tmp_path / "samples").exists()
    names = [f"step_{step:08}.png" for step in (3, 6, 8)]
    assert list(files(whole)) == names and len(set(files(whole).values())) == 3
    ours, theirs = (
        json.loads((folder / "checkpoints" / "8" / "checksums" / "metadata").read_text())
        for folder in (whole, tmp_path)
    )
    assert {name for name in ours if ours[name] != theirs[name]} <= {"clock"}


def test_it_compiles_once_and_shows_what_the_sample_command_shows(whole, tmp_path, capsys):
    assert Drawing.compiled == 1
    for ema, same in (("0.5", True), ("none", False)):  # --ema.use names the average
        output = tmp_path / f"{ema}.png"
        flags = (f"--workdir={whole}", TASK, f"--ema={ema}", "--num_samples=16")
        assert sample.main([*flags, f"--output={output}"]) == 0
        assert (output.read_bytes() == files(whole)["step_00000008.png"]) == same


def test_tensorboard_shows_the_same_pictures(whole):
    images = shown(whole, "image")
    assert {f"step_{n:08}.png": x.encoded_image_string for n, x in images.items()} == files(whole)
    picture = Image.open(io.BytesIO(images[3].encoded_image_string))
    assert picture.size == (images[3].width, images[3].height)


@pytest.mark.parametrize("left", [True, False])
def test_a_run_that_was_killed_has_every_sample_once(whole, tmp_path, left):
    copy_until(whole, 4, tmp_path)
    if not left:
        shutil.rmtree(tmp_path / "samples")
    trained(tmp_path, *EVERY)
    expected = files(whole)
    if not left:
        del expected["step_00000003.png"]
    assert files(tmp_path) == expected and rows(tmp_path) == rows(whole)
    assert set(shown(tmp_path, "image")) == {3, 6, 8}


def test_a_signal_at_a_step_with_samples_leaves_them_to_the_run_that_goes_on(
    whole, tmp_path, monkeypatch
):
    def stops(self, max_batches, rows=None):
        if len(asked) == 1:  # the first evaluation; a run looks for held-out data before
            signal.raise_signal(signal.SIGTERM)
        asked.append(max_batches)
        yield self.batch(10_000, rows)
        yield self.batch(10_001, rows)

    asked = []
    flags = (*FLAGS, "--sample.every=4", f"--workdir={tmp_path}")
    with monkeypatch.context() as patched:
        patched.setattr(Points, "held_out", stops)
        assert train.main(flags) == 128 + signal.SIGTERM
    assert steps_in(tmp_path) == [4] and not (tmp_path / "samples").exists()
    trained(tmp_path, *flags)
    assert set(files(tmp_path)) == {"step_00000004.png", "step_00000008.png"}
    assert files(tmp_path)["step_00000008.png"] == files(whole)["step_00000008.png"]
    assert set(shown(tmp_path, "image")) == {4, 8} and rows(tmp_path) == rows(whole)


def test_what_cannot_be_sampled_is_refused_before_training(tmp_path):
    workdir = tmp_path / "run"
    for flags, message in (
        (("--task=image_classifier", "--sample.every=2"), "image_classifier cannot be sampled"),
        ((*FLAGS, "--sample.count=2"), "--sample.count=2 needs --sample.every"),
        (
            ("--task=few_step", "--sample.every=2", "--unet.channels=4", *SMALL),
            "this model was trained for --solver=consistency",
        ),
        (("--task=tests.toy_tasks:Averages", "--sample.every=2"), "is not a flag of"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            train.main([*flags, f"--workdir={workdir}", "--train.progress=false"])
        assert "\n" not in str(error.value)
        assert not (workdir / "metrics.jsonl").exists() or not rows(workdir)


@pytest.mark.parametrize("how", ["full", "a file is in the way", "not finite"])
def test_a_run_does_not_need_its_samples(whole, tmp_path, capsys, monkeypatch, how):
    if how == "full":
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / "step_00000003.png").symlink_to("/dev/full")
    elif how == "a file is in the way":
        (tmp_path / "samples").touch()
    else:
        broken = lambda self, params, mutables, request: _arrays(np.full((3, 1, 4, 1), -1))
        monkeypatch.setattr(Drawing, "sample", broken)
    trained(tmp_path, *EVERY)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: no samples ") and "step 3" in err
    assert rows(tmp_path) == rows(whole)
    if how == "full":
        assert list(files(tmp_path)) == ["step_00000006.png", "step_00000008.png"]


class Broken(BaseException):
    """Ends a process as a kill would, without a word."""


def breaks(monkeypatch, error: BaseException, where: str, after: int):
    """From the call after so many, what draws samples or writes them raises an error."""

    def draw(self, params, mutables, request):
        calls.append("draw")
        if where == "draw" and len(calls) > after:
            raise error
        return Files("broken", {".png": write})

    def write(path: pathlib.Path):
        path.write_bytes(b"a part")
        if where == "write" and len(calls) > after:
            raise error
        Image.new("L", (2, 2)).save(path)

    calls: list[str] = []
    monkeypatch.setattr(Drawing, "sample", draw)


@pytest.mark.parametrize("where", ["draw", "write"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("could not broadcast\n(8,8,5)"), "ValueError: could not broadcast"),
        (MemoryError(), "MemoryError"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes.\nmore"),
            "JaxRuntimeError: RESOURCE_EXHAUSTED: 9 bytes.",
        ),
    ],
)
def test_any_error_of_samples_is_one_warning(
    whole, tmp_path, capsys, monkeypatch, where, error, said
):
    breaks(monkeypatch, error, where, after=1)
    trained(tmp_path, *EVERY)
    folder = tmp_path / "samples"
    assert capsys.readouterr().err == f"warning: no samples in {folder} at step 3: {said}\n"
    assert rows(tmp_path) == rows(whole) and not list(tmp_path.glob("samples/*"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such\nmode"), "ValueError: no such; leave"),
        (OSError("cannot write mode LA as JPEG"), "cannot write mode LA as JPEG; leave"),
        (ConfigError("not a picture"), "training: not a picture; leave"),
        (OSError(errno.ENOSPC, "no space"), ""),  # a run does not need the temporary folder
    ],
)
def test_what_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch, error, said):
    breaks(monkeypatch, error, "write", after=0)
    if not said:
        trained(tmp_path, *EVERY)
        return
    with pytest.raises(ConfigError, match=f"samples cannot be written .*{said} --sample.every 0"):
        train.main([*EVERY, f"--workdir={tmp_path}"])
    assert not rows(tmp_path)


def test_images_that_are_no_pictures_are_refused_in_one_line(whole, tmp_path, monkeypatch):
    four = lambda self, params, mutables, request: _arrays(np.zeros((2, 3, 3, 4), np.uint8))
    monkeypatch.setattr(Drawing, "sample", four)
    with pytest.raises(ConfigError, match=r"images with 4 channels .* leave --sample\.every 0"):
        train.main([*EVERY, f"--workdir={tmp_path / 'run'}"])
    request = (f"--workdir={whole}", TASK)
    for output in ((), (f"--output={tmp_path / 'x.png'}",)):
        with pytest.raises(ConfigError, match=r"with 4 channels .* to an \.npy or \.npz file"):
            sample.main([*request, *output])
    assert sample.main([*request, f"--output={tmp_path / 'x.npz'}"]) == 0


def test_a_step_is_saved_before_its_samples(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        breaks(patched, Broken(), "draw", after=1)
        with pytest.raises(Broken):
            train.main([*FLAGS, "--sample.every=4", f"--workdir={tmp_path}"])
    assert steps_in(tmp_path) == [4]
    trained(tmp_path, *FLAGS, "--sample.every=4")
    assert rows(tmp_path) == rows(whole)


def _arrays(levels: np.ndarray):
    return Arrays("broken", levels, 256)


def test_a_population_shows_its_first_member(whole, tmp_path):
    trained(tmp_path, *EVERY, "--population.size=2")
    assert list(files(tmp_path)) == list(files(whole))
    first, ours = (
        np.asarray(Image.open(folder / "samples" / "step_00000008.png"), np.int16)
        for folder in (whole, tmp_path)
    )
    assert np.abs(first - ours).max() <= 1  # of 256 levels


def test_texts_are_cut_to_the_positions_of_the_model(text_folder, tmp_path, capsys):
    flags = (*TINY, f"--data.dataset=text:{text_folder}", "--eval.batches=0", "--train.steps=2")
    learned = ("--transformer.positions=learned", "--transformer.max_length=40")
    trained(tmp_path, *flags, *learned, "--sample.every=2", "--sample.count=3")
    text = (tmp_path / "samples" / "step_00000002.txt").read_text()
    capsys.readouterr()
    request = (f"--workdir={tmp_path}", "--num_samples=3", "--max_tokens=39")
    assert sample.main(request) == 0
    assert capsys.readouterr().out == text and text.count("--- sample ") == 3
    (said,) = shown(tmp_path, "tensor").values()
    lines = [f"    {line}" for line in text.splitlines()]
    assert said.string_val[0].decode() == "\n".join(lines)


def test_a_run_on_four_devices_shows_the_pictures_of_one(whole, tmp_path):
    mesh = ("--mesh.data=2", "--mesh.fsdp=2")
    run("train", *EVERY, *mesh, f"--workdir={tmp_path}", devices=4)
    assert files(tmp_path) == files(whole)
