"""The autoencoder task: its phases, its adversary, and its latents as another model uses them."""

import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.losses.adversarial import adaptive_weight
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.autoencoder.codec import kl_to_normal
from genai_jax.tasks.autoencoder.latents import Latents
from genai_jax.tasks.autoencoder.perceptual import Perceptual
from genai_jax.tasks.autoencoder.task import Autoencoder, ReconstructionRequest
from genai_jax.tasks.protocol import StepInfo
from genai_jax.training.evaluation import Evaluator
from genai_jax.training.loop import train
from genai_jax.training.restore import restore_model
from genai_jax.training.step import init_state, make_step
from genai_jax.training.transfer import initial_parts
from genai_jax.training.workdir import claim
from tests.tasks.runs import copy_until

TINY = (
    "--task=autoencoder",
    "--data.batch_size=8",
    "--autoencoder.channels=4",
    "--autoencoder.channel_multipliers=1,1",
    "--optimizer.warmup_steps=0",
    "--optimizer.schedule=constant",
)
ADVERSARIAL = (
    "--autoencoder_loss.discriminator_weight=0.5",
    "--discriminator.channels=4",
    "--discriminator.num_layers=1",
)
CODES = ("--autoencoder.latent=vq", "--quantizer.codes=16")


def make(*flags: str) -> Autoencoder:
    return Autoencoder(parse_run([*TINY, *flags]))


