"""Snapshots of power-function averages, from which any profile can be reconstructed afterwards.

Karras et al. 2024, section 3.2: the desired profile is fitted by least squares with the profiles of
the snapshots, and the snapshots are summed with the same weights.
"""

import os
import pathlib

import jax
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.training.distributed import is_main, to_host
from genai_jax.training.ema import gamma_of
from genai_jax.training.trees import path_name

FOLDER = "ema"


def inner_product(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """int p_a(t) p_b(t) dt of profiles p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T].

    Float64; arguments broadcast.
    """
    t_a, gamma_a, t_b, gamma_b = (np.asarray(x, np.float64) for x in (t_a, gamma_a, t_b, gamma_b))
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
    return scale * (t_a / t_b) ** exponent


def profile_weights(steps, gammas, step: float, gamma: float) -> np.ndarray:
    """Weights of snapshots (`steps`, `gammas`) that best fit the profile (`step`, `gamma`)."""
    steps, gammas = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    products = inner_product(steps[:, None], gammas[:, None], steps[None], gammas[None])
    target = inner_product(steps, gammas, step, gamma)
    return np.linalg.lstsq(products, target, rcond=1e-14)[0]


def write_snapshot(workdir: pathlib.Path, step: int, ema: dict) -> None:
    """Writes the power-function averages of a step; writing a step again gives the same file.

    All processes have to call this; one of them writes.
    """
    averages = {name: values for name, values in ema.items() if name.startswith("width")}
    arrays = {
        path_name(path): to_host(x) for path, x in jax.tree_util.tree_flatten_with_path(averages)[0]
    }
    if not is_main():
        return
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    part = folder / f"{step}.part"
    with part.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(part, folder / f"{step}.npz")


def reconstruct(workdir: pathlib.Path, relative_width: float, step: int, shapes):
    """The average of this width at `step`, as host arrays shaped like `shapes`.

    Raises:
      ConfigError: there is no snapshot up to that step, or no profile of that width.
    """
    gamma = gamma_of(relative_width)
    files = sorted((workdir / FOLDER).glob("*.npz"), key=lambda path: int(path.stem))
    files = [path for path in files if int(path.stem) <= step]
    if not files:
        raise ConfigError(
            f"--ema=width:{relative_width} needs snapshots up to step {step} in {workdir / FOLDER} "
            "(--ema.snapshot_every)"
        )
    snapshots = [
        (path, name, int(path.stem), gamma_of(float(name.removeprefix("width"))))
        for path in files
        for name in _names(path)
    ]
    weights = profile_weights([s[2] for s in snapshots], [s[3] for s in snapshots], step, gamma)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    totals = [np.zeros(x.shape, np.float64) for _, x in leaves]
    for (path, name, _, _), weight in zip(snapshots, weights, strict=True):
        with np.load(path) as arrays:
            for total, (leaf_path, _) in zip(totals, leaves, strict=True):
                total += weight * arrays[f"{name}/{path_name(leaf_path)}"]
    return jax.tree.unflatten(tree, [total.astype(np.float32) for total in totals])


def _names(path: pathlib.Path) -> list[str]:
    with np.load(path) as arrays:
        return sorted({key.split("/")[0] for key in arrays})
