"""The diffusion task: its conditions, its objectives, its latents' place, how it is sampled."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax import evaluate, sample, train
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion.parameterization import PARAMETERIZATIONS, convert
from genai_jax.diffusion.steps import eps_of, intervals
from genai_jax.diffusion.times import inverse_grid, time_grid
from genai_jax.sampled import Arrays
from genai_jax.tasks.diffusion.model import BOUNDED, DiffusionConfig, fixed_schedule
from genai_jax.tasks.diffusion.sampler_flags import DiffusionRequest
from genai_jax.tasks.diffusion.sampling import Sampler, requested_condition, sample_request
from genai_jax.tasks.diffusion.scores import ScoreRequest, likelihood
from genai_jax.tasks.diffusion.task import Diffusion
from genai_jax.tasks.protocol import StepInfo
from genai_jax.tasks.registry import task_class

TINY_DIT = (
    "--task=diffusion",
    "--data.batch_size=8",
    "--diffusion.network=dit",
    "--dit.num_layers=1",
    "--dit.embed_dim=16",
    "--dit.num_heads=2",
    "--dit.patch_size=4",
    "--sampler.steps=3",
)


def task_of(*flags: str):
    config = parse_run([*TINY_DIT, *flags])
    return make_task(config)


def random_params(task) -> dict:
    """Random parameters: a fresh network puts out 0, whatever it is given."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


def batch_of(task) -> dict:
    return next(iter(task.data.held_out(1)))


@pytest.fixture(scope="module")
def conditional():
    return task_of("--diffusion.condition=class")


@pytest.fixture(scope="module")
def params(conditional):
    return random_params(conditional)


@pytest.mark.parametrize(
    "flags",
    [
        ("--diffusion.parameterization=eps", "--diffusion.weighting=min_snr"),
        (
            "--diffusion.schedule=edm", "--diffusion.parameterization=edm",
            "--diffusion.weighting=edm", "--diffusion.time_distribution=log_normal",
        ),
        (
            "--diffusion.objective=bound", "--diffusion.schedule=learned",
            "--diffusion.parameterization=eps",
        ),
        (
            "--diffusion.objective=flow_matching", "--diffusion.schedule=flow",
            "--diffusion.parameterization=velocity",
        ),
        ("--diffusion.zero_terminal_snr", "--diffusion.num_times=50"),
        ("--data.captions", "--diffusion.condition=text", "--data.caption_length=20"),
    ],
    ids=["eps", "edm", "bound", "flow", "discrete", "text"],
)  # fmt: skip
def test_every_objective_has_a_finite_loss_whose_gradient_reaches_all_that_is_trained(flags):
    task = task_of(*flags)
    params = random_params(task)
    batch = batch_of(task)
    (phase,) = task.phases(jax.eval_shape(lambda: params))
    trained = {g: params[g] for g in phase.trains}

    def loss(trained):
        info = StepInfo(jax.random.key(2), jnp.int32(0))
        return phase.loss({**params, **trained}, {}, batch, info).loss

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    assert np.isfinite(value)
    norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(gradient)]
    assert np.all(np.isfinite(norms)) and np.mean(np.array(norms) > 0) > 0.9
    if "schedule" in phase.trains:
        assert float(jnp.abs(gradient["schedule"]["hidden"]).max()) > 0


def test_a_dropped_condition_is_the_null_condition(conditional):
    model = task_of("--diffusion.condition=class", "--diffusion.condition_dropout=1").model
    condition = model.condition(labels=jnp.array([[3], [4]]))
    assert np.all(np.asarray(model.dropped(condition, jax.random.key(0)).labels) == 10)
    none = task_of("--diffusion.condition=class", "--diffusion.condition_dropout=0").model
    assert np.all(np.asarray(none.dropped(condition, jax.random.key(0)).labels) == [[3], [4]])


def test_guidance_1_is_the_conditional_model_and_0_the_unconditional_bit_for_bit(
    conditional, params
):
    labels = np.array([[3], [7]], np.int32)
    sampled, condition = conditional.sampled_model(), conditional.model.condition(labels=labels)
    samples = {}
    for weight in (1.0, 0.0, 2.0):
        settings = dataclasses.replace(conditional.config.sampler, guidance=weight)
        sampler = Sampler(sampled, settings)
        samples[weight] = sampler.sample(params, jax.random.key(0), 2, condition)[0]
    plain = Sampler(sampled, conditional.config.sampler)
    null = conditional.model.null_condition(2)
    unconditional = plain.sample(params, jax.random.key(0), 2, null)[0]
    np.testing.assert_array_equal(samples[0.0], unconditional)
    assert np.any(samples[2.0] != samples[1.0])


