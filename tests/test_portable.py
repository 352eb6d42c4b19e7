"""A run that was moved, without its data, is sampled and scored as before."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import genai_jax
from genai_jax import evaluate, train, train_tokenizer
from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.data.kept import KeptData
from genai_jax.training.portable import keep
from tests.commands import TINY

SHORT = (
    "--train.steps=2", "--train.progress=false", "--optimizer.warmup_steps=0", "--eval.batches=1",
    "--data.batch_size=4",
)  # fmt: skip
DOCUMENTS = [f"Line {i}: the weather is {'fine' if i % 3 else 'wet'} today. ☀" for i in range(60)]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A workdir that was moved, and what was sampled and scored before; its data are gone."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "notes.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
        own = "--data.dataset=text:notes.jsonl"
        train_tokenizer.main([own, "--vocab_size=300", "--output=tok.json"])
        flags = [*TINY, own, "--data.tokenizer=tok.json", *SHORT, "--data.validation_percent=20"]
        train.main([*flags, "--workdir=run"])
        run = genai_jax.load("run")
        before = run.sample(max_tokens=5), run.evaluate(), run.task.data.record()
        train.main([*flags, "--workdir=run", "--train.steps=3"])
    moved = tmp_path_factory.mktemp("second") / "copied run"
    shutil.move(folder / "run", moved)
    shutil.rmtree(folder)
    return moved, before


def test_a_text_run_without_its_data_and_its_tokenizer(text_run):
    moved, (texts, scores, record) = text_run
    run = genai_jax.load(moved, step=2)
    assert run.sample(max_tokens=5) == texts
    assert run.evaluate() == scores | {"tokens_per_second": pytest.approx(0, abs=1e9)}
    assert run.task.data.record() == record
    assert run.config.data.dataset == "text:notes.jsonl"  # the flags stay those of the run
    assert len(list(run.held_out())) >= 1


def test_training_goes_on_only_with_the_data(text_run):
    moved, _ = text_run
    with pytest.raises(ConfigError, match="no such file"):
        genai_jax.train(f"{moved}/flags.txt", moved)


def test_what_the_command_line_names_is_read_instead(text_run, tmp_path, capsys):
    moved, _ = text_run
    (tmp_path / "other.txt").write_text("something else\f" * 20 + "the end")
    other = (f"--data.dataset=text:{tmp_path}/other.txt", "--data.validation_percent=100")
    assert evaluate.main([f"--workdir={moved}", *other]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["trained_on"] == "text:notes.jsonl"
    assert "not those of the run" in said.err
    with pytest.raises(ConfigError, match=r"--data.tokenizer=gone\.json: no such file"):
        genai_jax.load(moved, flags={"data.tokenizer": "gone.json"})


def test_a_damaged_copy_is_named(text_run, tmp_path):
    moved, _ = text_run
    copy = tmp_path / "run"
    shutil.copytree(moved, copy)
    path = copy / "data" / "validation.bin"
    path.write_bytes(path.read_bytes().replace(b"weather", b"whether", 1))
    with pytest.raises(ConfigError, match=r"validation\.bin: it is damaged; without .*record"):
        genai_jax.load(copy).evaluate()
    (copy / "data" / "record.json").write_text('{"record": 1}')
    with pytest.raises(ConfigError, match=r"record\.json: it is not what a run keeps"):
        genai_jax.load(copy)
    (copy / "data" / "record.json").unlink()
    with pytest.raises(ConfigError, match=r"no such file.*--data\.dataset=ITS_NEW_PLACE"):
        genai_jax.load(copy).evaluate()


def test_a_run_that_builds_on_another_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    autoencoder = [
        "--task=autoencoder", "--autoencoder.channels=4",
        "--autoencoder.channel_multipliers=1,1", "--autoencoder.latent=fsq",
        "--autoencoder.latent_channels=2", "--quantizer.levels=3,3", *SHORT, "--workdir=codes",
    ]  # fmt: skip
    prior = [
        "--task=code_prior", "--code_prior.autoencoder=codes", "--transformer.embed_dim=16",
        "--transformer.num_heads=2", "--transformer.num_layers=1", *SHORT, "--workdir=prior",
    ]  # fmt: skip
    train.main(autoencoder)
    train.main(prior)
    before = genai_jax.load("prior").sample(num_samples=1)
    (tmp_path / "codes").rename(tmp_path / "away")
    np.testing.assert_array_equal(genai_jax.load("prior").sample(num_samples=1), before)
    assert not (tmp_path / "prior" / "data" / "record.json").exists()  # digits are built in


ABOUT = {"shape": [2, 2, 1], "levels": 4, "label_names": [["a", "b"]], "can_flip": True}


def kept_images(folder, about=None, record=None, **files: bytes):
    """A folder that a run might have written, or somebody else."""
    about = ABOUT if about is None else about
    record = {"shape": about.get("shape"), "levels": about.get("levels"), **(record or {})}
    for name, data in files.items():
        (folder / f"{name}.bin").write_bytes(data)
    sums = {f"{name}.bin": hashlib.sha256(data).hexdigest() for name, data in files.items()}
    content = {"record": record, "about": about, "files": sums}
    (folder / "record.json").write_text(json.dumps(content))
    return KeptData(folder)


GOOD = {"train_images": bytes(8), "train_labels": np.array([0, 1], "<i4").tobytes()}


def test_kept_images_are_checked(tmp_path):
    source = kept_images(tmp_path, **GOOD).images("train")
    assert source.images.shape == (2, 2, 2, 1) and source.labels.tolist() == [[0], [1]]
    for about in (
        {"levels": None}, {"levels": 1}, {"levels": 400}, {"shape": [2]}, {"shape": [2, -2, 1]},
        {"shape": [1 << 20, 1 << 20, 3]}, {"shape": "2"}, {"label_names": 3}, {"label_names": [[]]},
        {"label_names": [[1]]}, {"can_flip": None},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="not what a run keeps"):
            kept_images(tmp_path, ABOUT | about)
    with pytest.raises(ConfigError, match="not what a run keeps"):
        kept_images(tmp_path, record={"levels": 5})
    for files in (
        {"train_images": bytes(7)}, {"train_images": bytes([0, 0, 0, 9] * 2)},
        {"train_images": b""},
        {"train_labels": np.array([0, 2], "<i4").tobytes()},
        {"train_labels": np.array([0, -1], "<i4").tobytes()}, {"train_labels": bytes(4)},
        {"train_captions": b"ab", "train_captions_ends": np.array([1, 3], "<i8").tobytes()},
        {"train_captions": b"ab", "train_captions_ends": np.array([2, 1, 2], "<i8").tobytes()},
        {"train_captions": b"\xff", "train_captions_ends": np.array([0, 1], "<i8").tobytes()},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="cannot read"):
            kept_images(tmp_path, **{**GOOD, **files}).images("train")


def test_links_in_another_run_are_not_followed(tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    (other / "data" / "runs").mkdir(parents=True)
    (other / "flags.txt").write_text("--task=autoencoder\n")
    (other / "run.json").symlink_to("/dev/zero")
    (other / "data" / "tokenizer.json").symlink_to("/etc/hostname")
    for name in "abc":
        (other / "data" / "runs" / name).symlink_to(other)
    config = parse_run(["--task=diffusion", f"--diffusion.autoencoder={other}", f"--workdir={run}"])
    keep(SimpleNamespace(data=None), config, {})
    copied = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    assert copied == ["data/runs/diffusion.autoencoder/flags.txt"]
