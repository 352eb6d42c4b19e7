"""Networks, objectives, and data sets from outside: the guide, its table, and what is refused."""

import contextlib
import dataclasses
import importlib
import json
import re
import shlex
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import genai_jax
from genai_jax import compare, outside, sample, train
from genai_jax.components import DEFAULT_TASK, components_of, make_task, parse_run
from genai_jax.config import ConfigError, field
from genai_jax.data.images.own_arrays import Examples
from genai_jax.data.images.sources import OWN
from genai_jax.data.own_code import FILES, KINDS
from genai_jax.data.text.sources import PAIRED, SYNTHETIC
from genai_jax.losses.adversarial import LOSSES
from genai_jax.losses.likelihoods import Bernoulli
from genai_jax.networks.latent.dense_vae import DenseVae, DenseVaeConfig
from genai_jax.tasks.autoencoder.codec import Bottleneck
from genai_jax.tasks.registry import TASKS, task_class
from tests.conftest import ROOT
from tests.test_outside_family import files_of

GUIDE = ROOT / "docs" / "your_own_code.md"
HERE = f"{__name__}:"
SHORT = (
    "--train.steps=2", "--train.progress=false", "--optimizer.warmup_steps=0", "--eval.batches=0",
    "--optimizer.weight_decay=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_code")
    for name, content in files_of(GUIDE.read_text(encoding="utf-8")).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(outside, "_allowed", set())
    return folder


def test_the_commands_of_the_guide(inside, monkeypatch, capsys):
    (block,) = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.strip().splitlines():
        python, dash, module, *flags = shlex.split(line)
        assert (python, dash) == ("python", "-m")
        short = SHORT if module.endswith("train") else ("--steps=2",)
        if "sums" in line:
            small = (*SHORT, "--transformer.embed_dim=16")
            short = small if module.endswith("train") else ("--max_tokens=3",)
        monkeypatch.setattr(outside, "_allowed", set())  # every command is a process of its own
        assert importlib.import_module(module).main([*flags, *short]) == 0
    data = json.loads((inside / "runs/stripes/run.json").read_text())["data"]
    assert data["label_names"] == [["upright", "level"]] and data["train_examples"] == 320
    assert "--dilated.width=48" in (inside / "runs/stripes/flags.txt").read_text()
    assert len(list((inside / "runs/stripes/samples").iterdir())) == 1
    assert json.loads((inside / "runs/sums/run.json").read_text())["data"]["train_documents"] == 115


def test_a_workdir_does_not_decide_which_code_runs(inside, monkeypatch, tmp_path):
    flags = ["--flagfile=stripes.flags", *SHORT, f"--workdir={tmp_path}"]
    assert train.main(flags) == 0
    monkeypatch.setattr(outside, "_allowed", set())
    names = "my_parts.data:stripes,my_parts.network:Dilated,my_parts.objective:huber"
    with pytest.raises(ConfigError, match=f"add --code={names} to the command line"):
        sample.main([f"--workdir={tmp_path}"])
    run = genai_jax.load(tmp_path, code=names.split(","))
    assert run.sample(num_samples=2, steps=2, label=["upright"]).shape == (2, 8, 8, 1)
    assert np.isfinite(run.evaluate()["loss"])


