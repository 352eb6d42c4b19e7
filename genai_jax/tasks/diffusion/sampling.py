"""Drawing from a diffusion model: what the sample command's flags mean."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax import media
from genai_jax.config import ConfigError, field, override, overrides
from genai_jax.diffusion import editing, guidance
from genai_jax.diffusion.solvers import SOLVERS, solve
from genai_jax.diffusion.times import SPACINGS, time_grid
from genai_jax.networks.image.conditioning import Condition
from genai_jax.requests import Files, SampleRequest
from genai_jax.tasks.arrays.drawing import in_turn, requested_labels

STRIP_COLUMNS = 9
STRIP_ROWS = 8


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn, unless a command says otherwise."""

    solver: str = field(
        "dpmpp_2m", "of the reverse process", choices=tuple(SOLVERS), changeable=True
    )
    steps: int = field(30, "of the solver", minimum=1, changeable=True)
    spacing: str = field("uniform", "of the solver's times", choices=SPACINGS, changeable=True)
    eta: float = field(
        0.0, "noise of ddim: 0 none, 1 that of ddpm", minimum=0, maximum=1, changeable=True
    )
    churn: float = field(0.0, "noise that heun adds over all its steps", minimum=0, changeable=True)
    snr: float = field(
        0.16, "size of the Langevin steps of predictor_corrector", minimum=0, changeable=True
    )
    guidance: float = field(
        1.0,
        "weight of the condition, or of the model over a weaker one; 1: as trained",
        changeable=True,
    )
    guidance_interval: str = field(
        "", "LOW,HIGH: log-SNR between which guidance acts; empty: all", changeable=True
    )
    guidance_rescale: float = field(
        0.0,
        "share of the guided contrast set back to the unguided one's",
        minimum=0,
        maximum=1,
        changeable=True,
    )
    weak: str = field(
        "",
        "workdir of a weaker model of the same kind to guide with (autoguidance)",
        changeable=True,
    )
    batch_size: int = field(250, "images drawn at once at most", minimum=1, changeable=True)

    def interval(self) -> tuple[float, float] | None:
        """The bounds of `guidance_interval`."""
        if not self.guidance_interval:
            return None
        try:
            low, high = (float(x) for x in self.guidance_interval.split(","))
        except ValueError:
            low, high = 1.0, 0.0
        if low >= high:
            raise ConfigError(
                f"--guidance_interval={self.guidance_interval} is not LOW,HIGH with LOW < HIGH"
            )
        return low, high


Overrides = overrides(SamplerConfig)


@dataclasses.dataclass(frozen=True)
class DiffusionRequest(Overrides, SampleRequest):
    num_samples: int = field(64, "images to draw", minimum=1)
    label: str = field(
        "", "classes to draw, comma-separated names or numbers, in turn; empty: all in turn"
    )
    prompt: str = field("", "caption of what to draw; empty: captions of held-out images")
    strip: bool = field(False, "also show the way from noise to image")
    init_image: str = field("", "image to start from, or whose masked part is drawn anew")
    strength: float = field(
        0.6, "how far towards noise init_image is taken: 0 keeps it, 1 forgets it",
        minimum=0, maximum=1,
    )  # fmt: skip
    mask: str = field("", "image as large as init_image, white where it is to be drawn anew")
    interpolate_to: str = field("", "second image: num_samples steps from init_image to it")

    def __post_init__(self):
        if self.mask and not self.init_image:
            raise ValueError("--mask needs --init_image, the image of which a part is drawn anew")
        if self.interpolate_to and not self.init_image:
            raise ValueError("--interpolate_to needs --init_image, the image to begin at")
        if self.interpolate_to and self.mask:
            raise ValueError("--interpolate_to and --mask exclude each other")


def draw(task: Any, params: dict, request: DiffusionRequest) -> Files:
    """What a request of the sample command asks for."""
    sampler = override(task.config.sampler, request)
    condition = requested_condition(task, request)
    known = {
        "image": _image_of(task, params, request.init_image, "init_image"),
        "mask": _mask_of(task, request.mask),
    }
    drawer = Drawer(task, params, sampler)
    key = jax.random.key(request.seed)
    if request.interpolate_to:
        other = _image_of(task, params, request.interpolate_to, "interpolate_to")
        path = drawer.interpolate(known["image"], other, request.num_samples, condition)
        return _files(task, path, request, None)
    start = request.strength if request.init_image and not request.mask else 1.0
    images, strip = drawer.draw(
        key, request.num_samples, condition, start=start, strip=request.strip, **known
    )
    return _files(task, images, request, strip)


