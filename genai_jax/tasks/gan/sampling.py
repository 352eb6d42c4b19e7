"""What the sample command shows of a generator: samples, interpolations, and truncation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import field
from genai_jax.grids import PLAIN
from genai_jax.requests import ArrayRequest
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.sampling import (
    check_label,
    check_show_flags,
    in_batches,
    requested_labels,
)
from genai_jax.tasks.arrays.walks import PATHS, path, read_latents, walk_labels
from genai_jax.tasks.programs import cached_program
from genai_jax.training.distributed import to_host

USES = {  # value of --show -> the flags that apply to it
    "draws": ("latents", "truncation"),
    "interpolation": ("truncation", "path", "columns"),
    "truncation": ("columns",),
}
MAX_ROWS = 12  # of a grid of images


@dataclasses.dataclass(frozen=True)
class GanRequest(ArrayRequest):
    num_samples: int = field(
        64,
        f"Images to sample, or rows of a grid, of which there are at most {MAX_ROWS}.",
        minimum=1,
    )
    show: str = field(
        "draws",
        "What to show: samples, walks between two latents, or the same samples at increasing "
        "--truncation, from 0 to 1.",
        choices=tuple(USES),
    )
    label: str = field(
        "", "Classes to sample, comma-separated and repeated in order; all in order if empty."
    )
    truncation: float = field(
        1.0, "Scale of the distance of styles from their mean; 1: no truncation.", minimum=0
    )
    latents: str = field(
        "", "File .npy of latents [n, latent_dim] to use instead of random ones.", path=True
    )
    path: str = field("spherical", "Path of an interpolation.", choices=PATHS)
    columns: int = field(11, "Images per row of a grid.", minimum=2)

    def __post_init__(self):
        for name, given in (("num_samples", "their number"), ("seed", "the latents")):
            if self.latents and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"--{name}={getattr(self, name)}: the file --latents={self.latents} "
                    f"sets {given}"
                )


def sample_request(task: Any, params: dict, mutables: dict, request: GanRequest) -> Arrays:
    """Samples what a request of the sample command asks for."""
    check_label(request.label, bool(task.label_sizes))
    check_show_flags(request, USES)
    key, columns, around = jax.random.key(request.seed), request.columns, PLAIN
    if request.show == "draws":
        latents, count, columns = None, request.num_samples, None
        if request.latents:
            latents = read_latents(request.latents, task.config.generator.latent_dim)
            count = len(latents)
        images, labels = sample_images(
            task, params, mutables, key, count, label=request.label, latents=latents,
            truncation=request.truncation,
        )  # fmt: skip
    else:
        walk = interpolation if request.show == "interpolation" else truncation_grid
        images, labels = walk(task, params, mutables, key, request)
        title = "truncation" if request.show == "truncation" else ""
        around = walk_labels(task.data, labels, columns, title)
    name = f"{request.show}_seed{request.seed}"
    return task.data.sampled(name, images, labels, columns=columns, around=around)


def sample_images(
    task, params, mutables, key, count: int, *, label="", latents=None, truncation=1.0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images, uint8 levels [count, *space, channels], and their requested labels."""
    labels = requested_labels(task.data.loader, label, count) if task.label_sizes else None
    if latents is not None:
        return _render(task, params, mutables, latents, labels, truncation), labels

    def build():
        @functools.partial(jax.jit, static_argnums=4)
        def sample_batch(params, mutables, labels, key, rows):
            z = jax.random.normal(key, (rows, task.config.generator.latent_dim))
            return task.data.to_levels(task.paint(params, mutables, z, labels, key, truncation))

        return sample_batch

    program = functools.partial(
        cached_program(task, ("samples", truncation), build), params, mutables
    )
    return in_batches(program, key, count, labels), labels


Walk = tuple[np.ndarray, np.ndarray | None]  # images and, with classes, their labels


def interpolation(task, params, mutables, key, request: GanRequest) -> Walk:
    """Walks from one random latent to another, one per row."""
    rows = min(request.num_samples, MAX_ROWS)
    z = jax.random.normal(key, (2, rows, task.config.generator.latent_dim))
    points = jnp.moveaxis(path(z[0], z[1], request.columns, request.path), 0, 1)
    labels = _row_labels(task, request, rows)
    flat = points.reshape(-1, points.shape[-1])
    return _render(task, params, mutables, flat, labels, request.truncation), labels


def truncation_grid(task, params, mutables, key, request: GanRequest) -> Walk:
    """One sample per row, from the mean style to its own style."""
    rows, columns = min(request.num_samples, MAX_ROWS), request.columns
    z = jax.random.normal(key, (rows, task.config.generator.latent_dim))
    amounts = jnp.tile(jnp.linspace(0, 1, columns), rows)[:, None]
    labels = _row_labels(task, request, rows)
    z = jnp.repeat(z, columns, 0)
    return _render(task, params, mutables, z, labels, amounts), labels


def _row_labels(task, request, rows: int) -> np.ndarray | None:
    if not task.label_sizes:
        return None
    return np.repeat(requested_labels(task.data.loader, request.label, rows), request.columns, 0)


def _render(task, params, mutables, z, labels, truncation) -> np.ndarray:
    """Images without noise inputs, so that they differ only in the latents and truncation."""
    paint = jax.jit(
        lambda params, mutables, z, labels, amount: task.data.to_levels(
            task.paint(params, mutables, z, labels, truncation=amount)
        )
    )
    return to_host(paint(params, mutables, z, labels, truncation))
