"""Diffusion models that sample in few steps, distilled from a teacher or trained directly."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.components import recorded_task
from genai_jax.config import Config, ConfigError, field
from genai_jax.diffusion import few_step, guidance
from genai_jax.networks.image.conditioning import Condition
from genai_jax.outside import snake_case
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.other_runs import best_average, open_fitting
from genai_jax.tasks.diffusion.model import OBJECTIVES, DenoisingModel
from genai_jax.tasks.diffusion.network import NETWORKS
from genai_jax.tasks.diffusion.sampler_flags import DiffusionRequest
from genai_jax.tasks.diffusion.sampling import SampledModel, sample_request
from genai_jax.tasks.diffusion.scores import ScoreRequest, report
from genai_jax.tasks.diffusion.task import Diffusion
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task, Transfer
from genai_jax.training.optimizer import default_optimizer

DISTILLED = ("progressive", "consistency_distillation")
METHODS = (*DISTILLED, "consistency_training", "shortcut")
SAME_AS_TEACHER = (
    "network", "schedule", "zero_terminal_snr", "num_times", "parameterization", "sigma_data",
    "noise_input", "condition", "autoencoder",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FewStepConfig:
    method: str = field("consistency_training", "Training method.", choices=METHODS)
    teacher: str = field(
        "",
        "Workdir of the model to distill, whose weights also initialize the student.",
        run=True,
    )
    teacher_guidance: float = field(1.0, "Classifier-free guidance weight of the teacher.")
    steps: int = field(8, "Solver steps that a progressive student takes.", minimum=1)
    first_intervals: int = field(
        10, "Intervals of the consistency time grid at the start.", minimum=2
    )
    last_intervals: int = field(
        160, "Intervals of the consistency time grid at the end.", minimum=2
    )
    finest: int = field(
        128, "Finest number of steps of a shortcut model, a power of two.", minimum=2
    )
    bootstrap: float = field(
        0.25, "Fraction of the examples that train the long steps of a shortcut model.",
        minimum=0, maximum=1,
    )  # fmt: skip

    def __post_init__(self):
        if self.finest & (self.finest - 1):
            raise ValueError(f"--few_step.finest={self.finest} is not a power of two")
        if self.last_intervals < self.first_intervals:
            raise ValueError(
                f"--few_step.last_intervals={self.last_intervals} is less than "
                f"--few_step.first_intervals={self.first_intervals}"
            )
        if (self.method in DISTILLED) != bool(self.teacher):
            needs = "needs" if self.method in DISTILLED else "does not use"
            raise ValueError(f"--few_step.method={self.method} {needs} a --few_step.teacher")


class FewStep(Task):
    """The task behind ``--task=few_step``; see `genai_jax.tasks.protocol.Task`.

    The teacher, if any, is a group of parameters that is never trained.
    """

    components: ClassVar = {**Diffusion.components, "few_step": FewStepConfig}
    loss_unit = "squared error"
    evaluation_seed = 0  # so that runs with different seeds are compared on the same noise
    sample_request = DiffusionRequest
    evaluate_request = ScoreRequest

    def __init__(self, config: Config):
        self.config, self.method = config, config.few_step.method
        self.data = ArrayData(config, reads_captions=True)
        self.model = DenoisingModel(config, self.data, uses_step_size=self.method == "shortcut")
        self.partition_rules = self.model.partition_rules
        self.activation_axes = self.model.activation_axes
        self._check_method()
        self.teacher = self._open_teacher() if config.few_step.teacher else None

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
        share, rows = self.config.few_step.bootstrap, self.config.data.batch_size
        rows //= self.config.train.accumulate
        if method == "shortcut" and share and not round(share * rows):
            raise ConfigError(
                f"--few_step.bootstrap={share} of the {rows} example(s) in "
                f"--train.accumulate={self.config.train.accumulate} part(s) of "
                f"--data.batch_size={self.config.data.batch_size} is less than one example: "
                "use a larger fraction, a larger batch, or 0"
            )
        objective = diffusion.objective
        if diffusion.schedule == "learned" or objective == "bound" or objective not in OBJECTIVES:
            raise ConfigError(
                f"--few_step.method={method} does not support --diffusion.schedule="
                f"{diffusion.schedule} with --diffusion.objective={objective}"
            )
        if method == "progressive" and diffusion.num_times % self.config.few_step.steps:
            raise ConfigError(
                f"--few_step.steps={self.config.few_step.steps} does not divide "
                f"--diffusion.num_times={diffusion.num_times}"
            )

    def _open_teacher(self) -> Config:
        """The configuration of the teacher: a diffusion model, or an earlier progressive student.

        Raises:
          ConfigError: the teacher differs where it must equal the student.
        """
        workdir, flag = self.config.place_of("few_step.teacher"), "--few_step.teacher"
        student = self.method == "progressive" and recorded_task(workdir, flag) == "few_step"
        config = open_fitting(FewStep if student else Diffusion, workdir, flag, self.data)
        mine, theirs = self.config.diffusion, config.diffusion
        for name in SAME_AS_TEACHER:
            if getattr(mine, name) != getattr(theirs, name):
                raise ConfigError(
                    f"--diffusion.{name}={getattr(mine, name)}, but the teacher in {workdir} has "
                    f"{getattr(theirs, name)}"
                )
        shape = mine.network if mine.network in NETWORKS else snake_case(mine.network)
        if getattr(config, shape, None) != getattr(self.config, shape, None):
            raise ConfigError(f"--{shape}.* differs from the teacher in {workdir}")
        return config

    # Parameters and loss.

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        params = self.model.init(key)
        if self.teacher:
            params["teacher"] = jax.tree.map(jnp.copy, params["model"])
        return params, {}

    def init_from(self) -> tuple[Transfer, ...]:
        """Student and teacher are both initialized with the weights of the teacher."""
        transfers = self.model.init_from()
        if self.teacher:
            workdir, average = self.config.few_step.teacher, best_average(self.teacher)
            transfers += tuple(
                Transfer(workdir, "--few_step.teacher", "params/model", target, average)
                for target in ("params/model", "params/teacher")
            )
        return transfers

    def prepare(self, params: Params) -> Params:
        return self.model.prepare(params)

    def phases(self, params: Params) -> tuple[Phase, ...]:
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("denoise", ("model",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        drop, noise, dropout = jax.random.split(info.rng, 3)
        condition = self.model.dropped(self.model.condition_of(batch), drop)
        rngs = {"dropout": dropout}
        losses, metrics = self.losses(params, batch, noise, condition, info.step, rngs)
        return LossOutput(jnp.mean(losses), metrics, mutables)

    def losses(self, params, batch, key, condition, step, rngs=None) -> tuple[jax.Array, dict]:
        """Loss of each image [batch] at a step of training, and metrics to log."""
        few, total, model = self.config.few_step, self.config.train.steps, self.model
        schedule = model.schedule(params)
        x0 = model.examples(params, batch)
        time_key, key = jax.random.split(key)
        t = model.times(time_key, x0.shape[0], schedule)
        if self.method == "shortcut":
            count = round(few.bootstrap * x0.shape[0])
            last = jax.tree.map(lambda x: x[x0.shape[0] - count :], condition)
            predict, predict_last = (model.predictor(params, c, rngs) for c in (condition, last))
            return few_step.shortcut_loss(
                predict, predict_last, x0, t, key, finest=few.finest, bootstrap=count
            ), {}
        student = model.denoiser(params, condition, rngs=rngs)
        teacher = self._guided_teacher(params, condition) if self.teacher else None
        if self.method == "progressive":
            return few_step.progressive_loss(
                student, teacher, schedule, x0, key, steps=few.steps
            ), {}
        intervals = few_step.consistency_steps(step, total, few.first_intervals, few.last_intervals)
        losses = few_step.consistency_loss(
            student, teacher, schedule, x0, t, key, intervals=intervals
        )
        return losses, {"intervals": intervals}

    def changed_length(self, step: int, before: int) -> str | None:
        few = self.config.few_step
        if not self.method.startswith("consistency"):
            return None
        old, new = (
            int(few_step.consistency_steps(step, total, few.first_intervals, few.last_intervals))
            for total in (before, self.config.train.steps)
        )
        if old == new:
            return None
        return (
            f"--train.steps={self.config.train.steps} instead of {before} changes the curriculum: "
            f"the next step has {new} time intervals, not {old}"
        )

    def _guided_teacher(self, params, condition):
        weight = self.config.few_step.teacher_guidance
        plain = self.model.denoiser(params, condition, "teacher")
        if weight == 1:
            return plain
        if self.config.diffusion.condition == "none":
            raise ConfigError(
                f"--few_step.teacher_guidance={weight} needs a conditional model "
                "(--diffusion.condition)"
            )
        count = jax.tree.leaves(condition)[0].shape[0]
        null = self.model.denoiser(params, self.model.null_condition(count), "teacher")
        return guidance.classifier_free(plain, null, weight)

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        last = jnp.int32(self.config.train.steps)
        losses, _ = self.losses(params, batch, key, self.model.condition_of(batch), last)
        return {"loss": Mean(losses * batch["loss_mask"], batch["loss_mask"])}

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """The mean loss of the held-out images at the last step of the curriculum."""
        metrics = super().summarize(reduced, params, mutables, key)
        return metrics | {"images": int(reduced["loss"].weight)}

    def report(self, params, mutables, batches: Callable, request: ScoreRequest) -> dict:
        return report(self.sampled_model(), params, batches, request)

    def sample(self, params, mutables, request: DiffusionRequest) -> Arrays:
        return sample_request(self.sampled_model(), params, request)

    def sampled_model(self) -> SampledModel:
        """What samplers need of this model."""
        return SampledModel(self.config, self.model, self._sampling_denoiser, self.check_sampler)

    def check_sampler(self, sampler):
        """Raises `ConfigError` for a sampler that the model was not trained for."""
        few, flags = self.config.few_step, f"--solver={sampler.solver} --steps={sampler.steps}"
        if self.method == "progressive" and (sampler.solver, sampler.steps) != ("ddim", few.steps):
            raise ConfigError(f"{flags}: this model was distilled for ddim in {few.steps} step(s)")
        if self.method.startswith("consistency") and sampler.solver != "consistency":
            raise ConfigError(f"{flags}: this model was trained for --solver=consistency")
        if self.method == "shortcut" and (
            sampler.solver != "euler" or sampler.steps & (sampler.steps - 1)
        ):
            raise ConfigError(
                f"{flags}: this model was trained for euler, in a number of steps that is a power "
                "of two"
            )
        if sampler.spacing != "uniform":
            raise ConfigError(f"--spacing={sampler.spacing}: this model was trained for uniform")

    def _sampling_denoiser(self, params: Params, condition: Condition, steps: int):
        denoise = self.model.denoiser(params, condition)
        if self.method != "shortcut":
            return denoise
        size = 1 / steps if steps < self.config.few_step.finest else 0.0
        return lambda x, t: denoise(x, t, jnp.full_like(t, size))

    def flops_per_step(self) -> dict:
        return self.model.flops_per_step(self.config.data.batch_size)
