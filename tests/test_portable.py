"""A run that was moved, without its data, is sampled and scored as before."""

import json
import shutil

import numpy as np
import pytest

import genai_jax
from genai_jax import evaluate, train, train_tokenizer
from genai_jax.config import ConfigError
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
    path = copy / "data" / "validation.json"
    path.write_bytes(path.read_bytes().replace(b"weather", b"whether", 1))
    with pytest.raises(ConfigError, match=r"validation\.json: it is damaged; without .*record"):
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
