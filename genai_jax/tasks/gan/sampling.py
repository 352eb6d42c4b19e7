"""What the sample command shows of a generator."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax import media
from genai_jax.config import field
from genai_jax.requests import Files, SampleRequest
from genai_jax.tasks.arrays.sampling import (
    check_label,
    check_show_flags,
    in_batches,
    requested_labels,
)
from genai_jax.tasks.arrays.walks import PATHS, path, read_latents

USES = {  # what can be shown -> the flags that are for it
    "draws": ("latents", "truncation"),
    "interpolation": ("truncation", "path", "columns"),
    "truncation": ("columns",),
}
MAX_ROWS = 12  # of a walk or a grid


@dataclasses.dataclass(frozen=True)
class GanRequest(SampleRequest):
    num_samples: int = field(
        64,
        f"images, or rows of a walk or a grid, of which there are at most {MAX_ROWS}",
        minimum=1,
    )
    show: str = field(
        "draws",
        "draws; walks between two latents; the same draws truncated, from their mean to as drawn",
        choices=tuple(USES),
    )
    label: str = field("", "classes to draw, comma-separated, in turn; empty: all in turn")
    truncation: float = field(1.0, "how far styles are from their mean; 1: as drawn", minimum=0)
    latents: str = field("", ".npy file of latents [n, latent_dim] to draw from")
    path: str = field("spherical", "of an interpolation", choices=PATHS)
    columns: int = field(11, "images of a walk, steps of truncation", minimum=2)

    def __post_init__(self):
        for name, says in (("num_samples", "how many"), ("seed", "what is drawn")):
            if self.latents and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"--{name}={getattr(self, name)}: the file --latents={self.latents} says {says}"
                )


def sample_request(task: Any, params: dict, mutables: dict, request: GanRequest) -> Files:
    """What a request of the sample command asks for."""
    check_label(request.label, bool(task.label_sizes))
    check_show_flags(request, USES)
    key, columns = jax.random.key(request.seed), request.columns
    if request.show == "draws":
        given, count, columns = None, request.num_samples, None
        if request.latents:
            given = read_latents(request.latents, task.config.generator.latent_dim)
            count = len(given)
        images, _ = sample_images(
            task, params, mutables, key, count, label=request.label, latents=given,
            truncation=request.truncation,
        )  # fmt: skip
    else:
        walk = interpolation if request.show == "interpolation" else truncation_grid
        images = walk(task, params, mutables, key, request)
    name = f"{request.show}_seed{request.seed}"
    return Files(name, media.writers(images, task.data.levels, columns=columns))


def sample_images(
    task, params, mutables, key, count: int, *, label="", latents=None, truncation=1.0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images, uint8 levels [count, *space, channels], and the labels asked for."""
    labels = requested_labels(task.data.loader, label, count) if task.label_sizes else None
    if latents is not None:
        return _painted(task, params, mutables, latents, labels, truncation), labels

    @functools.partial(jax.jit, static_argnums=2)
    def some(labels, key, rows):
        z = jax.random.normal(key, (rows, task.config.generator.latent_dim))
        return task.data.to_levels(task.paint(params, mutables, z, labels, key, truncation))

    return in_batches(some, key, count, labels), labels


def interpolation(task, params, mutables, key, request: GanRequest) -> np.ndarray:
    """Rows from one draw to another."""
    rows = min(request.num_samples, MAX_ROWS)
    z = jax.random.normal(key, (2, rows, task.config.generator.latent_dim))
    points = jnp.moveaxis(path(z[0], z[1], request.columns, request.path), 0, 1)
    labels = _row_labels(task, request, rows)
    flat = points.reshape(-1, points.shape[-1])
    return _painted(task, params, mutables, flat, labels, request.truncation)


def truncation_grid(task, params, mutables, key, request: GanRequest) -> np.ndarray:
    """Rows of one draw each, from the mean style to as drawn."""
    rows, columns = min(request.num_samples, MAX_ROWS), request.columns
    z = jax.random.normal(key, (rows, task.config.generator.latent_dim))
    amounts = jnp.tile(jnp.linspace(0, 1, columns), rows)[:, None]
    labels = _row_labels(task, request, rows)
    return _painted(task, params, mutables, jnp.repeat(z, columns, 0), labels, amounts)


def _row_labels(task, request, rows: int) -> np.ndarray | None:
    if not task.label_sizes:
        return None
    return np.repeat(requested_labels(task.data.loader, request.label, rows), request.columns, 0)


def _painted(task, params, mutables, z, labels, truncation) -> np.ndarray:
    """Without noise inputs, so that pictures differ by what is shown alone."""
    paint = jax.jit(
        lambda z, labels, amount: task.data.to_levels(
            task.paint(params, mutables, z, labels, truncation=amount)
        )
    )
    return np.asarray(paint(z, labels, truncation))
