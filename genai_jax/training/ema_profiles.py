"""Snapshots of power-function averages, from which any profile can be reconstructed afterwards.

Karras et al. 2024, section 3.2: the desired profile is fitted by least squares with the profiles of
the snapshots, and the snapshots are summed with the same weights.
"""

import contextlib
import math
import os
import pathlib
import sys
import zipfile
from collections.abc import Iterator

import jax
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.files import open_regular, reason_of, unreadable
from genai_jax.training.distributed import is_main, to_host
from genai_jax.training.ema import gamma_of
from genai_jax.training.trees import path_name

FOLDER = "ema"
MAX_HEADER = 10_000  # bytes before the numbers of an array, the limit of NumPy


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
      ConfigError: there is no snapshot up to that step, one of them is damaged or of another model,
        or there is no profile of that width.
    """
    gamma = gamma_of(relative_width)
    files = [path for path in _snapshots(workdir / FOLDER) if int(path.stem) <= step]
    if not files:
        raise ConfigError(
            f"--ema=width:{relative_width} needs snapshots up to step {step} in {workdir / FOLDER} "
            "(--ema.snapshot_every)"
        )
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    expected = {path_name(path): tuple(x.shape) for path, x in leaves}
    snapshots = [(path, name, g) for path in files for name, g in _averages(path).items()]
    steps = [int(path.stem) for path, _, _ in snapshots]
    weights = profile_weights(steps, [g for _, _, g in snapshots], step, gamma)
    totals = {name: np.zeros(shape, np.float64) for name, shape in expected.items()}
    for (path, name, _), weight in zip(snapshots, weights, strict=True):
        with _opened(path) as archive:
            for leaf, total in totals.items():
                total += weight * _read_array(archive, f"{name}/{leaf}", total.shape)
    return jax.tree.unflatten(tree, [total.astype(np.float32) for total in totals.values()])


def _snapshots(folder: pathlib.Path) -> list[pathlib.Path]:
    """The snapshots in order; files of other names are skipped with a warning."""
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, reason_of(error)) from None
    named = [p for p in paths if p.suffix == ".npz" and p.stem.isascii() and p.stem.isdigit()]
    for path in sorted({*paths} - {*named}):
        if path.suffix != ".part":  # a snapshot that a crash cut short
            print(f"warning: {path} is not a snapshot and is not used", file=sys.stderr)
    return sorted(named, key=lambda path: int(path.stem))


def _averages(path: pathlib.Path) -> dict[str, float]:
    """Average in a snapshot, such as "width0.05" -> its gamma.

    Raises:
      ConfigError: the file is not a snapshot.
    """
    with _opened(path) as archive:
        names = sorted({name.split("/")[0] for name in archive.namelist()})
        if not names:
            raise ValueError("it is empty")
        return {name: gamma_of(float(name.removeprefix("width"))) for name in names}


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """A snapshot.

    Raises:
      ConfigError: any error in reading it.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except Exception as error:  # zipfile, its decompressors, and NumPy raise many types
            reason = f"it is not an intact snapshot of this model ({reason_of(error)})"
            raise unreadable(path, f"{reason}; delete it to use the other snapshots") from None


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a snapshot; raises an error if it is not float32 of this shape."""
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"it has no {name}")
    info = archive.getinfo(f"{name}.npy")
    wrong = ValueError(f"{name} is not an array of {list(shape)}, float32")
    if info.file_size > 4 * math.prod(shape) + MAX_HEADER:
        raise wrong
    with archive.open(info) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.shape != shape or array.dtype != np.float32:
        raise wrong
    return array