def test_samples_depend_on_the_seed_and_a_batch_is_sampled_in_parts(conditional, params):
    settings = dataclasses.replace(conditional.config.sampler, batch_size=2, steps=8)
    sampler = Sampler(conditional.sampled_model(), settings)
    labels = conditional.model.condition(labels=np.array([[0], [1], [2]], np.int32))

    def sample(seed):
        return sampler.sample(params, jax.random.key(seed), 3, labels, strip=True)

    first, strip = sample(0)
    assert first.shape == (3, 8, 8, 1) and first.dtype == np.uint8 and first.max() <= 16
    assert strip.shape == (2, 9, 8, 8, 1)
    np.testing.assert_array_equal(sample(0)[0], first)
    assert np.any(sample(1)[0] != first)
    assert sampler._program(2, False, True)._cache_size() == 1  # one compilation serves all


def write_png(path, values):
    from PIL import Image

    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return str(path)


def samples_of(task, params, **request) -> np.ndarray:
    """The images that a request of the sample command writes."""
    return sampled_of(task, params, **request).values


def sampled_of(task, params, **request) -> Arrays:
    request = DiffusionRequest(workdir="x", **request)
    return sample_request(task.sampled_model(), params, request)


def test_a_masked_sample_keeps_what_is_not_masked(conditional, params, tmp_path):
    image = batch_of(conditional)["image"][0]
    known = write_png(tmp_path / "image.png", np.round(image[..., 0] * (255 / 16)))
    white = np.zeros((8, 8))
    white[:, 4:] = 255
    mask = write_png(tmp_path / "mask.png", white)
    images = samples_of(conditional, params, num_samples=2, init_image=known, mask=mask)
    np.testing.assert_array_equal(images[:, :, :4], np.stack([image[:, :4]] * 2))
    assert np.any(images[:, :, 4:] != image[:, 4:])


def test_a_start_near_the_data_stays_near_the_image(conditional, params, tmp_path):
    image = batch_of(conditional)["image"][0]
    known = write_png(tmp_path / "image.png", np.round(image[..., 0] * (255 / 16)))

    def distance(strength):
        request = dict(num_samples=4, init_image=known, strength=strength)
        request |= {"steps": 8} if strength else {}
        samples = samples_of(conditional, params, **request)
        return np.mean(np.abs(samples.astype(float) - image))

    assert distance(0) == 0
    assert distance(0.02) < 0.5 < distance(0.9)


def test_pictures_say_what_they_show(conditional, params, tmp_path):
    image = batch_of(conditional)["image"][0]
    known = write_png(tmp_path / "image.png", np.round(image[..., 0] * (255 / 16)))
    edits = sampled_of(conditional, params, num_samples=2, init_image=known, steps=8, strip=True)
    np.testing.assert_array_equal(edits.original, image)
    assert edits.around.title == "strength 0.6" and edits.strip_around.rows == ()
    assert edits.strip_around.columns[0] == "t=0.60" and edits.strip_around.columns[-1] == "t=0.00"
    request = dict(num_samples=3, label="4,2", guidance=1.5, steps=2, strip=True)
    samples = sampled_of(conditional, params, **request)
    assert samples.original is None and samples.around.title == "guidance 1.5"
    assert samples.strip_around.rows == ("4", "2", "4")
    assert samples.strip_around.columns == ("t=1.00", "t=0.50", "t=0.00")  # each state once
    assert samples.strip.shape[:2] == (3, 3)
    walk = sampled_of(conditional, params, num_samples=5, init_image=known, interpolate_to=known)
    assert walk.columns == 5 and walk.around.columns == ("0", "0.25", "0.5", "0.75", "1")
    for kind in (edits, samples, walk):
        assert len(kind.write(str(tmp_path / "x.png"), tmp_path)) == 1 + (kind.strip is not None)


def test_an_edit_of_an_image_asks_for_no_class_unless_one_is_given(conditional):
    labels = lambda model, **flags: (
        requested_condition(
            model, DiffusionRequest(workdir="x", init_image="x.png", num_samples=3, **flags)
        ).condition.labels
    )
    np.testing.assert_array_equal(labels(conditional.model), [[10]] * 3)
    np.testing.assert_array_equal(labels(conditional.model, label="4"), [[4]] * 3)
    always = task_of("--diffusion.condition=class", "--diffusion.condition_dropout=0")
    with pytest.raises(ConfigError, match="--init_image needs --label: with"):
        labels(always.model)