def moved(before: dict, after: dict) -> set[str]:
    """The groups of which any parameter changed."""

    def same(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return all(np.array_equal(x, y) for x, y in pairs)

    return {group for group in before if not same(before[group], after[group])}


def random(shapes):
    """Parameters of these shapes: nothing is 0, as a fresh residual branch would be."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def delayed():
    """A task whose discriminator starts at step 1, a state of random parameters, and a batch."""
    task = make(*ADVERSARIAL, "--autoencoder_loss.discriminator_start=1")
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda key: init_state(task, key, {}), key)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state)
    state = shapes.replace(step=np.int32(0), params=random(shapes.params), opt_state=zeros, rng=key)
    batch = task.data.loader.gather(task.data.loader.open("train"), np.arange(8))
    return task, state, batch


def test_the_discriminator_moves_alone_and_from_its_start_on(delayed):
    task, state, batch = delayed
    discriminator, _ = task.phases(state.params)
    step = jax.jit(make_step((discriminator,)))
    before, report = step(state, batch)
    assert moved(state.params, before.params) == set()  # not even by weight decay
    assert float(report.metrics["loss"]) == 0
    after, report = step(before, batch)
    assert moved(state.params, after.params) == {"discriminator"}
    assert float(report.metrics["loss"]) > 0


def test_the_autoencoder_moves_alone_and_hears_the_discriminator_from_its_start_on(delayed):
    task, state, batch = delayed
    _, autoencoder = task.phases(state.params)
    step = jax.jit(make_step((autoencoder,)))
    for i in range(2):
        after, report = step(state.replace(step=jnp.int32(i)), batch)
        metrics = report.metrics
        assert moved(state.params, after.params) == {"autoencoder"}
        expected = metrics["l1"] + 1e-6 * metrics["kl"] / 64
        if i:
            expected += 0.5 * metrics["adversarial_scale"] * metrics["adversarial"]
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_adversarial_weight_is_the_ratio_of_the_gradients_of_the_last_layer(delayed):
    task, state, batch = delayed
    rng = jax.random.key(1)

    @jax.jit
    def scale_and_gradients(params, mutables):
        output = task._autoencoder_loss(params, mutables, batch, StepInfo(rng, jnp.int32(1)))

        def reconstructed(kernel):
            last = {**params["autoencoder"]["last"], "kernel": kernel}
            group = {**params["autoencoder"], "last": last}
            x = task.data.scaled(batch["image"])
            latents = task.codec.bottleneck(group, mutables, x, rng)[0].latents
            return x, task.codec.output(group, task.codec.hidden(group, latents))

        def l1(kernel):
            x, y = reconstructed(kernel)
            return jnp.mean(jnp.abs(x - y))

        def fooling(kernel):
            verdict = {"params": params["discriminator"]}
            return -jnp.mean(task.discriminator.apply(verdict, reconstructed(kernel)[1]))

        kernel = params["autoencoder"]["last"]["kernel"]
        return output.metrics["adversarial_scale"], jax.grad(l1)(kernel), jax.grad(fooling)(kernel)

    scale, *gradients = scale_and_gradients(state.params, state.mutables)
    first, second = (np.linalg.norm(g) for g in gradients)
    assert float(scale) == pytest.approx(first / (second + 1e-4), rel=1e-4)
    assert float(adaptive_weight(jnp.array([3.0, 4.0]), jnp.zeros(2))) == 1e4


def test_losses_with_closed_forms():
    kl = kl_to_normal(jnp.array([[1.0, 0.0]]), jnp.log(jnp.array([[1.0, 4.0]])))
    assert float(kl[0]) == pytest.approx(0.5 + (4 - 1 - math.log(4)) / 2)


def test_the_perceptual_distance_is_zero_for_equal_images_alone(tmp_path):
    flags = ("--task=image_classifier", "--classifier.channels=4", "--classifier.num_stages=2")
    (tmp_path / "flags.txt").write_text("\n".join(flags) + "\n")
    perceptual = Perceptual(str(tmp_path), make().data)
    params = random(jax.eval_shape(perceptual.init, jax.random.key(0)))
    x, y = np.random.default_rng(1).uniform(-1, 1, (2, 3, 8, 8, 1)).astype(np.float32)
    y[2] = x[2]
    measure = lambda y: jnp.sum(perceptual.distance(params, x, y))
    gradient = jax.jit(jax.grad(measure))(y)
    distances = jax.jit(perceptual.distance)(params, x, y)
    assert distances.shape == (3,) and float(distances[2]) == 0
    assert np.all((distances[:2] > 0) & (distances[:2] <= 4))
    sizes = np.abs(gradient).max((1, 2, 3))
    assert np.all(sizes[:2] > 1e-4) and sizes[2] < 1e-6


def run_to(workdir, steps: int, *flags: str):
    """Trains in `workdir` to a step; returns the task and what was saved."""
    shared = (f"--workdir={workdir}", "--train.progress=false", "--eval.batches=1")
    config = parse_run([*TINY, *CODES, *shared, f"--train.steps={steps}", *flags])
    claim(config)
    task = Autoencoder(config)
    assert train(task, config) == 0
    return task, restore_model(task, config, ema="0.5")


EMA = ("--ema.decay=0.5", "--checkpoint.every=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "vq"
    return workdir, *run_to(workdir, 4, *EMA)


def test_a_resumed_run_has_the_same_codebook_bit_for_bit(run, tmp_path):
    whole, _, straight = run
    copy_until(whole, 2, tmp_path)
    _, resumed = run_to(tmp_path, 4, *EMA)
    assert bool(resumed.mutables["codebooks"].started.all())
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scores_and_pictures(run, tmp_path):
    _, task, model = run
    scores = Evaluator(task)(model.params, model.mutables, task.data.held_out(2))
    assert scores["images"] == 16 and 0 < scores["usage"] <= 1 <= scores["perplexity"] <= 16
    assert scores["psnr"] == pytest.approx(10 * math.log10(4 / scores["mse"]))
    assert scores["loss"] == pytest.approx(scores["l1"] + 0.25 * scores["commitment"])
    files = task.sample(model.params, model.mutables, ReconstructionRequest(num_samples=4))
    (path,) = files.write("", tmp_path)
    assert path.endswith("reconstructions.png")


def begun(latents: Latents, task: Autoencoder) -> dict:
    """The two groups as a run that uses them begins."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(latents.init, jax.random.key(0)),
    )
    state = types.SimpleNamespace(params=shapes, mutables={})
    return initial_parts(latents, task.config, state, state)["params"]


