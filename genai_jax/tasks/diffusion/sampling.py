"""Sampling from a diffusion model with the flags of the sample command."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax import media
from genai_jax.components import open_run
from genai_jax.config import Config, ConfigError
from genai_jax.diffusion import editing, guidance
from genai_jax.diffusion.solvers import solve
from genai_jax.diffusion.times import inverse_grid, time_grid
from genai_jax.grids import Labels, scale
from genai_jax.networks.image.conditioning import Condition
from genai_jax.outside import snake_case
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.sampling import cycled, requested_labels
from genai_jax.tasks.diffusion.model import DenoisingModel
from genai_jax.tasks.diffusion.sampler_flags import DiffusionRequest, SamplerConfig, sampler_of
from genai_jax.tasks.programs import cached_program
from genai_jax.tasks.protocol import Params
from genai_jax.tasks.registry import task_class
from genai_jax.training.distributed import to_host
from genai_jax.training.restore import restore_model

STRIP_COLUMNS = 9
STRIP_ROWS = 8


class SampledModel(NamedTuple):
    """A model that can be sampled from.

    Attributes:
      config: of the run.
      model: the denoising model.
      denoiser: (params, condition, solver steps) -> denoiser for that number of solver steps.
      check: raises `ConfigError` for a sampler that this model was not trained for.
    """

    config: Config
    model: DenoisingModel
    denoiser: Callable
    check: Callable[[SamplerConfig], None] = lambda sampler: None


def sample_request(sampled: SampledModel, params: Params, request: DiffusionRequest) -> Arrays:
    """Samples what a request of the sample command asks for."""
    model = sampled.model
    sampler = sampler_of(sampled.config, request)
    given = request.label or request.prompt
    if given and sampler.guidance == 0 and not (sampler.weak or sampler.guidance_interval):
        raise ConfigError(
            f"{given!r} has no effect with --guidance=0, the model without a condition"
        )
    asked = requested_condition(model, request)
    condition = asked.condition
    original = _read_levels(model, request.init_image, "init_image")
    known = {
        "image": _encoded(model, params, original),
        "mask": _read_mask(model, request.mask),
    }
    generator = cached_program(model, ("sampler", sampler), lambda: Sampler(sampled, sampler))
    if request.interpolate_to:
        levels = _read_levels(model, request.interpolate_to, "interpolate_to")
        other = _encoded(model, params, levels)
        path = generator.interpolate(params, known["image"], other, request.num_samples, condition)
        around = Labels(columns=scale(0, 1, len(path)))
        return _shown(sampled, path, request, asked, columns=len(path), around=around)
    start = request.strength if request.init_image and not request.mask else 1.0
    kind = "inpainted" if request.mask else f"strength {request.strength:g}"
    guided = f"guidance {sampler.guidance:g}" * (sampler.guidance != 1)
    title = ", ".join(filter(None, [kind * (original is not None), guided]))
    look = {"original": original, "around": Labels(title)}
    if start == 0:  # no noise: the image as the model reads it
        same = to_host(model.pixels(params, known["image"]))
        return _shown(sampled, np.repeat(same, request.num_samples, 0), request, asked, **look)
    images, strip = generator.sample(
        params, jax.random.key(request.seed), request.num_samples, condition, start=start,
        strip=request.strip, **known,
    )  # fmt: skip
    if strip is not None:
        times = tuple(f"t={t:.2f}" for t in generator.strip_times(params, start))
        look["strip_around"] = Labels(columns=times, rows=asked.names(model)[: len(strip)])
    return _shown(sampled, images, request, asked, strip=strip, **look)


def _shown(sampled: SampledModel, images: np.ndarray, request, asked, **more) -> Arrays:
    name = f"{snake_case(sampled.config.diffusion.network)}_seed{request.seed}"
    return sampled.model.data.sampled(name, images, asked.labels, prompts=asked.prompts, **more)


class Requested(NamedTuple):
    """What images are to show: the condition, and what of it can be said in words."""

    condition: Condition
    labels: np.ndarray | None = None  # [images, attributes]
    prompts: list[str] | None = None  # one per image

    def names(self, model: DenoisingModel) -> tuple[str, ...]:
        """What each image is to show; () without a condition."""
        if self.prompts is not None:
            return tuple(self.prompts)
        return model.data.label_texts(self.labels)


def requested_condition(model: DenoisingModel, request) -> Requested:
    """What each of `num_samples` images is to show.

    Raises:
      ConfigError: a condition that the model was not trained with, or an unknown class.
    """
    kind, loader = model.config.condition, model.data.loader
    for name, needed in (("label", "class"), ("prompt", "text")):
        if getattr(request, name) and kind != needed:
            raise ConfigError(
                f"--{name}={getattr(request, name)}: this model's condition is {kind}, not {needed}"
            )
    count, given = request.num_samples, request.label or request.prompt
    if kind != "none" and request.init_image and not given:  # an edit of an image of any class
        if not model.config.condition_dropout:
            raise ConfigError(
                f"--init_image needs --{'label' if kind == 'class' else 'prompt'}: with "
                "--diffusion.condition_dropout=0 this model was not trained without one"
            )
        return Requested(model.null_condition(count))
    if kind == "class":
        labels = requested_labels(loader, request.label, count)
        return Requested(model.condition(labels=labels), labels)
    if kind == "text":
        held_out = lambda: loader.examples("validation", count)["caption"]
        texts = [request.prompt] if request.prompt else held_out()
        tokens, mask = loader.encode_captions(texts)
        condition = model.condition(tokens=cycled(tokens, count), token_mask=cycled(mask, count))
        return Requested(condition, prompts=[texts[i % len(texts)] for i in range(count)])
    return Requested(Condition())


def _read_levels(model: DenoisingModel, path: str, flag: str) -> np.ndarray | None:
    """Reads an image file as levels [*space, channels]; None without a path."""
    data = model.data
    return media.read_image(path, data.shape, flag=flag, levels=data.levels) if path else None


def _encoded(model: DenoisingModel, params: Params, levels: np.ndarray | None):
    """An image as an input of the model, [1, *sample_shape]; None for None."""
    if levels is None:
        return None
    return model.encode(params, model.data.scaled(jnp.asarray(levels)[None]))


def _read_mask(model: DenoisingModel, path: str):
    """1 where the image is known and 0 where to sample it, [1, *space, 1]."""
    if not path:
        return None
    *space, _ = model.data.shape
    white = media.read_image(path, (*space, 1), flag="mask", levels=256)
    known = jnp.asarray(white < 128, jnp.float32)[None]
    return model.latents.shrink_mask(known) if model.latents else known


class Sampler:
    """Samples in batches, with one compiled program for each kind of request.

    It keeps programs and the weaker model to guide with, but no parameters of the model itself.
    """

    def __init__(self, sampled: SampledModel, settings: SamplerConfig):
        self.sampled, self.settings = sampled, settings
        self.model = sampled.model
        self.weak_model, self.weak = _open_weak(settings.weak, sampled)
        self._check()

    def _check(self):
        config, settings = self.model.config, self.settings
        if settings.guidance != 1 and config.condition == "none" and not self.weak_model:
            raise ConfigError(
                f"--guidance={settings.guidance} needs a conditional model "
                "(--diffusion.condition) or a weaker model to guide with (--weak)"
            )
        guided = self.weak_model or settings.guidance_interval or settings.guidance_rescale
        if settings.guidance == 1 and guided:
            raise ConfigError(
                "--weak, --guidance_interval, and --guidance_rescale need a --guidance other than 1"
            )
        if config.num_times and settings.steps > config.num_times:
            raise ConfigError(
                f"--steps={settings.steps} is more than the {config.num_times} times of this "
                "model's schedule (--diffusion.num_times)"
            )
        self.sampled.check(settings)

    def sample(
        self, params, key, count, condition, *, start=1.0, image=None, mask=None, strip=False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Images [count, *space, channels] in levels; with `strip`, also some trajectories.

        Args:
          params: of the model.
          key: for the noise.
          count: number of images.
          condition: of each image.
          start: time to start at; below 1, from `image` with the noise of that time.
          image: [1, *space, channels], as an input of the model.
          mask: [1, *space, 1], 1 where `image` is kept; None to sample all of it.
          strip: whether to return trajectories, [rows, columns, *space, channels].
        """
        rows = min(count, self.settings.batch_size)
        program, times = self._program(rows, start < 1, strip), self._times(params, start)
        images, paths = [], []
        for i, begin in enumerate(range(0, count, rows)):
            part = jax.tree.map(lambda x, b=begin: cycled(x[b : b + rows], rows), condition)
            samples, path = program(
                params, self.weak, part, jax.random.fold_in(key, i), times, image, mask
            )
            images.append(media.checked_levels(to_host(samples)))
            paths.append(path)
        shown = to_host(paths[0])[: min(count, STRIP_ROWS)] if strip else None
        return np.concatenate(images)[:count], shown

    @functools.cache  # noqa: B019  one per kind of request, kept as long as the sampler
    def _program(self, rows: int, from_image: bool, strip: bool):
        model = self.model

        def program(params, weak, condition, key, times, image, mask):
            schedule = model.schedule(params)
            noise_key, solver_key = jax.random.split(key)
            shape = (rows, *model.sample_shape)
            if from_image:
                image = jnp.broadcast_to(image, shape)
                x = editing.noised_start(schedule, image, times[0], noise_key)
            else:
                x = schedule.sigma(jnp.float32(1)) * jax.random.normal(noise_key, shape)
            denoise = self._guided(params, weak, condition)
            if mask is not None:
                denoise = editing.inpaint(denoise, image, mask)
            x, path = self._solve(denoise, schedule, x, times, solver_key)
            columns = path[_strip_columns(len(path))]
            shown = jax.vmap(lambda x: model.pixels(params, x))(columns) if strip else None
            return model.pixels(params, x), jnp.moveaxis(shown, 0, 1) if strip else None

        return jax.jit(program)

    def _guided(self, params, weak, condition):
        """The denoiser with guidance, limited to the interval, and rescaled."""
        sampled, settings = self.sampled, self.settings
        plain = sampled.denoiser(params, condition, settings.steps)
        if settings.guidance == 1:
            return plain
        if self.weak_model:
            other = self.weak_model.denoiser(weak, condition, settings.steps)
            guided = guidance.autoguidance(plain, other, settings.guidance)
        else:
            null = self.model.null_condition(jax.tree.leaves(condition)[0].shape[0])
            unconditional = sampled.denoiser(params, null, settings.steps)
            guided = guidance.classifier_free(plain, unconditional, settings.guidance)
        if settings.guidance_rescale:
            guided = guidance.rescaled(guided, plain, settings.guidance_rescale)
        interval = settings.interval()
        if interval:
            schedule = self.model.schedule(params)
            guided = guidance.limited_interval(guided, plain, schedule, *interval)
        return guided

    def _times(self, params: Params, start: float = 1.0) -> jax.Array:
        """The times of the solver; ConfigError for settings that allow none."""
        settings = self.settings
        try:
            schedule = self.model.schedule(params)
            return time_grid(schedule, settings.steps, settings.spacing, start=start)
        except ValueError as error:
            raise ConfigError(f"--steps={settings.steps} --strength={start}: {error}") from None

    def strip_times(self, params: Params, start: float) -> np.ndarray:
        """The times of the columns of a strip."""
        times = np.asarray(self._times(params, start))
        return times[_strip_columns(len(times))]

    def _solve(self, denoise, schedule, x, times, key):
        settings = self.settings
        options = {
            "ddim": {"eta": settings.eta},
            "heun": {"s_churn": settings.churn},
            "predictor_corrector": {"snr": settings.snr},
        }.get(settings.solver, {})
        return solve(settings.solver, denoise, schedule, x, times, key, return_path=True, **options)

    def interpolate(self, params, first, second, count: int, condition) -> np.ndarray:
        """Images [count, ...] from `first` to `second`, along a great circle of noise."""
        times, model = self._times(params), self.model

        @jax.jit
        def program(params, weak, condition, first, second):
            schedule = model.schedule(params)
            one = jax.tree.map(lambda x: x[:1], condition)
            denoise = self._guided(params, weak, one)
            inverse = inverse_grid(schedule, times)
            noises = [
                solve("ddim", denoise, schedule, x, inverse, jax.random.key(0))
                for x in (first, second)
            ]
            weights = jnp.linspace(0, 1, count)
            x = jax.vmap(lambda w: editing.slerp(*noises, w)[0])(weights)
            denoise = self._guided(params, weak, condition)
            x = solve("ddim", denoise, schedule, x, times, jax.random.key(0))
            return model.pixels(params, x)

        return to_host(program(params, self.weak, condition, first, second))


