"""Every mistake: one clear line, a non-zero exit, nothing written over."""

import re
import resource
import subprocess
import sys

import pytest

from genai_jax import command, evaluate, sample, train
from genai_jax.components import request_class
from genai_jax.config import Config, ConfigError, parse
from genai_jax.tasks.diffusion.sampler_flags import SamplerConfig, sampler_of
from genai_jax.tasks.registry import task_class
from tests.commands import TINY, run
from tests.conftest import ROOT

COMMANDS = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main}

ONE_STEP = (
    "--train.steps=1", "--eval.batches=1",
    "--transformer.positions=learned", "--transformer.max_length=40",
)  # fmt: skip


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Runs a command in this process; returns the one line it is refused with."""

    def refuse(name: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        with pytest.raises(SystemExit) as stop:
            command.run(COMMANDS[name])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        lines = err.splitlines(keepends=True)  # training says first what it read
        err = "".join(line for line in lines if not line.startswith("note: text:"))
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return refuse


@pytest.fixture
def base(text_folder, tmp_path):
    return (*TINY, f"--data.dataset=text:{text_folder}", f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--flagfile=/no/such.flags"], "cannot read flagfile '/no/such.flags'"),
        (["--transformer.num_layer=3"], "transformer.num_layer"),
        (["--transformer.num_layers=three"], "three"),
        (["--transformer.num_layers=0"], "num_layers"),
        (["--optimizer.name=adamx"], "adamw, sgd, lion, adafactor, muon (did you mean adamw?)"),
        (["--task=poetry"], "language_model"),
        (["stray"], "'stray' is not a flag"),
        (["--transformer.embed_dim=30", "--transformer.num_heads=4"], "30 is not divisible by"),
        (["--transformer.positions=learned", "--transformer.max_length=16"], "longer than the"),
        (["--data.dataset=no_such_dataset_x"], "no_such_dataset_x"),
        (["--data.dataset=text:/no/such/file"], "/no/such/file"),
        (["--train.steps=0"], "train.steps"),
        (["--data.tokenizer=/no/such.json"], "/no/such.json"),
        (["--train.accumulate=3"], "--data.batch_size=8 is not divisible by"),
        (["--mesh.tensor=2"], "does not fit 1 device"),
        (["--mesh.tensor=2", "--data.dataset=text:/no/such/file"], "does not fit 1 device"),
        (["--lr=1"], "did you mean --optimizer.learning_rate?"),
        (["--steps=1"], "did you mean --train.steps?"),
        (["--batch=1"], "did you mean --data.batch_size?"),
        (["--attention=tpu"], "auto, xla, xla_chunked"),
        (["--ema.decay=2"], "--ema.decay=2"),
        (["--optimizer.learning_rate=1e39"], "must be a finite number of float32"),
    ],
)  # fmt: skip
def test_training_refuses(refuse, base, tmp_path, flags, said):
    assert said in refuse("train", *base, *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_flag_of_another_task_is_refused(refuse, base):
    said = refuse("train", *base, "--dit.num_layers=2")
    assert "--dit.num_layers is not a flag of --task=language_model" in said
    assert "its flags are --task, --seed, " in said and ", --transformer.*, " in said


def test_flagfiles_that_are_empty_or_circular(refuse, base, tmp_path):
    empty, circle = tmp_path / "empty.flags", tmp_path / "circle.flags"
    empty.write_text("# nothing\n\n")
    circle.write_text("--flagfile=circle.flags\n")
    assert "sets no flag" in refuse("train", *base, f"--flagfile={empty}")
    assert "includes itself" in refuse("train", *base, f"--flagfile={circle}")


def test_text_that_is_empty_or_not_utf8(refuse, base, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_bytes(b"")
    latin.write_bytes(b"caf\xe9 " * 3000)
    assert "empty.txt" in refuse("train", *base, f"--data.dataset=text:{empty}")
    tokenizer = tmp_path / "tok.json"
    from tokenizers import Tokenizer, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(tokenizer))
    said = refuse("train", *base, f"--data.dataset=text:{latin}", f"--data.tokenizer={tokenizer}")
    assert "latin.txt" in said and "UTF-8" in said and "--data.tokenizer=bytes" in said


def test_no_workdir_and_one_that_cannot_be_written(refuse, base, tmp_path):
    assert "--workdir is not set" in refuse("train", *base, "--workdir=")
    (tmp_path / "file").write_text("")
    assert "cannot write to --workdir" in refuse("train", *base, f"--workdir={tmp_path / 'file'}")
    for name in ("a[b]", "a*", "a?", "a\\b"):  # checkpoints in there could not be read
        said = refuse("train", *base, f"--workdir={tmp_path / name}")
        assert "from a path with" in said and not (tmp_path / name).exists()


def test_a_batch_that_the_devices_do_not_divide(base):
    _, err = run("train", *base, "--data.batch_size=6", code=2, devices=4)
    assert err.count("\n") == 1
    assert "--data.batch_size=6 is not divisible by 4 device(s)" in err
    _, err = run("train", *base, "--mesh.data=2", "--mesh.expert=2", code=2, devices=4)
    assert err == "error: --mesh.expert=2 splits nothing in this task\n"
    _, err = run("train", *base, "--mesh.tensor=4", code=2, devices=4)
    assert "heads of size 2 is not divisible by --mesh.tensor=4" in err
    assert "parameter model/layers/attention/" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_commands_on_what_is_not_a_run(refuse, tmp_path, name):
    assert "--workdir is not set" in refuse(name)
    assert "it has no flags.txt" in refuse(name, f"--workdir={tmp_path}")


def test_a_workdir_does_not_decide_what_is_imported(refuse, tmp_path, capsys):
    """Neither by its flags nor by a flagfile that they name."""
    nested = tmp_path / "nested.flags"
    nested.write_text("--task=no_such_module_x:Task\n")
    (tmp_path / "flags.txt").write_text(nested.read_text())
    said = refuse("evaluate", f"--workdir={tmp_path}")
    assert "is a run of --task=no_such_module_x:Task, which is code outside" in said
    assert sample.main([f"--workdir={tmp_path}", "--help"]) == 0  # imports nothing either
    capsys.readouterr()
    (tmp_path / "flags.txt").write_text(f"--flagfile={nested}\n")
    assert "no run writes --flagfile" in refuse("evaluate", f"--workdir={tmp_path}")


def test_requests_that_a_run_cannot_answer(refuse, base, tmp_path):
    train.main([*base, *ONE_STEP])
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "no checkpoint of step 7; there are [1]" in refuse(
        "sample", workdir, "--checkpoint_step=7"
    )
    assert "--ema=0.5 is not an average of this run" in refuse("evaluate", workdir, "--ema=0.5")
    assert "need 301 positions" in refuse("sample", workdir, "--max_tokens=300")
    assert "top_p" in refuse("sample", workdir, "--top_p=1.5")
    (tmp_path / "file").write_text("")
    for output in (f"{tmp_path}/file/out.txt", str(tmp_path), "/proc/out.txt"):  # before sampling
        assert f"--output={output}" in refuse("sample", workdir, f"--output={output}")
    assert "cannot read --prompt_file" in refuse("sample", workdir, "--prompt_file=/no/such")
    flags = tmp_path / "run" / "flags.txt"
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    assert "is not the one the checkpoint was trained with" in refuse("sample", workdir)
    assert "tokenizer_sha256 was 0" in refuse("train", f"--flagfile={flags}", workdir)


@pytest.mark.parametrize(
    ("task", "kind", "flags", "said"),
    [
        ("autoencoder", "sample", "--seed=3", "--seed=3 has no effect"),
        ("language_model", "sample", "--seed=3 --temperature=0", "--seed=3 has no effect"),
        ("diffusion", "sample", "--strength=0.3", "--strength=0.3 needs --init_image"),
        ("diffusion", "sample", "--strength=0 --init_image=a --mask=b", "--strength=0.0 needs"),
        ("diffusion", "sample", "--strength=0 --init_image=a --steps=3", "--steps=3 has no effect"),
        ("diffusion", "sample", "--strength=0 --init_image=a --label=3", "--label=3 has no effect"),
        ("diffusion", "sample", "--interpolate_to=b --init_image=a --seed=3", "--seed=3 has no ef"),
        ("few_step", "sample", "--interpolate_to=b --init_image=a --strip", "--strip=True has no "),
        ("language_model", "sample", "--seed=3 --top_k=1", "--seed=3 has no effect with --top_k=1"),
        ("diffusion", "evaluate", "--likelihood_steps=7", "--likelihood_steps=7 needs"),
        ("few_step", "evaluate", "--likelihood=exact --likelihood_probes=7", "probes=7 needs"),
        ("diffusion", "sample", "--churn=0.5", "--churn=0.5 is for --solver=heun, not dpmpp_2m"),
        ("diffusion", "sample", "--solver=heun --snr=0.5", "--snr=0.5 is for --solver=predictor_c"),
    ],
)  # fmt: skip
def test_what_a_request_would_ignore_is_refused(task, kind, flags, said):
    request = request_class(task_class(task), f"{kind}_request")
    with pytest.raises(ConfigError, match=re.escape(said)):
        parsed = parse(flags.split(), {"run": request})[0].run
        sampler_of(Config({"sampler": SamplerConfig()}), parsed)


def test_data_that_changed_under_a_run_is_refused(refuse, base, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} " * 20)
    data = (*base, f"--data.dataset=text:{folder}", *ONE_STEP)
    train.main(data)
    (folder / "3.txt").write_text("another text")
    assert "the data changed since the run" in refuse("train", *data)


def test_help_without_docstrings():
    names = ("train", "sample", "evaluate", "study", "ladder", "fit", "compile_check",
             "coordinate_check", "train_tokenizer")  # fmt: skip
    code = f"from genai_jax import {', '.join(names)}\n"
    code += "".join(f"{name}.main(['--help'])\n" for name in names)
    process = subprocess.run(
        [sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_help_answers_within_three_seconds():
    """Of this process's own work: the tests beside it may take the cores for longer.

    On a slow machine, in less than twice what importing jax takes there.
    """

    def work() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds, of_jax = [], []
    for _ in range(3):  # the first finds no file in the system's cache
        begin = work()
        out, _ = run("train", "--help")
        seconds.append(work() - begin)
        begin = work()
        subprocess.run([sys.executable, "-c", "import jax"], check=True)
        of_jax.append(work() - begin)
    assert "--transformer.num_layers" in out and "at least 1" in out
    assert 0.1 < min(seconds) < max(3, 2 * min(of_jax)), (seconds, of_jax)