def _files(task, images: np.ndarray, request, strip) -> Files:
    levels = task.loader.levels
    name = f"{task.config.diffusion.network}_seed{request.seed}"
    return Files(name, media.writers(images, levels, strip))


def requested_condition(task, request) -> Condition:
    """The condition of each of `num_samples` images.

    Raises:
      ConfigError: a condition that the model was not trained with, or a class out of range.
    """
    kind = task.config.diffusion.condition
    for name, needs in (("label", "class"), ("prompt", "text")):
        if getattr(request, name) and kind != needs:
            raise ConfigError(
                f"--{name}={getattr(request, name)}: this model's condition is {kind}, not {needs}"
            )
    count = request.num_samples
    if kind == "class":
        return task.condition(labels=requested_labels(task.loader, request.label, count))
    if kind == "text":
        held_out = lambda: task.loader.examples("validation", count)["caption"]
        texts = [request.prompt] if request.prompt else held_out()
        tokens, mask = task.loader.encode_captions(texts)
        return task.condition(tokens=in_turn(tokens, count), token_mask=in_turn(mask, count))
    return Condition()


def _image_of(task, params, path: str, flag: str):
    if not path:
        return None
    levels = media.read_image(path, task.loader.shape, flag=flag, levels=task.loader.levels)
    x = task.scaled(jnp.asarray(levels)[None])
    return task.latents.encode(params, x) if task.latents else x


def _mask_of(task, path: str):
    """1 where the image is known and 0 where it is to be drawn, [1, *space, 1]."""
    if not path:
        return None
    *space, _ = task.loader.shape
    white = media.read_image(path, (*space, 1), flag="mask", levels=256)
    known = jnp.asarray(white < 128, jnp.float32)[None]
    return task.latents.shrink_mask(known) if task.latents else known


