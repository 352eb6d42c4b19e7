"""Runs in Python: what the functions return is what the commands print and write."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

import genai_jax
from genai_jax import evaluate, sample, trainer
from genai_jax.config import ConfigError
from genai_jax.keyword_flags import run_flags
from tests.commands import TINY, environment
from tests.conftest import ROOT

TEXT = {flag.removeprefix("--").split("=")[0]: flag.split("=")[1] for flag in TINY} | {
    "train.steps": 4, "checkpoint.every": 1, "checkpoint.keep": 1, "eval.every": 1,
    "eval.batches": 1, "train.log_every": 1,
}  # fmt: skip
IMAGES = (
    "--task=vae", "--dense_vae.latent_dim=3", "--dense_vae.hidden_dim=16",
    "--dense_vae.num_layers=1", "--vae.condition=class", "--train.steps=1", "--eval.batches=0",
    "--data.batch_size=8", "--train.progress=false",
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def flags(text_folder):
    return TEXT | {"data.dataset": f"text:{text_folder}"}


@pytest.fixture(scope="module")
def text(flags, tmp_path_factory):
    return genai_jax.train(flags, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return genai_jax.train(IMAGES, tmp_path_factory.mktemp("images"))


def said(command, run, *flags, capsys) -> str:
    capsys.readouterr()
    assert command.main([f"--workdir={run.workdir}", *flags]) == 0
    return capsys.readouterr().out


def same_scores(scores, printed: str):
    speed = {"tokens_per_second": scores.get("tokens_per_second")}
    assert scores | speed == json.loads(printed) | speed


def test_importing_the_package_is_cheap():
    code = (
        "import sys, genai_jax; print('jax' in sys.modules, 'load' in dir(genai_jax)); "
        "from genai_jax import ConfigError, train; print(train.main.__name__)"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.split() == ["False", "True", "main"], out.stderr
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        genai_jax.lode  # noqa: B018


def test_texts_are_those_of_the_command(text, tmp_path, capsys):
    written = tmp_path / "x.jsonl"
    flags = ("--num_samples=2", "--max_tokens=9", "--seed=3", "--top_k=5")
    said(sample, text, *flags, "--prompt=the", f"--output={written}", capsys=capsys)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    options = dict(num_samples=2, max_tokens=9, seed=3, top_k=np.int64(5))
    assert text.sample(prompt="the", **options) == [row["text"] for row in rows]
    assert {row["prompt"] for row in rows} == {"the"} and rows[1]["seed"] == 3
    (tmp_path / "prompts").write_text("a\n\nlong one\n")
    said(sample, text, *flags, f"--prompt_file={tmp_path / 'prompts'}", f"--output={tmp_path}/x/",
         capsys=capsys)  # fmt: skip
    files = sorted((tmp_path / "x").glob("*.txt"))
    assert text.sample(prompt=["a", "", "long one"], **options) == [f.read_text() for f in files]
    for odd in ([], ["a\nb"]):
        with pytest.raises(ConfigError, match="each of one line"):
            text.sample(prompt=odd)


def test_images_are_those_of_the_command(images, tmp_path, capsys):
    flags = ("--num_samples=5", "--label=3,8", "--seed=2")
    said(sample, images, *flags, f"--output={tmp_path / 'x.npz'}", capsys=capsys)
    options = dict(num_samples=5, label=[3, 8], seed=2)
    shown = images.sample(**options)
    sampled = images.sampled(**options, output=tmp_path / "mine.npy")
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(shown, file["images"])
        assert file["label_names"].tolist() == sampled.label_texts() == ["3", "8", "3", "8", "3"]
    np.testing.assert_array_equal(np.load(tmp_path / "mine.npy"), shown)
    assert shown.dtype == np.uint8 and shown.shape == (5, 8, 8, 1)
    picture = images.picture(shown)
    np.testing.assert_array_equal(picture, images.sampled(**options, annotate=False).picture())
    assert sampled.picture().shape != picture.shape  # with "3" and "8" above their columns
    assert picture.dtype == np.uint8 and picture.ndim == 3
    with pytest.raises(ConfigError, match=r"--output=x\.txt must end in \.png"):
        said(sample, images, "--output=x.txt", capsys=capsys)


def test_scores_are_those_of_the_command(text, images, capsys):
    same_scores(text.evaluate(batches=2), said(evaluate, text, "--batches=2", capsys=capsys))
    same_scores(images.evaluate(seed=1), said(evaluate, images, "--seed=1", capsys=capsys))
    loss, metrics = text.loss(batches=2)
    assert loss == metrics["loss"] == text.evaluate(batches=2)["loss"]
    batches = list(text.held_out(2))
    assert np.mean([text.loss(batch)[0] for batch in batches]) == pytest.approx(loss)
    with pytest.raises(ConfigError, match=r"batch entry tokens has shape \(2, 3\)"):
        text.loss({**batches[0], "tokens": np.zeros((2, 3), int)})
    with pytest.raises(ConfigError, match="--batches=0 leaves nothing"):
        text.evaluate(batches=0)


def test_the_best_checkpoint(text, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(text.workdir, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["eval/loss"])["step"]
    assert genai_jax.load(workdir, step="best").step == best
    worse = workdir / "checkpoints" / "4" / "metrics" / "metrics"
    worse.write_text(json.dumps({"loss": 1e9}))
    run = genai_jax.load(workdir, step="best")
    assert (run.step, genai_jax.load(workdir).step) == ((best, 4) if best != 4 else (4, 4))
    printed = json.loads(said(evaluate, run, "--checkpoint_step=best", capsys=capsys))
    assert printed["step"] == run.step
    with pytest.raises(ConfigError, match="--checkpoint_step=bset is not the number of a step, or"):
        genai_jax.load(workdir, step="bset")
    for folder in (workdir / "checkpoints").iterdir():
        shutil.rmtree(folder / "metrics", ignore_errors=True)
    with pytest.raises(ConfigError, match="was evaluated when it was saved"):
        genai_jax.load(workdir, step="best")


def test_hidden_states_do_not_depend_on_the_other_texts(text):
    both = text.embed(["the cat", "a"])
    assert both.shape == (2, 8, 16) and both.dtype == np.float32
    np.testing.assert_allclose(both[1, :2], text.embed("a")[0], atol=1e-5)
    assert not both[1, 2:].any() and text.embed([]).shape == (0, 0, 16)
    logits = both[0] @ np.asarray(text.task._head_kernel(text.params))
    token, tokenizer = int(logits[3].argmax()), text.task.data.tokenizer
    expected = "" if token == tokenizer.boundary_id else tokenizer.decode([token])
    assert text.sample(prompt="the", max_tokens=1, temperature=0) == ["the" + expected]
    with pytest.raises(ConfigError, match="a text or a list of texts"):
        text.embed(np.zeros((2, 3)))


def test_attention_of_a_text(text):
    weights, tokens = text.attention("the cat"), text.tokens("the cat")
    assert tokens == ["<boundary>", *"the cat"] and weights.shape == (2, 2, 8, 8)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_the_rows_of_metrics(text):
    rows = text.metrics()
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["step"] == text.step and rows[-1]["eval/loss"] > 0


def test_logit_lens_of_a_text(text):
    lens = text.logit_lens("the cat")
    assert lens.shape == (3, 8, text.task.data.tokenizer.vocab_size)
    greedy = text.sample(prompt="the cat", max_tokens=1, temperature=0)[0]
    token = int(lens[-1, -1].argmax())
    tokenizer = text.task.data.tokenizer
    last = "" if token == tokenizer.boundary_id else tokenizer.decode([token])
    assert greedy == "the cat" + last


def test_latents_of_images(images):
    levels = next(images.held_out(1))["image"]
    with pytest.raises(ConfigError, match="only held-out images"):
        images.embed(levels)
    assert images.embed().shape == (355, 3)
    with pytest.raises(ConfigError, match="is not a language model with attention"):
        images.attention("x")
    with pytest.raises(ConfigError, match="is not a language model with attention"):
        images.logit_lens("x")


def test_flags_of_the_model_belong_to_load(text):
    with pytest.raises(ConfigError, match=r"ema chooses the model: give it to genai_jax\.load"):
        text.sample(ema="0.9")
    with pytest.raises(ConfigError, match=r"--num_sample is not a flag .* --num_samples\?"):
        text.sample(num_sample=2)
    with pytest.raises(ConfigError, match=r"stop=\{\} is a dict, which no flag can be"):
        text.sample(stop={})
    with pytest.raises(ConfigError, match="has no images to show"):
        text.picture(np.zeros((1, 2, 2, 1), np.uint8))
    with pytest.raises(ConfigError, match="no run in --workdir=nowhere") as error:
        genai_jax.load("nowhere")
    assert error.value._render_traceback_() == [f"ConfigError: {error.value}"]  # for IPython
    assert re.fullmatch(r"<Run .*: language_model, step 4>", repr(text))


def test_every_way_to_give_the_flags_of_a_run(flags, text, tmp_path):
    flagfile = tmp_path / "x.flags"
    flagfile.write_text("".join(f"--{name}={value}\n" for name, value in flags.items()))
    listed = [f"--{name}={value}" for name, value in flags.items()]
    configs = [run_flags(x, "w") for x in (flags, listed, flagfile, str(flagfile), text.config)]
    assert all(config.to_flags() == configs[0].to_flags() for config in configs)
    with pytest.raises(ConfigError, match="workdir is empty"):
        run_flags(flags, "")
    with pytest.raises(ConfigError, match=r"did you mean --train\.steps"):
        genai_jax.train({"train.step": 3}, tmp_path)


SCRIPT = """
import json, signal, sys
{first}
import genai_jax
handlers = lambda: list(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))
before, flags = handlers(), json.loads(sys.argv[1])
run = genai_jax.train(flags | {{"train.steps": 10**6}}, sys.argv[2])
assert handlers() == before
print(run.step, genai_jax.train(flags | {{"train.steps": run.step + 1}}, sys.argv[2]).step)
"""


def interrupted(flags, workdir, first: str = "") -> tuple[int, str, str]:
    """Exit code and output of a script that trains, and that Ctrl-C reaches after two steps."""
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(first=first), json.dumps(flags), str(workdir)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    rows = workdir / "metrics.jsonl"
    while script.poll() is None and not (rows.exists() and rows.read_text().count("\n") > 1):
        time.sleep(0.02)
    script.send_signal(signal.SIGINT)
    out, err = script.communicate(timeout=120)
    return script.returncode, out, err


def test_an_interrupt_in_a_notebook_saves_and_returns(flags, tmp_path):
    code, out, err = interrupted(flags, tmp_path, first='sys.ps1 = "In: "')
    assert code == 0, err
    assert "stopped by signal 2" in out and "step/s" not in err
    stopped, longer = map(int, out.splitlines()[-1].split())
    assert 2 <= stopped < 10**6 and longer == stopped + 1


def test_an_interrupt_in_a_script_saves_and_ends_it(flags, tmp_path):
    code, out, err = interrupted(flags, tmp_path)
    assert code == -signal.SIGINT and not out and "KeyboardInterrupt" in err
    assert genai_jax.load(tmp_path).step >= 2


def test_a_thread_trains_without_handlers_and_mistakes_reach_the_caller(
    flags, tmp_path, monkeypatch
):
    before, results = list(map(signal.getsignal, SIGNALS)), []
    flags = {**flags, "train.steps": 1, "eval.batches": 0}
    thread = threading.Thread(target=lambda: results.append(genai_jax.train(flags, tmp_path / "a")))
    thread.start()
    thread.join()
    assert results[0].step == 1 and before == list(map(signal.getsignal, SIGNALS))
    monkeypatch.setattr(sys, "ps1", "In: ", raising=False)
    with pytest.raises(ConfigError, match=r"text:/nowhere"):
        genai_jax.train({**flags, "data.dataset": "text:/nowhere"}, tmp_path / "b")


def test_a_second_interrupt_returns_at_once(monkeypatch):
    """The work goes on in the background."""
    go_on, asked, interrupts = threading.Event(), [], [KeyboardInterrupt] * 2

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            if interrupts:
                raise interrupts.pop()
            return super().wait(timeout)

    def work(stop):
        go_on.wait(30)
        asked.append(stop.ask())

    ours = types.SimpleNamespace(Thread=threading.Thread, Event=Interrupted)
    monkeypatch.setattr(trainer, "threading", ours)
    with pytest.raises(KeyboardInterrupt):
        trainer._interruptible(work)
    assert not interrupts and not asked
    go_on.set()
    (thread,) = (t for t in threading.enumerate() if t.name == "training")
    thread.join()
    assert asked == [signal.SIGINT]
