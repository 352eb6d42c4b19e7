"""Diffusion models that draw in few steps: distilled from a teacher, or trained so at once."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError, field
from genai_jax.diffusion import few_step, guidance
from genai_jax.tasks.diffusion.task import Diffusion
from genai_jax.tasks.trained_run import read_fitting, restore_to_host

TAUGHT = ("progressive", "consistency_distillation")
METHODS = (*TAUGHT, "consistency_training", "shortcut")
SAME_AS_TEACHER = (
    "network", "schedule", "zero_terminal_snr", "num_times", "parameterization", "sigma_data",
    "noise_input", "condition", "autoencoder",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FewStepConfig:
    method: str = field("consistency_training", "what the model learns", choices=METHODS)
    teacher: str = field("", "workdir of the model that is distilled, whose weights are the start")
    teacher_guidance: float = field(1.0, "classifier-free guidance of the teacher")
    steps: int = field(8, "solver steps that a progressive student is to take", minimum=1)
    first_intervals: int = field(10, "of the time grid of consistency, at first", minimum=2)
    last_intervals: int = field(160, "of the time grid of consistency, at the end", minimum=2)
    finest: int = field(128, "steps of a shortcut model at the finest, a power of two", minimum=2)
    bootstrap: float = field(
        0.25, "share of the examples that teach a shortcut its long steps", minimum=0, maximum=1
    )

    def __post_init__(self):
        if self.finest & (self.finest - 1):
            raise ValueError(f"--few_step.finest={self.finest} is not a power of two")
        if self.last_intervals < self.first_intervals:
            raise ValueError(
                f"--few_step.last_intervals={self.last_intervals} is less than "
                f"--few_step.first_intervals={self.first_intervals}"
            )
        if (self.method in TAUGHT) != bool(self.teacher):
            needs = "needs" if self.method in TAUGHT else "has no use for"
            raise ValueError(f"--few_step.method={self.method} {needs} a --few_step.teacher")


class FewStep(Diffusion):
    """The task behind ``--task=few_step``; see `genai_jax.training.phase.Task`.

    A teacher is a group of parameters that is never trained.
    """

    components: ClassVar = {**Diffusion.components, "few_step": FewStepConfig}

    def __init__(self, config: Config):
        self.method = config.few_step.method
        self.uses_step_size = self.method == "shortcut"
        super().__init__(config)
        self._check_method()
        self.teacher = self._read_teacher() if config.few_step.teacher else None

    def _check_method(self):
        diffusion, method = self.config.diffusion, self.method
        if method == "shortcut" and (diffusion.schedule, diffusion.parameterization) != (
            "flow",
            "velocity",
        ):
            raise ConfigError(
                "--few_step.method=shortcut is for --diffusion.schedule=flow and "
                "--diffusion.parameterization=velocity"
            )
        if diffusion.schedule == "learned" or diffusion.objective == "bound":
            raise ConfigError(f"--few_step.method={method} takes no learned schedule and no bound")
        if method == "progressive" and diffusion.num_times % self.config.few_step.steps:
            raise ConfigError(
                f"--few_step.steps={self.config.few_step.steps} does not divide "
                f"--diffusion.num_times={diffusion.num_times}"
            )

    def _read_teacher(self) -> tuple[Any, Config]:
        workdir = self.config.few_step.teacher
        kind = "few_step" if self.method == "progressive" and _is_few_step(workdir) else "diffusion"
        config = read_fitting(workdir, "--few_step.teacher", kind, self.loader)
        mine, theirs = self.config.diffusion, config.diffusion
        for name in SAME_AS_TEACHER:
            if getattr(mine, name) != getattr(theirs, name):
                raise ConfigError(
                    f"--diffusion.{name}={getattr(mine, name)}, but that of the teacher in "
                    f"{workdir} is {getattr(theirs, name)}"
                )
        if getattr(config, mine.network) != self.network_shape:
            raise ConfigError(f"--{mine.network}.* are not those of the teacher in {workdir}")
        task = FewStep(config) if kind == "few_step" else Diffusion(config)
        return task, config

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        params, _ = super().init(rng)
        if self.method in TAUGHT:
            params["teacher"] = jax.tree.map(jnp.copy, params["model"])
        return params, {"calls": jnp.int32(0)}

    def pretrained(self) -> dict:
        groups = super().pretrained()
        if self.teacher:
            params, _ = restore_to_host(*self.teacher)
            groups |= {"model": params["model"], "teacher": params["model"]}
        return groups

    def _loss(self, params, mutables, batch, rng):
        calls = mutables["calls"]
        drop, noise, dropout = jax.random.split(rng, 3)
        condition = self.dropped(self.condition_of(batch), drop)
        rngs = {"dropout": dropout}
        losses, metrics = self.losses(params, batch, noise, condition, rngs, calls)
        return jnp.mean(losses), (metrics, {"calls": calls + 1})

    def losses(self, params, batch, rng, condition, rngs=None, step=None):
        """Loss of each image [batch]; `step` counts those of training, None is the last."""
        few, total = self.config.few_step, self.config.train.steps
        schedule = self.schedule(params)
        x0 = self.data(params, batch)
        time_key, key = jax.random.split(rng)
        t = self._times(time_key, x0.shape[0], schedule)
        if self.method == "shortcut":
            count = round(few.bootstrap * x0.shape[0])
            last = jax.tree.map(lambda x: x[x0.shape[0] - count :], condition)
            predict, predict_last = (self.predictor(params, c, rngs) for c in (condition, last))
            return few_step.shortcut_loss(
                predict, predict_last, x0, t, key, finest=few.finest, bootstrap=count
            ), {}
        student = self.denoiser(params, condition, rngs=rngs)
        teacher = self._guided_teacher(params, condition) if self.teacher else None
        if self.method == "progressive":
            return few_step.progressive_loss(
                student, teacher, schedule, x0, key, steps=few.steps
            ), {}
        step = jnp.int32(total) if step is None else step
        intervals = few_step.consistency_steps(step, total, few.first_intervals, few.last_intervals)
        losses = few_step.consistency_loss(
            student, teacher, schedule, x0, t, key, intervals=intervals
        )
        return losses, {"intervals": intervals}

    def _guided_teacher(self, params, condition):
        weight = self.config.few_step.teacher_guidance
        plain = self.denoiser(params, condition, "teacher")
        if weight == 1:
            return plain
        if self.config.diffusion.condition == "none":
            raise ConfigError(
                f"--few_step.teacher_guidance={weight} needs a conditional model "
                "(--diffusion.condition)"
            )
        count = jax.tree.leaves(condition)[0].shape[0]
        null = self.denoiser(params, self.null_condition(count), "teacher")
        return guidance.classifier_free(plain, null, weight)

    def check_sampler(self, sampler):
        """Each method has the solver and the numbers of steps that it was trained for."""
        few, said = self.config.few_step, f"--solver={sampler.solver} --steps={sampler.steps}"
        if self.method == "progressive" and (sampler.solver, sampler.steps) != ("ddim", few.steps):
            raise ConfigError(f"{said}: this model was distilled for ddim in {few.steps} step(s)")
        if self.method.startswith("consistency") and sampler.solver != "consistency":
            raise ConfigError(f"{said}: this model was trained for --solver=consistency")
        if self.method == "shortcut" and (
            sampler.solver != "euler" or sampler.steps & (sampler.steps - 1)
        ):
            raise ConfigError(
                f"{said}: this model was trained for euler in a power of two of steps"
            )
        if sampler.spacing != "uniform":
            raise ConfigError(f"--spacing={sampler.spacing}: this model was trained for uniform")

    def sampling_denoiser(self, params, condition, steps):
        denoise = self.denoiser(params, condition)
        if self.method != "shortcut":
            return denoise
        size = 1 / steps if steps < self.config.few_step.finest else 0.0
        return lambda x, t: denoise(x, t, jnp.full_like(t, size))


def _is_few_step(workdir: str) -> bool:
    from genai_jax.components import read_config

    return read_config(workdir).run.task == "few_step"