def test_latents_are_of_zero_mean_and_unit_variance_and_decode_as_the_autoencoder_does(run):
    workdir, task, model = run
    latents = Latents(str(workdir), task.data)
    params = begun(latents, task)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(jax.eval_shape(latents.init, jax.random.key(0))) == shapes(params)
    images = task.data.loader.examples("train", 2048)["image"]
    x = task.data.scaled(jnp.asarray(images))

    @jax.jit
    def both(x):
        z = latents.encode(params, x)
        plain = task.encode(model.params, model.mutables, x)
        decoded = latents.decode(params, z), task.decode(model.params, model.mutables, plain)
        return z, *decoded

    z, decoded, expected = both(x)
    assert z.shape[1:] == latents.shape == (4, 4, 4) and z.dtype == jnp.float32
    np.testing.assert_allclose(jnp.mean(z, (0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(jnp.std(z, (0, 1, 2)), 1, atol=0.02)
    np.testing.assert_allclose(decoded, expected, atol=1e-5)
    assert float(jnp.abs(decoded).max()) <= 1


def test_a_mask_shrinks_to_where_all_pixels_are_known(run):
    workdir, task, _ = run
    mask = jnp.ones((1, 8, 8, 1)).at[0, 3, 4, 0].set(0)
    shrunk = Latents(str(workdir), task.data).shrink_mask(mask)
    assert shrunk.shape == (1, 4, 4, 1)
    assert float(shrunk[0, 1, 2, 0]) == 0 and float(shrunk.sum()) == 15


def test_a_workdir_that_does_not_fit_is_refused(run, tmp_path):
    workdir, task, _ = run
    other = ArrayData(task.config.replace("data", dataset="shapes"))
    with pytest.raises(ConfigError, match=r"vq was trained on .*\[8, 8, 1\].* has \[32, 32, 3\]"):
        Latents(str(workdir), other)
    with pytest.raises(ConfigError, match=r"no run in --diffusion.autoencoder="):
        Latents(str(tmp_path), task.data)
    (tmp_path / "flags.txt").write_text("--task=language_model\n")
    with pytest.raises(ConfigError, match="is a run of --task=language_model, not autoencoder"):
        Latents(str(tmp_path), task.data)
    shutil.copy(workdir / "flags.txt", tmp_path)
    unsaved = Latents(str(tmp_path), task.data)  # enough for a run that has its own checkpoint
    with pytest.raises(ConfigError, match="no checkpoint in"):
        begun(unsaved, task)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--autoencoder.latent=vq", "--quantizer.codes=129"), "129 is more than the 128 vectors"),
        (("--autoencoder.channel_multipliers=1,1,1,1,1",), "size 8x8 is not a multiple of 16x16"),
        (("--quantizer.codes=8",), "--quantizer.codes=8 is for .*latent=vq or rvq, not kl"),
        ((*CODES, "--quantizer.codebooks=2"), "codebooks=2 is for .*latent=rvq, not vq"),
        ((*CODES, "--autoencoder_loss.kl_weight=1"), "kl_weight=1.0 is only for .*latent=kl"),
        (
            ("--autoencoder_loss.perceptual_weight=2",),
            "perceptual_weight=2.0 is only for",
        ),
        (("--autoencoder.latent=fsq", "--quantizer.levels=5,5"), "latent_channels=4 must equal"),
        (("--discriminator.channels=8",), "discriminator_weight=0"),
        ((*ADVERSARIAL, "--autoencoder_loss.discriminator_start=1000"), "not below --train.steps"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_bad_flags_are_refused_in_one_line(flags, said):
    with pytest.raises(ConfigError, match=said) as error:
        make(*flags)
    assert "\n" not in str(error.value)
