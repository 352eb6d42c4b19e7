"""Flags of sampling from a diffusion model: of a run, and of the commands that override them."""

import dataclasses
from typing import Any

from genai_jax.config import Config, ConfigError, field, override, overrides, refuse_set
from genai_jax.diffusion.solvers import SOLVERS
from genai_jax.diffusion.times import SPACINGS
from genai_jax.requests import ArrayRequest


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled, unless flags of a command override it."""

    solver: str = field(
        "dpmpp_2m", "Solver of the reverse process.", choices=tuple(SOLVERS), changeable=True
    )
    steps: int = field(30, "Solver steps.", minimum=1, changeable=True)
    spacing: str = field(
        "uniform", "Spacing of the solver's times.", choices=SPACINGS, changeable=True
    )
    eta: float = field(
        0.0, "Noise of ddim: 0 for none, 1 for that of ddpm.", minimum=0, maximum=1,
        changeable=True,
    )  # fmt: skip
    churn: float = field(
        0.0, "Noise that heun adds over all its steps.", minimum=0, changeable=True
    )
    snr: float = field(
        0.16, "Size of the Langevin steps of predictor_corrector.", minimum=0, changeable=True
    )
    guidance: float = field(
        1.0,
        "Guidance weight, over no condition or over the --weak model; 1: no guidance.",
        changeable=True,
    )
    guidance_interval: str = field(
        "",
        "LOW,HIGH: range of log-SNR in which to apply guidance; everywhere if empty.",
        changeable=True,
    )
    guidance_rescale: float = field(
        0.0,
        "How far the contrast is rescaled from guided (0) to unguided (1).",
        minimum=0,
        maximum=1,
        changeable=True,
    )
    weak: str = field(
        "",
        "Workdir of a weaker model of the same kind to guide with (autoguidance).",
        path=True,
        changeable=True,
    )
    batch_size: int = field(250, "Images sampled at a time.", minimum=1, changeable=True)

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
OF_ONE_SOLVER = {"eta": "ddim", "churn": "heun", "snr": "predictor_corrector"}


def sampler_of(config: Config, request: Any) -> SamplerConfig:
    """The settings of a run with those that a request, an `Overrides`, sets.

    Raises:
      ConfigError: settings that contradict each other, or one that the solver does not use.
    """
    settings = override(config.sampler, request)
    for name, solver in OF_ONE_SOLVER.items():
        if getattr(request, name) is not None and settings.solver != solver:
            raise ConfigError(
                f"--{name}={getattr(request, name)} is for --solver={solver}, not {settings.solver}"
            )
    return settings


@dataclasses.dataclass(frozen=True)
class DiffusionRequest(Overrides, ArrayRequest):
    num_samples: int = field(64, "Images to sample.", minimum=1)
    label: str = field(
        "",
        "Classes to sample: comma-separated names or numbers, repeated in order; if empty, all "
        "classes in order, or no class with --init_image.",
    )
    prompt: str = field(
        "",
        "Caption to sample from; if empty, captions of held-out images, or none with --init_image.",
    )
    strip: bool = field(False, "Also show trajectories from noise to image.")
    init_image: str = field(
        "", "Image file to start from, or whose masked part is replaced.", path=True
    )
    strength: float = field(
        0.6, "How much noise to add to --init_image: 0 keeps it, 1 replaces it.",
        minimum=0, maximum=1,
    )  # fmt: skip
    mask: str = field(
        "", "Image file of the size of --init_image, white where to replace it.", path=True
    )
    interpolate_to: str = field(
        "", "Second image file: --num_samples steps from --init_image to it.", path=True
    )

    def __post_init__(self):
        if self.mask and not self.init_image:
            raise ValueError("--mask needs --init_image, the image whose masked part is replaced")
        if self.interpolate_to and not self.init_image:
            raise ValueError("--interpolate_to needs --init_image, the image to start from")
        if self.interpolate_to and self.mask:
            raise ValueError("--interpolate_to and --mask exclude each other")
        edits = self.init_image and not (self.mask or self.interpolate_to)
        if self.strength != type(self).strength and not edits:
            raise ValueError(
                f"strength={self.strength} needs --init_image without --mask or --interpolate_to"
            )
        solver = [f.name for f in dataclasses.fields(Overrides)]
        if self.interpolate_to:
            unused = ("seed", "strip", "solver", *OF_ONE_SOLVER)
            refuse_set("run", self, unused, "has no effect with --interpolate_to, which uses ddim")
        if self.strength == 0:
            unused = ("seed", "strip", "label", "prompt", *solver)
            refuse_set("run", self, unused, "has no effect with --strength=0, which adds no noise")