def _strip_columns(count: int) -> np.ndarray:
    """Which of the `count` states of a trajectory a strip shows, each of them once."""
    columns = min(count, STRIP_COLUMNS)
    return np.linspace(0, count - 1, columns).round().astype(int)


def _open_weak(workdir: str, sampled: SampledModel) -> tuple[SampledModel | None, Params | None]:
    """The model in `workdir` and its parameters; (None, None) if `workdir` is empty.

    Raises:
      ConfigError: a run of another task, or a model that cannot guide this one.
    """
    if not workdir:
        return None, None
    cls = task_class(sampled.config.run.task)
    config = open_run(cls, workdir, "--weak")
    task = cls(config)
    mine, theirs = sampled.model.config, config.diffusion
    for name in ("schedule", "condition", "num_times", "zero_terminal_snr"):
        if getattr(mine, name) != getattr(theirs, name):
            raise ConfigError(
                f"--weak={workdir} has --diffusion.{name}={getattr(theirs, name)}, but this run "
                f"has {getattr(mine, name)}"
            )
    shape, other = sampled.model.sample_shape, task.model.sample_shape
    if other != shape:
        raise ConfigError(f"--weak={workdir} samples arrays of shape {other}, but this run {shape}")
    return task.sampled_model(), restore_model(task, config).params