def test_samples_that_are_not_finite_are_not_written(conditional, params):
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(ConfigError, match="2 of 2 samples have values that are not finite"):
        samples_of(conditional, broken, num_samples=2)


@pytest.mark.parametrize("name", [n for n in BOUNDED if n != "learned"])
def test_a_schedule_of_a_bound_has_a_finite_log_snr_at_both_ends(name):
    ends = schedules.SCHEDULES[name]().log_snr(jnp.array([0, 1], jnp.float32))
    assert np.all(np.isfinite(ends)) and ends[0] > ends[1]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_whatever_is_accepted_gives_finite_data_and_noise_at_every_time(zero_terminal_snr):
    x, output = jax.random.normal(jax.random.key(0), (2, 4, 3))  # one for each time
    accepted = 0
    names = ("vp_linear", "cosine", "sigmoid") if zero_terminal_snr else schedules.SCHEDULES
    for name, parameterization in itertools.product(names, PARAMETERIZATIONS):
        chosen = DiffusionConfig(
            schedule=name, parameterization=parameterization, zero_terminal_snr=zero_terminal_snr
        )
        try:
            schedule = fixed_schedule(chosen)
        except ConfigError:
            assert parameterization in ("eps", "score", *(("velocity",) * zero_terminal_snr))
            continue
        accepted += 1
        times = time_grid(schedule, 4)
        for grid in (times, inverse_grid(schedule, times)):
            steps = intervals(schedule, grid)
            x0 = convert(output, parameterization, "x0", x, schedule, grid[:-1])
            eps = eps_of(x, x0, jax.tree.map(lambda a: a[:, None], steps))
            assert np.all(np.isfinite(x0)) and np.all(np.isfinite(eps)), (name, parameterization)
    assert accepted >= 3 * len(names)


def test_an_interpolation_has_as_many_images_as_asked_for(conditional, params, tmp_path):
    images = batch_of(conditional)["image"]
    paths = [
        write_png(tmp_path / f"{i}.png", np.round(images[i][..., 0] * (255 / 16))) for i in (0, 1)
    ]
    request = dict(num_samples=5, init_image=paths[0], interpolate_to=paths[1])
    samples = samples_of(conditional, params, **request)
    assert samples.shape == (5, 8, 8, 1) and np.any(samples[0] != samples[-1])


def test_likelihood_is_finite_and_the_estimate_agrees_with_it(conditional, params):
    bits = {}
    for kind, probes in (("exact", 1), ("hutchinson", 64)):
        request = ScoreRequest(
            workdir="x", likelihood=kind, likelihood_steps=4, likelihood_probes=probes, batches=1
        )
        batches = conditional.data.held_out(1)
        bits[kind] = likelihood(conditional.model, params, batches, request)["ode_bits_per_dim"]
    assert np.isfinite(bits["exact"])
    assert bits["hutchinson"] == pytest.approx(bits["exact"], rel=0.02)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--unet.channels=8",), r"--unet.\* is set, but --diffusion.network=dit"),
        (("--data.captions",), "only text, needs captions"),
        (("--diffusion.objective=flow_matching",), "is for --diffusion.schedule=flow"),
        (("--diffusion.schedule=learned",), "needs --diffusion.objective=bound"),
        (("--dit.patch_size=3",), "--dit.patch_size=3 does not divide the size 8x8"),
        (("--diffusion.objective=bound", "--diffusion.schedule=edm"), "one of cosine, sigmoid"),
        (("--diffusion.zero_terminal_snr", "--diffusion.schedule=flow"), "does not apply to"),
        (
            ("--diffusion.schedule=flow", "--diffusion.parameterization=eps"),
            "does not determine the data .* use x0, v, velocity, edm$",
        ),
        (
            ("--diffusion.zero_terminal_snr", "--diffusion.parameterization=score"),
            "--diffusion.schedule=cosine does with --diffusion.zero_terminal_snr: use x0, v",
        ),
    ],
)
def test_settings_that_contradict_each_other(flags, said):
    with pytest.raises(ConfigError, match=said):
        task_of(*flags)


