"""What the sample command shows of a variational autoencoder: samples and walks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import field
from genai_jax.grids import PLAIN, Labels, scale
from genai_jax.networks.latent.latent_variables import Latents
from genai_jax.requests import ArrayRequest
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.sampling import (
    check_label,
    check_show_flags,
    in_batches,
    requested_labels,
)
from genai_jax.tasks.arrays.walks import PAIRS, PATHS, most_active, path, traversal, walk_labels
from genai_jax.tasks.programs import cached_program
from genai_jax.training.distributed import to_host

USES = {  # value of --show -> the flags that apply to it
    "prior": ("label", "temperature", "pixels", "seed"),
    "reconstructions": (),
    "interpolation": ("path", "columns"),
    "traversal": ("columns", "seed"),
}
SPREAD = 3.0  # extent of a traversal each way, in standard deviations of the prior
MAX_ROWS = 12  # of a grid of walks
MEASURED_IMAGES = 512  # that determine which latents are used


@dataclasses.dataclass(frozen=True)
class VaeRequest(ArrayRequest):
    num_samples: int = field(
        64, f"Images to sample, or walks to show, of which there are at most {MAX_ROWS}.", minimum=1
    )
    show: str = field(
        "prior",
        "What to show: samples from the prior, held-out images next to their reconstructions, "
        "walks between two held-out images, or walks along the latents that vary most.",
        choices=tuple(USES),
    )
    label: str = field(
        "", "Classes to sample, comma-separated and repeated in order; all in order if empty."
    )
    temperature: float = field(1.0, "Temperature of the sampled latents.", minimum=0)
    pixels: str = field(
        "mean", "Pixel values: their mean, or a sample (draw).", choices=("mean", "draw")
    )
    path: str = field("linear", "Path of an interpolation.", choices=PATHS)
    columns: int = field(11, "Images per walk.", minimum=2)


def sample_request(task: Any, params: dict, request: VaeRequest) -> Arrays:
    """Samples what a request of the sample command asks for."""
    check_label(request.label, bool(task.network.label_sizes))
    check_show_flags(request, USES)
    columns, around = None, PLAIN
    if request.show == "prior":
        images, labels = sample_images(
            task, params, jax.random.key(request.seed), request.num_samples, label=request.label,
            temperature=request.temperature, pixels=request.pixels,
        )  # fmt: skip
    elif request.show == "reconstructions":
        images, labels = reconstructions(task, params, request.num_samples)
        around = PAIRS
    elif request.show == "interpolation":
        (images, labels), columns = interpolation(task, params, request), request.columns
        around = walk_labels(task.data, labels, columns)
    else:
        images, labels, dimensions = latent_traversal(task, params, request)
        columns = request.columns
        around = Labels(
            "one latent per row, in standard deviations of its prior",
            scale(-SPREAD, SPREAD, columns, "+"),
            tuple(f"latent {dimension}" for dimension in dimensions),
        )
    name = request.show + f"_seed{request.seed}" * ("seed" in USES[request.show])
    return task.data.sampled(name, images, labels, columns=columns, around=around)


def sample_images(
    task, params, key, count: int, *, label="", temperature=1.0, pixels="mean"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images from the prior, uint8 [count, *space, channels], and their requested labels."""
    conditional = bool(task.network.label_sizes)
    labels = requested_labels(task.data.loader, label, count) if conditional else None

    def build():
        @functools.partial(jax.jit, static_argnums=3)
        def sample_batch(params, labels, key, rows):
            latents_key, pixels_key = jax.random.split(key)
            outputs, _ = task.top_down(
                params, None, labels, latents_key, batch=rows, temperature=temperature
            )
            if pixels == "mean":
                return task.data.to_levels(task.likelihood.mean(outputs))
            own = params.get("likelihood", {})
            return task.data.to_levels(task.likelihood.sample(own, outputs, pixels_key))

        return sample_batch

    program = functools.partial(
        cached_program(task, ("samples", temperature, pixels), build), params
    )
    return in_batches(program, key, count, labels), labels


Shown = tuple[np.ndarray, np.ndarray | None]  # images and, with classes, their labels


def reconstructions(task, params, count: int) -> Shown:
    """Held-out images, each with its reconstruction to its right."""
    held_out = task.data.loader.examples("validation", count)
    latents, labels = posterior_means(task, params, held_out)
    reconstructed = decode(task, params, [stage.z for stage in latents], labels)
    return np.concatenate([held_out["image"], reconstructed], -2), labels


def interpolation(task, params, request: VaeRequest) -> Shown:
    """Walks between two held-out images through the means of their latents, one per row."""
    rows = min(request.num_samples, MAX_ROWS)
    held_out = task.data.loader.examples("validation", 2 * rows)
    rows = len(held_out["image"]) // 2
    latents, labels = posterior_means(task, params, held_out)
    points = [
        jnp.moveaxis(path(s.z[:rows], s.z[rows : 2 * rows], request.columns, request.path), 0, 1)
        for s in latents
    ]
    flat = [x.reshape(-1, *x.shape[2:]) for x in points]
    of_rows = None if labels is None else np.repeat(labels[:rows], request.columns, 0)
    return decode(task, params, flat, of_rows), of_rows


def latent_traversal(
    task, params, request: VaeRequest
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Held-out image number `seed`, with one latent per row varied over the range of its prior.

    Rows start with the latents whose means vary most, in standard deviations of their prior; which
    ones these are is returned as well.
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
    same = None if labels is None else np.repeat(labels[chosen : chosen + 1], len(points), 0)
    return decode(task, params, z, same), same, dimensions


def posterior_means(task, params, examples: dict) -> tuple[list[Latents], np.ndarray | None]:
    """Mean latents of each stage, and the labels that the model is conditioned on."""
    labels = examples["labels"] if task.network.label_sizes else None
    means = jax.jit(lambda *arguments: posterior(task, *arguments))
    return to_host(means(params, examples["image"], labels)), labels


def posterior(task, params, image, labels) -> list[Latents]:
    """Mean latents of each stage; images are binarized or dequantized with a fixed key."""
    x, _ = task.likelihood.observe(image, jax.random.key(0))
    _, latents = task.top_down(params, task.bottom_up(params, x, labels), labels)
    return latents


def decode(task, params, z: list, labels: np.ndarray | None) -> np.ndarray:
    """Latents of each stage -> mean images, uint8 levels."""

    @jax.jit
    def decoded(params, z, labels):
        outputs, _ = task.top_down(params, None, labels, batch=z[0].shape[0], given=z)
        return task.data.to_levels(task.likelihood.mean(outputs))

    return to_host(decoded(params, z, labels))
