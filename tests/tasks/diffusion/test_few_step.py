"""Models that sample in few steps: targets in closed form, and the task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax import train
from genai_jax.components import make_task, read_config
from genai_jax.config import ConfigError
from genai_jax.diffusion import few_step
from genai_jax.diffusion import schedule as schedules
from genai_jax.tasks.diffusion.sampling import Sampler
from genai_jax.tasks.protocol import StepInfo
from genai_jax.training.restore import restore_model
from tests.tasks.diffusion.test_diffusion import (
    TINY_DIT,
    batch_of,
    random_params,
    samples_of,
    task_of,
)
from tests.tasks.runs import transferred

MEAN, STD = 0.5, 0.3


def gaussian(schedule):
    """The exact denoiser of normal data."""

    def denoise(x, t):
        alpha, sigma = (f(t)[:, None] for f in (schedule.alpha, schedule.sigma))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return denoise


def test_one_step_to_the_target_of_two_lands_where_two_steps_do():
    schedule = schedules.cosine()
    teacher = gaussian(schedule)
    x = jax.random.normal(jax.random.key(0), (5, 3))
    t = jnp.linspace(0.4, 0.9, 5)
    s = t - 0.2
    target = few_step.two_step_target(teacher, schedule, x, t, s)
    once = few_step.ddim_step(lambda x, t: target, schedule, x, t, s)
    middle = few_step.ddim_step(teacher, schedule, x, t, t - 0.1)
    twice = few_step.ddim_step(teacher, schedule, middle, t - 0.1, s)
    np.testing.assert_allclose(once, twice, atol=1e-5)


def test_the_exact_consistency_function_has_nearly_no_loss_and_the_denoiser_has():
    """Of normal data the end of the ODE is known: the same quantile of the data."""
    schedule = schedules.edm(sigma_min=1e-3, sigma_max=5.0)

    def end(x, t):
        sigma = schedule.sigma(t)[:, None]
        return MEAN + (x - MEAN) * STD / jnp.sqrt(STD**2 + sigma**2)

    x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (512, 1))
    t = jax.random.uniform(jax.random.key(1), (512,))

    def loss(student, teacher):
        return float(
            jnp.mean(
                few_step.consistency_loss(
                    student, teacher, schedule, x0, t, jax.random.key(2), intervals=jnp.int32(500)
                )
            )
        )

    exact, wrong = loss(end, gaussian(schedule)), loss(lambda x, t: 0.9 * x, gaussian(schedule))
    assert exact < 0.02 * wrong


def test_the_number_of_intervals_doubles_from_first_to_last():
    steps = jnp.arange(0, 1000, 250)
    intervals = [int(few_step.consistency_steps(k, 1000, 10, 80)) for k in steps]
    assert intervals == [10, 20, 40, 80]


def test_shortcut_loss_is_zero_for_a_straight_flow_and_asks_the_right_questions():
    """All data in one point: the velocity (x - x0) / t is constant on every path."""
    x0 = jnp.full((8, 4), 0.3)
    asked = []

    def predict(x, t, step_size):
        asked.append((np.asarray(t), np.asarray(step_size)))
        return (x - 0.3) / t[:, None]

    t = jnp.linspace(0.1, 0.9, 8)
    losses = few_step.shortcut_loss(
        predict, predict, x0, t, jax.random.key(0), finest=16, bootstrap=4
    )
    np.testing.assert_allclose(losses, 0, atol=1e-8)
    (times, _), (middle, _), (whole, sizes) = asked
    doubled = sizes[4:]
    np.testing.assert_allclose(times - middle, doubled / 2, atol=1e-6)
    np.testing.assert_allclose(times / doubled, np.round(times / doubled), atol=1e-5)
    assert np.all(sizes[:4] == 0) and np.all(doubled >= 2 / 16) and np.all(times <= 1)
    np.testing.assert_array_equal(whole[:4], t[:4])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """The workdir of a model of a few steps."""
    workdir = str(tmp_path_factory.mktemp("teacher"))
    flags = [
        "--diffusion.condition=class",
        "--train.steps=2",
        "--eval.batches=0",
        "--train.progress=false",
        "--ema.decay=0.5",
    ]
    assert train.main([*TINY_DIT, *flags, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_weaker_model_guides_a_stronger_one(teacher):
    """Autoguidance by the workdir of a run; by the model itself it changes nothing."""
    task = task_of("--diffusion.condition=class")
    settings, sampled = task.config.sampler, task.sampled_model()
    labels = task.model.condition(labels=np.array([[1], [2]], np.int32))

    def samples(params, **changes):
        sampler = Sampler(sampled, dataclasses.replace(settings, **changes))
        return sampler.sample(params, jax.random.key(0), 2, labels)[0]

    params = random_params(task)
    plain = samples(params)
    assert np.any(samples(params, guidance=2.0, weak=teacher) != plain)
    own = Sampler(sampled, dataclasses.replace(settings, guidance=2.0, weak=teacher))
    own.weak = params
    difference = own.sample(params, jax.random.key(0), 2, labels)[0].astype(int) - plain
    assert np.abs(difference).max() <= 1
    with pytest.raises(ConfigError, match=r"has --diffusion.schedule=.*, but this run has"):
        other = task_of(
            "--diffusion.condition=class", "--diffusion.schedule=sigmoid"
        ).sampled_model()
        Sampler(other, dataclasses.replace(settings, guidance=2.0, weak=teacher))


METHODS = {
    "progressive": ("--few_step.steps=4", "--sampler.solver=ddim", "--sampler.steps=4"),
    "consistency_distillation": ("--sampler.solver=consistency", "--sampler.steps=2"),
    "consistency_training": ("--sampler.solver=consistency", "--sampler.steps=2"),
    "shortcut": (
        "--diffusion.schedule=flow", "--diffusion.parameterization=velocity",
        "--sampler.solver=euler", "--sampler.steps=2",
    ),
}  # fmt: skip


def few_step_task(method: str, teacher: str, *flags: str):
    taught = [f"--few_step.teacher={teacher}"] if "dist" in method or "prog" in method else []
    return task_of(
        "--task=few_step",
        "--diffusion.condition=class",
        f"--few_step.method={method}",
        *taught,
        *METHODS[method],
        *flags,
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_its_model_alone_and_can_be_sampled(method, teacher):
    task = few_step_task(method, teacher)
    params = random_params(task)
    batch = batch_of(task)
    (phase,) = task.phases(jax.eval_shape(lambda: params))
    assert phase.trains == ("model",)

    def loss(model):
        info = StepInfo(jax.random.key(0), jnp.int32(3))
        return phase.loss({**params, "model": model}, {}, batch, info).loss

    gradient = jax.jit(jax.grad(loss))(params["model"])
    norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(gradient)]
    assert np.all(np.isfinite(norms)) and np.mean(np.array(norms) > 0) > 0.8
    assert samples_of(task, params, num_samples=2).shape == (2, 8, 8, 1)


def test_a_student_begins_as_its_teacher(teacher):
    task = few_step_task("progressive", teacher)
    groups, config = transferred(task), read_config(teacher)
    average = restore_model(make_task(config), config, ema="0.5").params["model"]
    for group in ("model", "teacher"):
        jax.tree.map(np.testing.assert_array_equal, groups[group], average)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--few_step.finest=12",), "finest=12 is not a power of two"),
        (("--few_step.method=progressive",), "progressive needs a --few_step.teacher"),
        (("--few_step.method=shortcut", "--few_step.teacher=x"), "does not use a --few"),
        (("--few_step.method=shortcut",), "is for --diffusion.schedule=flow"),
    ],
)
def test_settings_that_contradict_each_other(flags, said):
    with pytest.raises(ConfigError, match=said):
        task_of("--task=few_step", *flags)


def test_a_teacher_of_another_shape_is_refused(teacher):
    with pytest.raises(ConfigError, match=r"--dit.\* differs from the teacher"):
        few_step_task("progressive", teacher, "--dit.embed_dim=32")
    with pytest.raises(ConfigError, match=r"schedule=edm, but the teacher"):
        few_step_task("progressive", teacher, "--diffusion.schedule=edm")


def test_solvers_that_a_method_was_not_trained_for(teacher):
    task = few_step_task("progressive", teacher)
    for changes in ({"steps": 3}, {"solver": "heun"}):
        with pytest.raises(ConfigError, match=r"was distilled for ddim in 4 step"):
            task.check_sampler(dataclasses.replace(task.config.sampler, **changes))
    shortcut = few_step_task("shortcut", "")
    with pytest.raises(ConfigError, match="a number of steps that is a power"):
        shortcut.check_sampler(dataclasses.replace(shortcut.config.sampler, steps=3))


def test_a_share_of_the_examples_that_rounds_to_none_is_refused():
    shortcut = (
        "--task=few_step", "--few_step.method=shortcut", "--diffusion.schedule=flow",
        "--diffusion.parameterization=velocity", "--data.batch_size=4",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"bootstrap=0\.25 of the 2 example\(s\) .* or 0$"):
        task_of(*shortcut, "--train.accumulate=2")
    task = task_of(*shortcut, "--few_step.bootstrap=0")
    (phase,) = task.phases(jax.eval_shape(task.init, jax.random.key(0))[0])
    loss = lambda params, batch: phase.loss(params, {}, batch, StepInfo(jax.random.key(0), 0)).loss
    assert np.isfinite(jax.jit(loss)(random_params(task), batch_of(task)))
