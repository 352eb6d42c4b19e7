"""What the sample command shows of a variational autoencoder."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax import media
from genai_jax.config import field
from genai_jax.networks.latent.latent_variables import Latents
from genai_jax.requests import Files, SampleRequest
from genai_jax.tasks.arrays.sampling import (
    check_label,
    check_show_flags,
    in_batches,
    requested_labels,
)
from genai_jax.tasks.arrays.walks import PATHS, most_active, path, traversal

USES = {  # what can be shown -> the flags that are for it
    "prior": ("label", "temperature", "pixels", "seed"),
    "reconstructions": (),
    "interpolation": ("path", "columns"),
    "traversal": ("columns", "seed"),
}
SPREAD = 3.0  # prior standard deviations that a traversal goes each way
MAX_ROWS = 12  # of a walk
MEASURED_IMAGES = 512  # that tell which latents are used


@dataclasses.dataclass(frozen=True)
class VaeRequest(SampleRequest):
    num_samples: int = field(
        64, f"images, or rows of a walk, of which there are at most {MAX_ROWS}", minimum=1
    )
    show: str = field(
        "prior",
        "draws; held-out images beside their reconstructions; walks between two held-out images; "
        "walks along the latents that vary most",
        choices=tuple(USES),
    )
    label: str = field("", "classes to draw, comma-separated, in turn; empty: all in turn")
    temperature: float = field(1.0, "of the latents that are drawn", minimum=0)
    pixels: str = field("mean", "expected values, or drawn ones", choices=("mean", "draw"))
    path: str = field("linear", "of an interpolation", choices=PATHS)
    columns: int = field(11, "images of a walk", minimum=2)


def sample_request(task: Any, params: dict, request: VaeRequest) -> Files:
    """What a request of the sample command asks for."""
    check_label(request.label, bool(task.network.label_sizes))
    check_show_flags(request, USES)
    columns = None
    if request.show == "prior":
        images, _ = sample_images(
            task, params, jax.random.key(request.seed), request.num_samples, label=request.label,
            temperature=request.temperature, pixels=request.pixels,
        )  # fmt: skip
    elif request.show == "reconstructions":
        images = reconstructions(task, params, request.num_samples)
    else:
        walk = interpolation if request.show == "interpolation" else latent_traversal
        images, columns = walk(task, params, request), request.columns
    name = request.show + f"_seed{request.seed}" * ("seed" in USES[request.show])
    return Files(name, media.writers(images, task.data.levels, columns=columns))


def sample_images(
    task, params, key, count: int, *, label="", temperature=1.0, pixels="mean"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images from the prior, uint8 levels [count, *space, channels], and the labels asked for."""
    conditional = bool(task.network.label_sizes)
    labels = requested_labels(task.data.loader, label, count) if conditional else None

    @functools.partial(jax.jit, static_argnums=3)
    def some(params, labels, key, rows):
        latents_key, pixels_key = jax.random.split(key)
        outputs, _ = task.top_down(
            params, None, labels, latents_key, batch=rows, temperature=temperature
        )
        if pixels == "mean":
            return task.data.to_levels(task.likelihood.mean(outputs))
        own = params.get("likelihood", {})
        return task.data.to_levels(task.likelihood.sample(own, outputs, pixels_key))

    return in_batches(functools.partial(some, params), key, count, labels), labels


def reconstructions(task, params, count: int) -> np.ndarray:
    """Held-out images, each with its reconstruction on its right."""
    held_out = task.data.loader.examples("validation", count)
    latents, labels = posterior_means(task, params, held_out)
    made = decode(task, params, [stage.z for stage in latents], labels)
    return np.concatenate([held_out["image"], made], -2)


def interpolation(task, params, request: VaeRequest) -> np.ndarray:
    """Rows from one held-out image to another, through the means of their latents."""
    rows = min(request.num_samples, MAX_ROWS)
    held_out = task.data.loader.examples("validation", 2 * rows)
    rows = len(held_out["image"]) // 2
    latents, labels = posterior_means(task, params, held_out)
    points = [
        jnp.moveaxis(path(s.z[:rows], s.z[rows : 2 * rows], request.columns, request.path), 0, 1)
        for s in latents
    ]
    flat = [x.reshape(-1, *x.shape[2:]) for x in points]
    told = None if labels is None else np.repeat(labels[:rows], request.columns, 0)
    return decode(task, params, flat, told)


def latent_traversal(task, params, request: VaeRequest) -> np.ndarray:
    """The held-out image of number `seed` with one latent changed in each row, as its prior allows.

    First the latents that an image changes most, measured in standard deviations of their prior.
    """
    held_out = task.data.loader.examples("validation", MEASURED_IMAGES)
    latents, labels = posterior_means(task, params, held_out)
    flat = lambda x: np.asarray(x).reshape(len(x), -1)
    triples = [(s.z, s.prior_mean, np.exp(s.prior_log_scale)) for s in latents]
    mean, prior, scale = (
        np.concatenate([flat(x) for x in parts], 1) for parts in zip(*triples, strict=True)
    )
    dimensions = most_active((mean - prior) / scale, min(request.num_samples, MAX_ROWS))
    chosen = request.seed % len(mean)
    steps = np.linspace(-SPREAD, SPREAD, request.columns)
    values = prior[chosen, dimensions, None] + scale[chosen, dimensions, None] * steps
    points = traversal(mean[chosen], dimensions, values)
    ends = np.cumsum([stage.z[0].size for stage in latents])[:-1]
    z = [
        part.reshape(-1, *stage.z.shape[1:])
        for part, stage in zip(np.split(points, ends, 1), latents, strict=True)
    ]
    told = None if labels is None else np.repeat(labels[chosen : chosen + 1], len(points), 0)
    return decode(task, params, z, told)


def posterior_means(task, params, examples: dict) -> tuple[list[Latents], np.ndarray | None]:
    """Latents of each stage at their means, of images binarized or dequantized by a fixed key."""
    labels = examples["labels"] if task.network.label_sizes else None

    @jax.jit
    def means(params, image, labels):
        x, _ = task.likelihood.observe(image, jax.random.key(0))
        _, latents = task.top_down(params, task.bottom_up(params, x, labels), labels)
        return latents

    return means(params, examples["image"], labels), labels


def decode(task, params, z: list, labels: np.ndarray | None) -> np.ndarray:
    """Latents of each stage -> expected images, uint8 levels."""

    @jax.jit
    def decoded(params, z, labels):
        outputs, _ = task.top_down(params, None, labels, batch=z[0].shape[0], given=z)
        return task.data.to_levels(task.likelihood.mean(outputs))

    return np.asarray(decoded(params, z, labels))
