"""Adversarial training of images: who moves when, growing, augmentation, and real runs."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax import evaluate, sample
from genai_jax.components import parse_run, read_config
from genai_jax.config import ConfigError
from genai_jax.losses.adversarial import LOSSES
from genai_jax.metrics.energy_distance import energy_distance
from genai_jax.tasks.gan.augmentation import KINDS, AugmentationConfig, augment, steered
from genai_jax.tasks.gan.task import Gan
from genai_jax.training.restore import restore_model
from genai_jax.training.step import init_state, make_step
from tests.tasks.runs import resumed, run_to, transferred

TINY = (
    "--task=gan",
    "--data.batch_size=8",
    "--generator.channels=4",
    "--generator.latent_dim=6",
    "--critic.channels=4",
    "--optimizer.schedule=constant",
    "--optimizer.warmup_steps=0",
)
STYLE = (
    "--generator.network=style", "--generator.style_dim=5", "--generator.mapping_layers=1",
    "--critic.network=residual", "--critic.spectral_norm", "--gan.condition=class",
    "--gan.r1=1", "--gan.r1_every=2", "--gan.path_length=1", "--gan.path_length_every=3",
    "--gan.critic_updates=2", "--augmentation.kinds=translate,cutout",
    "--augmentation.target=0.5", "--augmentation.ramp_images=64",
)  # fmt: skip


def make(*flags: str) -> Gan:
    return Gan(parse_run([*TINY, *flags]))


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_each_phase_leaves_the_other_player_bit_identical():
    task = make(*STYLE)
    rng = np.random.default_rng(0)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda key: init_state(task, key, {}), key)
    fill = lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32)
    zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
    spectral = jax.tree.map(fill, shapes.mutables["spectral"])
    state = shapes.replace(
        step=np.int32(0), params=jax.tree.map(fill, shapes.params), rng=key,
        mutables={**zeros(shapes.mutables), "spectral": spectral},
        opt_state=zeros(shapes.opt_state),
    )  # fmt: skip
    batch = task.data.loader.gather(task.data.loader.open("train"), np.arange(8))
    phases = task.phases(state.params)
    assert [p.name for p in phases] == ["critic", "r1", "generator", "path_length"]
    for phase in phases:
        after, report = jax.jit(make_step((phase,)))(state, batch)
        other = {"critic": "generator", "generator": "critic"}[phase.slot]
        assert same(after.params[other], state.params[other])
        assert not same(after.params[phase.slot], state.params[phase.slot])
        # The vectors of the spectral norms move with the critic's own updates alone.
        moved = not same(after.mutables["spectral"], spectral)
        assert moved == (phase.name == "critic")
        penalties = [float(v) for n, v in report.metrics.items() if n.endswith("penalty")]
        assert len(penalties) == (phase.every > 1) and all(v > 0 for v in penalties)


@pytest.mark.parametrize("name", KINDS)
def test_augmentations_change_images_where_their_coin_falls(name):
    config = AugmentationConfig(kinds=name, probability=0.5)
    x = np.random.default_rng(0).uniform(-1, 1, (64, 8, 8, 1)).astype(np.float32)
    change = jax.jit(lambda x, p, key: augment(config, x, p, key))
    np.testing.assert_array_equal(change(x, 0.0, jax.random.key(0)), x)
    y = change(x, 0.5, jax.random.key(0))
    share = np.mean(np.any(np.abs(y - x) > 1e-6, (1, 2, 3)))
    assert y.shape == x.shape and np.isfinite(y).all()
    assert (0.1 if name in ("flip", "rotate") else 0.25) < share < 0.75
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(change(x, 0.5, jax.random.key(0)) ** 2)))(x)
    assert np.any(gradient != 0)


def test_the_probability_follows_how_sure_the_critic_is():
    config = AugmentationConfig(kinds="flip", target=0.5, ramp_images=100)
    sure, unsure = jnp.ones(10), jnp.array([1.0, -1.0] * 5)
    assert float(steered(config, 0.2, sure)) == pytest.approx(0.3)
    assert float(steered(config, 0.2, unsure)) == pytest.approx(0.1)
    assert float(steered(config, 0.02, unsure)) == 0.0
    halves = jnp.full(10, 0.5)  # what a least-squares critic says that cannot tell
    undecided = LOSSES["least_squares"].undecided
    assert float(steered(config, 0.2, halves, undecided)) == pytest.approx(0.1)
    fixed = AugmentationConfig(kinds="flip", probability=0.2)
    assert steered(fixed, 0.2, sure) == 0.2


def test_the_energy_distance_tells_distributions_apart():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 400, 3))
    assert abs(energy_distance(x, y)) < 0.02
    assert energy_distance(x, y + 1) > 0.5
    # Two points at distance d, twice each: 2 d - 0 - 0.
    assert energy_distance(np.zeros((2, 1)), np.full((2, 1), 3.0)) == 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("gan") / "whole"
    flags = (*STYLE, "--ema.decay=0.5", "--ema.use=0.5", "--eval.batches=2", "--checkpoint.every=4")
    return workdir, flags, run_to(workdir, 6, *TINY, *flags)


def test_a_resumed_run_is_the_same_bit_for_bit(whole, tmp_path):
    """Parameters, averages, spectral vectors and means; metrics show both optimizers."""
    workdir, flags, rows = whole
    assert resumed(workdir, 4, tmp_path, 6, *TINY, *flags) == rows and len(rows) == 6
    models = []
    for folder in (workdir, tmp_path):
        config = read_config(str(folder))
        models.append([restore_model(Gan(config), config, ema=name) for name in ("none", "0.5")])
    for one, other in zip(*models, strict=True):
        assert same((one.params, one.mutables), (other.params, other.mutables))
    assert not same(models[0][0].params, models[0][1].params)
    assert models[0][0].mutables["style_mean"].any() and models[0][0].mutables["augmented"] >= 0
    for name, every in (("r1", 2), ("path_length", 3)):
        shown = [row[f"train/{name}/loss"] for row in rows]
        new = [i for i in range(6) if i == 0 or shown[i] != shown[i - 1]]
        assert new == list(range(0, 6, every))  # the others repeat what was seen last


def test_a_run_is_scored_and_shown(whole, tmp_path, capsys):
    workdir, *_ = whole
    capsys.readouterr()
    assert (workdir / "plots" / "verdicts.png").exists()
    assert evaluate.main([f"--workdir={workdir}", "--batches=2"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 16 and np.isfinite(scores["loss"])
    z = tmp_path / "z.npy"
    np.save(z, np.zeros((3, 6)))
    requests = (
        ("--num_samples=3", "--label=7"),
        (f"--latents={z}", "--truncation=0.5"),
        ("--show=interpolation", "--num_samples=2", "--columns=3", "--path=linear"),
        ("--show=truncation", "--num_samples=2", "--columns=3"),
    )
    for request in requests:
        assert sample.main([f"--workdir={workdir}", *request]) == 0
        written = pathlib.Path(capsys.readouterr().out.strip())
        assert written.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"--seed=1: the file --latents=.* sets the latents"):
        sample.main([f"--workdir={workdir}", f"--latents={z}", "--seed=1"])
    np.save(z, np.zeros((3, 7)))
    with pytest.raises(ConfigError, match=r"z.npy holds float64 \[3, 7\]; .* of shape \[n, 6\]"):
        sample.main([f"--workdir={workdir}", f"--latents={z}"])
    with pytest.raises(ConfigError, match=r"--num_samples=20 is for sampled images"):
        evaluate.main([f"--workdir={workdir}", "--num_samples=20"])
    with pytest.raises(ConfigError, match=r"--truncation=0.5 is for --show=draws or inter"):
        sample.main([f"--workdir={workdir}", "--show=truncation", "--truncation=0.5"])


def test_a_run_grows_from_one_on_smaller_images(tmp_path):
    base = ("--generator.base_height=8", "--critic.base_height=8", "--data.dataset=shapes")
    still = (*base, "--eval.batches=0", "--optimizer.learning_rate=0", "--ema.decay=0.5")
    small = ("--data.image_size=16", "--generator.channels=8", "--critic.channels=8")
    run_to(tmp_path / "small", 1, *TINY, *still, *small)
    grow = (*still, "--data.image_size=32", f"--gan.grow_from={tmp_path / 'small'}")
    fading = (*grow, "--gan.fade_steps=2")
    run_to(tmp_path / "large", 2, *TINY, *fading)
    small, *large = (
        restore_model(Gan(config), config, ema=ema).params
        for name, ema in (("small", "none"), ("large", "none"), ("large", "0.5"))
        for config in [read_config(str(tmp_path / name))]
    )
    for params in large:  # nothing was learned, so that it is what the run began with
        for group, block in (("generator", "block_16"), ("critic", "conv_last")):
            assert same(params[group][block], small[group][block])
        assert {"block_16", "block_32", "to_image_16"} < set(params["generator"])
    task = make(*fading)
    assert "block_32" not in transferred(task)["generator"]
    assert [float(task._fade(step)) for step in (0, 1, 2, 5)] == [0, 0.5, 1, 1]
    with pytest.raises(ConfigError, match=r"has shape .* half the channels at twice the size"):
        make(*fading, "--generator.channels=8").init_from()
    with pytest.raises(ConfigError, match=r"small has .*, which this run lacks"):
        make(*fading, "--critic.network=residual").init_from()
    with pytest.raises(ConfigError, match=r"fade_steps=2 is above --train.steps=1"):
        make(*fading, "--train.steps=1")
    with pytest.raises(ConfigError, match=r"was trained on images of .* grows from 32x32"):
        make(*fading, "--data.image_size=64").init_from()


def test_a_penalty_that_is_not_finite_stops_the_run(tmp_path):
    said = r"(loss is inf|grad_norm is (nan|inf)) at step 1 in phase r1; no checkpoint is"
    with pytest.raises(ConfigError, match=said) as error:
        run_to(tmp_path, 5, *TINY, "--gan.r1=1e38", "--gan.r1_every=2", "--eval.batches=0")
    assert "\n" not in str(error.value)


def test_a_collapsed_critic_stops_the_run(tmp_path, monkeypatch):
    """Constant verdicts, whatever it is shown."""
    monkeypatch.setattr(Gan, "_judge", lambda self, p, m, x, *_: 0 * x[:, 0, 0, 0] + 1.0)
    said = "every verdict of the critic is the same at step 1 in phase critic"
    with pytest.raises(ConfigError, match=said):
        run_to(tmp_path, 3, *TINY, "--eval.batches=0")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gan.critic_updates=0",), "gan.critic_updates"),
        (
            ("--gan.loss=wasserstein", "--augmentation.kinds=flip", "--augmentation.target=0.6"),
            "how certain the critic is, which needs .*, not wasserstein",
        ),
        (("--gan.r1=1", "--gan.r1_every=1000"), "--gan.r1_every=1000 is not below --train.steps"),
        (("--generator.base_height=3",), "--generator.base_height=3: doubling it does not lead"),
        (("--critic.base_height=5",), "--critic.base_height=5: doubling it does not lead"),
        (("--generator.style_dim=8",), "--generator.style_dim=8 is for --generator.network=style"),
        (("--augmentation.kinds=flip",), "needs --augmentation.probability above 0"),
        (
            (
                "--augmentation.kinds=flip",
                "--augmentation.probability=0.1",
                "--augmentation.ramp_images=9",
            ),
            "--augmentation.ramp_images=9 needs --augmentation.target",
        ),
        (("--augmentation.kinds=twist", "--augmentation.probability=0.1"), "'twist' is not one of"),
        (("--gan.fade_steps=3",), "a run that grows needs both"),
        (("--gan.r1=nan",), "gan.r1=nan: must be a finite number"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_bad_flags_are_refused_in_one_line(flags, said):
    with pytest.raises(ConfigError, match=said) as error:
        make(*flags)
    assert "\n" not in str(error.value)
