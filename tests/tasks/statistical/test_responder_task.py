"""The responder through the commands that all families have."""

import json
import shutil

import pytest

import genai_jax
from genai_jax import evaluate, sample, train
from genai_jax.config import ConfigError
from tests.decoding.test_responder import SMALL


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.json"
    path.write_text(json.dumps(SMALL))
    return path


def test_the_commands(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert train.main(["--task=responder", "--train.steps=1", workdir]) == 0
    capsys.readouterr()
    assert sample.main([workdir, "--prompt=I am unhappy."]) == 0
    assert capsys.readouterr().out == ("I am unhappy.\nI am sorry to hear that you are unhappy.\n")
    assert sample.main([workdir, "--prompt=I am unhappy.", "--num_samples=2", "--seed=1"]) == 0
    out = capsys.readouterr().out
    assert "talking will help you not to be unhappy" in out and "cannot be pleasant" in out
    with pytest.raises(ConfigError, match=r"--task=responder assigns no probabilities, so it has"):
        evaluate.main([workdir])
    for flag in ("--temperature=0.5", "--max_tokens=3"):
        with pytest.raises(ConfigError, match=r"is not a flag of a run of --task=responder"):
            sample.main([workdir, flag])
    with pytest.raises(ConfigError, match=r"--eval.batches=2 means nothing to --task=responder"):
        train.main(["--task=responder", "--eval.batches=2", f"--workdir={tmp_path / 'other'}"])


def test_a_run_keeps_its_script_and_can_be_moved(script, tmp_path):
    folder = tmp_path / "run"
    run = genai_jax.train(["--task=responder", f"--data.dataset=script:{script}"], folder)
    lines = ["my father likes me", "", "so"]
    expected = ["my father likes me\nYour father?", "Hello.", "so\nEarlier, your father likes you."]
    assert run.sample(prompt=lines) == expected
    script.unlink()
    shutil.move(folder, tmp_path / "moved")
    assert genai_jax.load(tmp_path / "moved").sample(prompt=lines) == expected


def test_scripts_that_cannot_be_read_are_one_line(script, tmp_path):
    start = lambda name: train.main(
        ["--task=responder", f"--data.dataset={name}", f"--workdir={tmp_path / 'run'}"]
    )
    with pytest.raises(ConfigError, match=r"is neither therapist nor script:PATH of a JSON file"):
        start("doctor")
    with pytest.raises(ConfigError, match=r"missing.json: no such file"):
        start("script:missing.json")
    for text, said in (("{", "JSON"), ("[]", "the script is not a JSON object"), ("\x00", "JSON")):
        script.write_text(text)
        with pytest.raises(ConfigError, match=said) as error:
            start(f"script:{script}")
        assert "--data.dataset=script:" in str(error.value) and "\n" not in str(error.value)