class Drawer:
    """Draws batch after batch with one compiled program for each kind of draw."""

    def __init__(self, task: Any, params: dict, sampler: SamplerConfig):
        self.task, self.params, self.sampler = task, params, sampler
        self.weak_task, self.weak = weaker(sampler.weak, task)
        self._check()

    def _check(self):
        config, sampler = self.task.config.diffusion, self.sampler
        if sampler.guidance != 1 and config.condition == "none" and not self.weak_task:
            raise ConfigError(
                f"--guidance={sampler.guidance} needs a conditional model "
                "(--diffusion.condition), or --weak, a weaker one to guide with"
            )
        if sampler.guidance == 1 and (self.weak_task or sampler.guidance_interval):
            raise ConfigError("--weak and --guidance_interval need a --guidance other than 1")
        if config.num_times and sampler.steps > config.num_times:
            raise ConfigError(
                f"--steps={sampler.steps} is more than the {config.num_times} times of this "
                "model's schedule (--diffusion.num_times)"
            )
        self.task.check_sampler(sampler)

    def draw(
        self, key, count, condition, *, start=1.0, image=None, mask=None, strip=False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Images [count, *space, channels] in levels; with `strip`, also the way to the first ones.

        Args:
          key: of the noise.
          count: how many.
          condition: of each.
          start: the time to start at; below 1 from `image` with the noise of that time.
          image: [1, *space, channels] as the model sees it.
          mask: [1, *space, 1], 1 where `image` is kept; None draws all of it.
          strip: whether the way is wanted, [rows, columns, *space, channels].
        """
        rows = min(count, self.sampler.batch_size)
        program, times = self._program(rows, start < 1, strip), self._times(start)
        images, ways = [], []
        for i, begin in enumerate(range(0, count, rows)):
            part = jax.tree.map(lambda x, b=begin: in_turn(x[b : b + rows], rows), condition)
            drawn, way = program(
                self.params, self.weak, part, jax.random.fold_in(key, i), times, image, mask
            )
            images.append(np.asarray(drawn))
            ways.append(way)
        shown = np.asarray(ways[0])[: min(count, STRIP_ROWS)] if strip else None
        return np.concatenate(images)[:count], shown

    @functools.cache  # noqa: B019  one for each kind of draw; it lives as long as the drawer
    def _program(self, rows: int, from_image: bool, strip: bool):
        def program(params, weak, condition, key, times, image, mask):
            schedule = self.task.schedule(params)
            noise_key, solver_key = jax.random.split(key)
            shape = (rows, *self.task.sample_shape)
            if from_image:
                image = jnp.broadcast_to(image, shape)
                x = editing.noised_start(schedule, image, times[0], noise_key)
            else:
                x = schedule.sigma(jnp.float32(1)) * jax.random.normal(noise_key, shape)
            denoise = self._guided(params, weak, condition)
            if mask is not None:
                denoise = editing.inpaint(denoise, image, mask)
            x, way = self._solve(denoise, schedule, x, times, solver_key)
            columns = np.linspace(0, len(way) - 1, STRIP_COLUMNS).round().astype(int)
            shown = jax.vmap(lambda x: self._pixels(params, x))(way[columns]) if strip else None
            return self._pixels(params, x), jnp.moveaxis(shown, 0, 1) if strip else None

        return jax.jit(program)

    def _guided(self, params, weak, condition):
        """The denoiser of the whole model: guided, within the interval, rescaled."""
        task, sampler = self.task, self.sampler
        plain = task.sampling_denoiser(params, condition, sampler.steps)
        if sampler.guidance == 1:
            return plain
        if self.weak_task:
            other = self.weak_task.sampling_denoiser(weak, condition, sampler.steps)
            guided = guidance.autoguidance(plain, other, sampler.guidance)
        else:
            null = task.null_condition(jax.tree.leaves(condition)[0].shape[0])
            unconditional = task.sampling_denoiser(params, null, sampler.steps)
            guided = guidance.classifier_free(plain, unconditional, sampler.guidance)
        if sampler.guidance_rescale:
            guided = guidance.rescaled(guided, plain, sampler.guidance_rescale)
        interval = sampler.interval()
        if interval:
            guided = guidance.limited_interval(guided, plain, task.schedule(params), *interval)
        return guided

    def _times(self, start: float = 1.0) -> jax.Array:
        """The solver's times; ConfigError where there are none such."""
        schedule, sampler = self.task.schedule(self.params), self.sampler
        try:
            return time_grid(schedule, sampler.steps, sampler.spacing, start=start)
        except ValueError as error:
            raise ConfigError(f"--steps={sampler.steps} --strength={start}: {error}") from None

    def _solve(self, denoise, schedule, x, times, key):
        sampler = self.sampler
        settings = {
            "ddim": {"eta": sampler.eta},
            "heun": {"s_churn": sampler.churn},
            "predictor_corrector": {"snr": sampler.snr},
        }.get(sampler.solver, {})
        return solve(sampler.solver, denoise, schedule, x, times, key, return_path=True, **settings)

    def _pixels(self, params, x):
        """Images in levels, uint8."""
        if self.task.latents:
            x = self.task.latents.decode(params, x)
        return self.task.to_levels(x)

    def interpolate(self, first, second, count: int, condition) -> np.ndarray:
        """Images [count, ...] from `first` to `second`, on a great circle of their noise."""

        times = self._times()

        @jax.jit
        def program(params, weak, condition, first, second):
            schedule = self.task.schedule(params)
            one = jax.tree.map(lambda x: x[:1], condition)
            denoise = self._guided(params, weak, one)
            noises = [
                solve("ddim", denoise, schedule, x, times[::-1], jax.random.key(0))
                for x in (first, second)
            ]
            weights = jnp.linspace(0, 1, count)
            x = jax.vmap(lambda w: editing.slerp(*noises, w)[0])(weights)
            denoise = self._guided(params, weak, condition)
            x = solve("ddim", denoise, schedule, x, times, jax.random.key(0))
            return self._pixels(params, x)

        return np.asarray(program(self.params, self.weak, condition, first, second))


def weaker(workdir: str, task: Any) -> tuple[Any, dict | None]:
    """The task and the parameters of the model in `workdir`, (None, None) if it is empty."""
    if not workdir:
        return None, None
    from genai_jax.components import read_config
    from genai_jax.training.restore import restore_model

    config = read_config(workdir, "--weak")
    if config.run.task != task.config.run.task:
        raise ConfigError(f"--weak={workdir} is a run of --task={config.run.task}")
    other = type(task)(config)
    mine, theirs = task.config.diffusion, config.diffusion
    for name in ("schedule", "condition", "num_times", "zero_terminal_snr"):
        if getattr(mine, name) != getattr(theirs, name):
            raise ConfigError(f"--weak={workdir} has another --diffusion.{name} than this run")
    if other.sample_shape != task.sample_shape:
        raise ConfigError(
            f"--weak={workdir} draws {other.sample_shape}, this run {task.sample_shape}"
        )
    return other, restore_model(other, config).params
