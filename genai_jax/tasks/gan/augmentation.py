"""Augmentation of the inputs of a critic, with a probability that adapts to its overfitting.

Karras et al. 2020, "Training generative adversarial networks with limited data". Each kind is
applied to an example with the same probability, below 1, so that the generator does not learn to
produce augmented images.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.config import field

SHIFT = 1 / 8  # maximum, relative to the size
MAX_PROBABILITY = 0.85  # closer to 1, augmentations leak into the generated images


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    kinds: str = field(
        "",
        "Comma-separated kinds: flip, rotate, translate, scale, brightness, contrast, cutout; none "
        "if empty.",
    )
    probability: float = field(
        0.0,
        "Probability of each kind; its initial value with --augmentation.target.",
        minimum=0,
        maximum=MAX_PROBABILITY,
    )
    target: float | None = field(
        None,
        "Mean sign of the verdicts on data to which the probability adapts; constant if unset.",
        minimum=-1,
        maximum=1,
    )
    ramp_images: int = field(
        500_000, "Images over which the probability could go from 0 to 1.", minimum=1
    )

    def __post_init__(self):
        for name in self.names:
            if name not in KINDS:
                raise ValueError(
                    f"--augmentation.kinds={self.kinds}: {name!r} is not one of {', '.join(KINDS)}"
                )
        if self.names and not self.probability and self.target is None:
            raise ValueError(
                f"--augmentation.kinds={self.kinds} needs --augmentation.probability above 0, or "
                "--augmentation.target"
            )
        if self.target is None and self.ramp_images != type(self).ramp_images:
            raise ValueError(
                f"--augmentation.ramp_images={self.ramp_images} needs --augmentation.target"
            )
        if not self.names and (self.probability or self.target is not None):
            raise ValueError(
                "--augmentation.probability and --augmentation.target need --augmentation.kinds"
            )

    @property
    def names(self) -> list[str]:
        return [name for name in self.kinds.split(",") if name]


def steered(
    config: AugmentationConfig, probability: jax.Array, verdicts: jax.Array, undecided: float = 0.0
) -> jax.Array:
    """The probability after an update: higher if the critic is too certain of data, else lower.

    Certainty is the mean sign of its verdicts on data (equation 1, r_t), relative to `undecided`,
    the verdict of a critic that cannot tell data from fakes.
    """
    if config.target is None:
        return probability
    certainty = jnp.mean(jnp.sign(verdicts - undecided))
    step = jnp.sign(certainty - config.target) * verdicts.shape[0] / config.ramp_images
    return jnp.clip(probability + step, 0.0, MAX_PROBABILITY)


def augment(
    config: AugmentationConfig, x: jax.Array, probability: jax.Array, rng: jax.Array
) -> jax.Array:
    """Augments images in [-1, 1], [batch, height, width, channels], by random kinds for each."""
    for i, name in enumerate(config.names):
        coin_rng, kind_rng = jax.random.split(jax.random.fold_in(rng, i))
        changed = KINDS[name](x, kind_rng)
        chosen = jax.random.bernoulli(coin_rng, probability, (x.shape[0], *(1,) * (x.ndim - 1)))
        x = jnp.where(chosen, changed, x)
    return x


def _each(x: jax.Array) -> tuple[int, ...]:
    """Shape of one number per image."""
    return (x.shape[0], *(1,) * (x.ndim - 1))


def _flip(x, rng):
    return jnp.where(jax.random.bernoulli(rng, 0.5, _each(x)), x[:, :, ::-1], x)


def _rotate(x, rng):
    """By a multiple of 90 degrees, or of 180 for images that are not square."""
    turns = jax.random.randint(rng, _each(x), 0, 4)
    if x.shape[1] != x.shape[2]:
        return jnp.where(turns % 2 == 1, x[:, ::-1, ::-1], x)
    rotated = [jnp.rot90(x, k, (1, 2)) for k in range(4)]
    return jnp.select([turns == k for k in range(4)], rotated)


def _translate(x, rng):
    """By whole pixels; edges are repeated."""
    most = [max(1, round(n * SHIFT)) for n in x.shape[1:3]]
    padded = jnp.pad(x, ((0, 0), *((m, m) for m in most), (0, 0)), mode="edge")
    limits = jnp.array([2 * m + 1 for m in most])
    starts = jax.random.randint(rng, (x.shape[0], 2), 0, limits)
    cut = lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), x.shape[1:])
    return jax.vmap(cut)(padded, starts)


def _scale(x, rng):
    """About the center, by 2^(0.2 n) with normal n; black outside the image."""
    size = jnp.array(x.shape[1:3], jnp.float32)

    def resize(image, factor):
        factors = jnp.stack([factor, factor])
        translation = (1 - factors) * size / 2
        return jax.image.scale_and_translate(
            image + 1, image.shape, (0, 1), factors, translation, "linear", antialias=False
        )

    return jax.vmap(resize)(x, 2 ** (0.2 * jax.random.normal(rng, x.shape[:1]))) - 1


def _brightness(x, rng):
    return x + 0.2 * jax.random.normal(rng, _each(x))


def _contrast(x, rng):
    return x * 2 ** (0.5 * jax.random.normal(rng, _each(x)))


def _cutout(x, rng):
    """Covers a rectangle of half the size with gray."""
    center = jax.random.uniform(rng, (2, *_each(x)))
    inside = True
    for axis in (1, 2):
        size = x.shape[axis]
        places = (jnp.arange(size) + 0.5).reshape(-1, *(1,) * (x.ndim - axis - 1))
        inside &= jnp.abs(places - size * center[axis - 1]) < size / 4
    return jnp.where(inside, 0.0, x)


KINDS: dict[str, Callable] = {
    "flip": _flip,
    "rotate": _rotate,
    "translate": _translate,
    "scale": _scale,
    "brightness": _brightness,
    "contrast": _contrast,
    "cutout": _cutout,
}
