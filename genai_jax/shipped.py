"""The project's own experiments, which are installed with it."""

import os
import pathlib

FOLDER = "experiments"
PACKAGE = pathlib.Path(__file__).parent
PLACES = (PACKAGE / FOLDER, PACKAGE.parent / FOLDER)  # of a wheel, and of a clone


def shipped(path: str) -> str:
    """`path`, or where the installation has it if it begins with experiments/ and is not there.

    So the commands of the documentation work in any folder.
    """
    parts = pathlib.PurePath(path).parts
    if parts[:1] == (FOLDER,) and ".." not in parts and "\0" not in path:
        for place in PLACES:
            installed = place.joinpath(*parts[1:])
            if installed.exists() and not os.path.lexists(path):
                return str(installed)
    return path
