"""Files of the user: names of what is written, data that moved."""

import shutil

import pytest

from genai_jax import evaluate, sample, train
from genai_jax.config import ConfigError
from genai_jax.requests import SampleRequest, distinguishing
from tests.commands import TINY

ONE_STEP = ("--train.steps=1", "--train.progress=false", "--eval.batches=0")


def test_a_name_holds_any_value():
    names = [distinguishing(SampleRequest(ema=ema), 3) for ema in ("a/b", "a b", "x" * 300, "a-b")]
    assert len(set(names)) == 4 and max(map(len, names)) < 120
    assert not any("/" in name or " " in name for name in names)
    assert names[3] == "_step-3_ema-a-b"


def test_a_run_whose_data_and_tokenizer_moved_can_be_used(tmp_path, text_folder, capsys):
    from tokenizers import Tokenizer, models

    workdir = f"--workdir={tmp_path / 'run'}"
    data, tokenizer = tmp_path / "data", tmp_path / "t.json"
    shutil.copytree(text_folder, data)
    vocabulary = {"<eos>": 0} | {c: i + 1 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .\n")}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tokenizer))
    flags = (f"--data.dataset=text:{data}", f"--data.tokenizer={tokenizer}")
    train.main([*TINY, *ONE_STEP, workdir, *flags])
    capsys.readouterr()
    assert evaluate.main([workdir]) == 0
    before = capsys.readouterr().out
    data.rename(tmp_path / "new")
    shutil.rmtree(tmp_path / "run" / "data")  # as if an earlier version had trained it
    assert sample.main([workdir, "--max_tokens=2"]) == 0  # needs no data
    with pytest.raises(ConfigError, match=r"if it moved, add --data\.dataset=ITS_NEW_PLACE"):
        evaluate.main([workdir])
    tokenizer.rename(tmp_path / "new.json")
    with pytest.raises(ConfigError, match=r"--data\.tokenizer=.*t\.json: no such file .*if it mov"):
        sample.main([workdir])
    capsys.readouterr()
    place = f"--data.dataset=text:{tmp_path / 'new'}", f"--data.tokenizer={tmp_path / 'new.json'}"
    assert evaluate.main([workdir, *place]) == 0
    after = capsys.readouterr()
    scores = [out[out.index('"split"') : out.index('"tokens_per')] for out in (before, after.out)]
    assert scores[0] == scores[1] and "not those of the run" not in after.err
    for path in (tmp_path / "new").iterdir():
        path.write_text(f"another text {path.stem}")
    assert evaluate.main([workdir, *place]) == 0
    assert "the held-out data are not those of the run" in capsys.readouterr().err