@pytest.mark.parametrize(
    "lines",
    [
        "--task=evil_mod:Evil\n",
        "--task=evil_mod:Evil\n--workdir\n--task=language_model\n",
        "--task=evil_mod:Evil\n--undefok\n--task=language_model\n",
        "--task=language_model\n--init_from\n--task=evil_mod:Evil\n",
        "--task\nevil_mod:Evil\n",
        "-task=evil_mod:Evil\n",
        '--task:="evil_mod:Evil"\n',
        "--flagfile=more.flags\n",
        "--data.dataset=evil_mod:evil\n--workdir\n--data.dataset=digits\n",
        "--data.dataset\nevil_mod:evil\n",
        "--optimizer.name=evil_mod:evil\n--code=evil_mod:evil\n",
        "--transformer.pattern=attention,evil_mod:Evil\n",
        "--transformer.pattern=evil_mod\n",
        "--task=diffusion\n--diffusion.network=evil_mod:Evil\n",
        "--task=diffusion\n--evil.width=3\n--diffusion.network=evil_mod:Evil\n",
        '--task=gan\n--gan.loss:="evil_mod:EVIL"\n--gan.loss=hinge\n--gan.loss=evil_mod:E\n',
    ],
)
def test_no_spelling_in_a_workdir_runs_code(tmp_path, monkeypatch, lines):
    (tmp_path / "evil_mod.py").write_text("raise SystemExit('this code has run')")
    run = tmp_path / "run"
    run.mkdir()
    (run / "flags.txt").write_text(lines)
    (run / "more.flags").write_text("--task=evil_mod:Evil\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(outside, "_allowed", set())
    for act in (
        lambda: sample.main([f"--workdir={run}"]), lambda: genai_jax.load(run),
        lambda: sample.main([f"--workdir={run}", "--help"]),
        lambda: compare.main([str(run), str(run)]),
        lambda: parse_and_make(f"--diffusion.autoencoder={run}"),
    ):  # fmt: skip
        with contextlib.suppress(ConfigError):
            act()
    assert "evil_mod" not in sys.modules


def parse_and_make(flag: str):
    make_task(parse_run(["--task=diffusion", flag]))


def test_code_of_a_run_that_one_builds_on_is_named_too(tmp_path, monkeypatch):
    small = ["--task=autoencoder", "--autoencoder.channels=4"]
    mine = f"--autoencoder_loss.reconstruction={HERE}my_error"
    config = parse_run([*small, mine, f"--workdir={tmp_path}"])
    (tmp_path / "flags.txt").write_text(config.to_flags(leave_out=["workdir", "code"]))
    monkeypatch.setattr(outside, "_allowed", set())
    flags = ["--task=diffusion", f"--diffusion.autoencoder={tmp_path}"]
    with pytest.raises(ConfigError, match=f"add --code={HERE}my_error"):
        make_task(parse_run(flags))
    task = make_task(parse_run([*flags, f"--code={HERE}my_error"]))
    assert task.model.latents.config.autoencoder_loss.reconstruction == f"{HERE}my_error"


def test_names_of_kinds_are_those_of_the_data_sets():
    assert set(FILES) == {"text", "pairs", *OWN}
    assert set(KINDS) == {*FILES, *SYNTHETIC, *PAIRED}


def test_every_flag_that_takes_code_is_in_the_table_and_the_table_has_no_other():
    components = [x for task in TASKS for x in components_of(task_class(task)).items()]
    takes = {
        f"{component}.{f.name}"
        for component, cls in components
        for f in dataclasses.fields(cls)
        if f.metadata.get("outside")
    }
    named = set(re.findall(r"^\| `--(\S+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == takes | {"task"} and DEFAULT_TASK in TASKS


# What the tests below name.


@dataclasses.dataclass(frozen=True)
class GainConfig:
    gain: float = field(1.0, "Initial gain.")


class Gain(nn.Module):
    Config = GainConfig
    config: GainConfig
    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, noise, condition, step_size=None):
        return x * self.param("gain", nn.initializers.constant(self.config.gain), ())


class Flat(Gain):
    def __call__(self, x, noise, condition, step_size=None):
        return x.reshape(len(x), -1)


class Needy(nn.Module):
    temperature: float


class Painter(nn.Module):
    """A linear generator."""

    shape: tuple[int, ...]
    latent_dim: int

    def setup(self):
        self.layer = nn.Dense(int(np.prod(self.shape)))

    def styles(self, z, labels):
        return z

    def synthesize(self, styles, fade=1.0):
        return jnp.tanh(self.layer(styles)).reshape(-1, *self.shape)

    def __call__(self, z, labels=None):
        return self.synthesize(self.styles(z, labels))


class Judge(nn.Module):
    """A linear critic."""

    @nn.compact
    def __call__(self, x, labels=None, fade=1.0):
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


class MyVae(DenseVae):
    Config = DenseVaeConfig


class MyBernoulli(Bernoulli):
    pass


MY_HINGE = LOSSES["hinge"]


def my_sgd(schedule, config):
    return optax.sgd(schedule, momentum=config.momentum)


def my_error(x, y):
    return jnp.mean(jnp.square(x - y), tuple(range(1, x.ndim)))


def one_number(*arguments):
    return jnp.float32(0)


def split_texts(config):
    return {"train": ["a b c"] * 9, "validation": ["d e f"]}


def split_images(config):
    rng = np.random.default_rng(0)
    make = lambda n: Examples(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))
    return {"train": make(8), "validation": make(4)}


def wrong_texts(config):
    return ["a", 2]


def wrong_splits(config):
    return {"train": ["a"], "test": ["b"]}


def wrong_images(config):
    return np.zeros((4, 8, 8, 1), np.uint8)


def wrong_labels(config):
    return Examples(np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 2, 3]), classes=("a", "b"))