@pytest.mark.parametrize(
    ("request_flags", "said"),
    [
        ({"guidance": 3.0}, "guidance=3.0 needs a conditional model"),
        ({"label": "3"}, "this model's condition is none, not class"),
        ({"steps": 51}, "--steps=51 is more than the 50 times"),
        ({"guidance_interval": "1,0", "guidance": 2.0}, "needs a conditional model"),
    ],
)
def test_requests_that_an_unconditional_model_cannot_answer(request_flags, said):
    task = task_of("--diffusion.num_times=50")
    with pytest.raises(ConfigError, match=said):
        samples_of(task, {}, **request_flags)


@pytest.mark.parametrize(
    ("request_flags", "said"),
    [
        ({"label": "10"}, r"--label=10 is not one of 0, 1, .* \(or a number from 0 to 9\)"),
        ({"label": "1:2"}, "names 2 attribute"),
        ({"prompt": "a seven"}, "condition is class, not text"),
        ({"guidance_interval": "1,0", "guidance": 2.0}, "is not LOW,HIGH with LOW < HIGH"),
        ({"guidance_interval": "-1,1"}, "need a --guidance other than 1"),
    ],
)
def test_requests_that_a_class_conditional_model_cannot_answer(
    conditional, params, request_flags, said
):
    with pytest.raises(ConfigError, match=said):
        samples_of(conditional, params, num_samples=2, **request_flags)


def test_images_and_masks_of_another_size_are_refused(conditional, params, tmp_path):
    small = write_png(tmp_path / "small.png", np.zeros((4, 8)))
    colour = write_png(tmp_path / "colour.png", np.zeros((8, 8, 3)))
    right = write_png(tmp_path / "right.png", np.zeros((8, 8)))
    for request, said in (
        ({"init_image": small}, "is 4x8 with 1 channel.*8x8 with 1"),
        ({"init_image": colour}, "is 8x8 with 3 channel"),
        ({"init_image": right, "mask": small}, "--mask=.*is 4x8"),
        ({"init_image": str(tmp_path / "none.png")}, "cannot read --init_image"),
    ):
        with pytest.raises(ConfigError, match=said):
            samples_of(conditional, params, **request)
    with pytest.raises(ValueError, match="--mask needs --init_image"):
        DiffusionRequest(workdir="x", mask=right)


def test_a_video_and_a_signal_go_through_the_same_task():
    for dataset, shape in (("waves", (64, 1)), ("moving_shapes", (2, 16, 16, 3))):
        flags = [f"--data.dataset={dataset}", f"--data.image_size={shape[-2]}"]
        if dataset == "moving_shapes":
            flags.append("--data.num_frames=2")
        task = task_of(*flags)
        params = random_params(task)
        assert samples_of(task, params, num_samples=2, steps=2).shape == (2, *shape)


def test_captions_are_sampled_and_scored_by_what_they_ask_for(tmp_path, capsys):
    """A text-conditioned model, its samples and a classifier of a step, through the commands."""
    shapes = ("--data.dataset=shapes", "--data.image_size=16", "--data.batch_size=8")
    few = ("--train.steps=1", "--eval.batches=0", "--train.progress=false")
    text = ("--data.captions", "--diffusion.condition=text", "--dit.text_layers=1")
    small = ("--classifier.channels=4", "--classifier.num_stages=2", "--classifier.feature_dim=4")
    run, judge = str(tmp_path / "run"), str(tmp_path / "judge")
    assert train.main([*TINY_DIT, *shapes, *few, *text, f"--workdir={run}"]) == 0
    judged = ["--task=image_classifier", *shapes, *few, *small, f"--workdir={judge}"]
    assert train.main(judged) == 0
    picture = tmp_path / "x.png"
    flags = ["--prompt=a large red circle", "--num_samples=2", f"--output={picture}"]
    assert sample.main([f"--workdir={run}", *flags]) == 0 and picture.stat().st_size > 100
    capsys.readouterr()
    flags = [f"--classifier={judge}", "--num_samples=12", "--batches=1"]
    assert evaluate.main([f"--workdir={run}", *flags]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 <= scores["agreement"] <= scores["agreement_0"] <= 1
    assert scores["num_drawn"] == 12 and scores["fd_classifier"] > 0


def test_the_forward_pass_is_counted(conditional):
    flops = conditional.flops_per_step()["flops_per_step"]
    tokens, width = 8 * 4, 16
    dense = 2 * tokens * (4 * width**2 + 8 * width**2)  # attention and MLP of the block
    assert 3 * dense < flops < 6 * dense


def test_the_class_is_registered():
    assert task_class("diffusion") is Diffusion