def losses_of(workdir) -> list[float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [value for row in rows for name, value in row.items() if name.endswith("loss")]


BATCH = "--data.batch_size=8"


def test_a_copy_of_what_is_there_trains_like_it(tmp_path):
    own = [f"--vae.network={HERE}MyVae", f"--vae.likelihood={HERE}MyBernoulli",
           f"--optimizer.name={HERE}my_sgd", "--my_vae.hidden_dim=16"]  # fmt: skip
    same = ["--vae.likelihood=bernoulli", "--optimizer.name=sgd", "--dense_vae.hidden_dim=16"]
    for name, chosen in (("own", own), ("same", same)):
        assert (
            train.main(["--task=vae", BATCH, *chosen, *SHORT, f"--workdir={tmp_path / name}"]) == 0
        )
    own, same = losses_of(tmp_path / "own"), losses_of(tmp_path / "same")
    assert own and own == pytest.approx(same, rel=1e-5)


def test_losses_of_ones_own_are_those_that_are_trained():
    task = make_task(parse_run(["--task=gan", f"--gan.loss={HERE}MY_HINGE"]))
    assert task.game.loss is LOSSES["hinge"]
    flags = ["--task=autoencoder", "--autoencoder_loss.kl_weight=0"]
    own, same = (
        make_task(parse_run([*flags, f"--autoencoder_loss.reconstruction={error}"]))
        for error in (f"{HERE}my_error", "l2")
    )
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 3, *own.data.shape))
    bottleneck = Bottleneck(None, jnp.zeros(3), jnp.zeros(3), None)
    losses = [task._total(task._terms({}, x, y, bottleneck)) for task in (own, same)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--task=gan", f"--generator.network={HERE}Painter", f"--critic.network={HERE}Judge",
         f"--data.dataset={HERE}split_images", BATCH],
        ["--task=diffusion", f"--diffusion.network={HERE}Gain", "--gain.gain=0.5", BATCH,
         f"--data.dataset={HERE}split_images", "--sampler.steps=2"],
    ],
    ids=["players", "denoiser"],
)  # fmt: skip
def test_a_network_alone_trains_and_is_sampled(tmp_path, flags):
    run = genai_jax.train([*flags, *SHORT], tmp_path)
    assert run.sample(num_samples=3).shape == (3, 8, 8, 3)


def test_documents_of_each_split():
    config = parse_run([f"--data.dataset={HERE}split_texts"])
    record = task_class("language_model")(config).data.record()
    assert (record["train_documents"], record["validation_documents"]) == (9, 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task=diffusion", "--diffusion.network=unnet"],
         r"--diffusion.network=unnet is not one of unet, dit \(did you mean unet\?\); name one of"),
        (["--task=diffusion", f"--diffusion.network={HERE}one_number"], "not a class of flax"),
        (["--task=diffusion", f"--diffusion.network={HERE}Needy"],
         "has a field temperature without a default; those that are filled are label_sizes"),
        (["--task=diffusion", f"--diffusion.network={HERE}Flat"],
         r"returns \(2, 64\) for x of shape \(2, 8, 8, 1\)"),
        (["--task=diffusion", f"--diffusion.network={HERE}Gain", "--diffusion.condition=class"],
         "has no field label_sizes, which --diffusion.condition=class needs"),
        (["--task=diffusion", f"--diffusion.network={HERE}Gain", "--dtype=bfloat16"],
         "has no field dtype, which --dtype=bfloat16 needs"),
        (["--task=diffusion", f"--diffusion.network={HERE}Gain", "--unet.channels=8"],
         "--unet.* is set, but --diffusion.network="),
        (["--task=diffusion", f"--diffusion.objective={HERE}nothing"], "has no nothing"),
        (["--task=diffusion", f"--diffusion.objective={HERE}my_error", "--diffusion.weighting=snr"],
         "--diffusion.weighting=snr has no effect with"),
        (["--task=gan", f"--gan.loss={HERE}my_error"], "is not a genai_jax.*AdversarialLoss"),
        (["--task=gan", f"--critic.network={HERE}Judge", "--critic.spectral_norm"],
         "--critic.spectral_norm=True has no effect with"),
        (["--task=gan", f"--generator.network={HERE}Judge"], "lacks styles, synthesize"),
        (["--task=vae", f"--vae.likelihood={HERE}Judge"], "is not a subclass of .*Likelihood"),
        (["--task=autoencoder", f"--autoencoder_loss.reconstruction={HERE}one_number"],
         r"returns \(\), not an error for each image"),
        ([f"--data.dataset={HERE}wrong_texts"], "document 1 is a int, not a string"),
        ([f"--data.dataset={HERE}wrong_splits"], "a mapping with train, test; the splits are"),
        ([f"--data.dataset={HERE}split_texts", "--data.validation_percent=10"],
         "has no effect: .* returned the documents of each split"),
        (["--task=vae", f"--data.dataset={HERE}wrong_images"], "returned a ndarray, not genai_jax"),
        (["--task=vae", f"--data.dataset={HERE}wrong_labels"], "has the label 3, but 2 classes"),
        (["--task=vae", "--data.dataset=no_such_module:images"], "cannot import no_such_module"),
        (["--code=my_parts"], "'my_parts' is not a name of the form my_package.my_module:Name"),
        ([f"--code={HERE}Gain,"], "'' is not a name of the form"),
        (["--optimizer.name=adam"], r"not one of adamw, .*did you mean adamw"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path, flags, said):
    with pytest.raises(ConfigError, match=said) as error:
        train.main([*flags, *SHORT, f"--workdir={tmp_path / 'run'}"])
    assert "\n" not in str(error.value)


def test_an_objective_that_returns_one_number_is_refused(tmp_path):
    flags = ["--task=diffusion", f"--diffusion.objective={HERE}one_number", BATCH]
    flags += [f"--diffusion.network={HERE}Gain", f"--workdir={tmp_path}", *SHORT]
    with pytest.raises(ConfigError, match=r"returns \(\), not a loss for each image, \(8,\)"):
        train.main(flags)
