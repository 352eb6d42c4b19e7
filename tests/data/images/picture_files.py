"""Pictures of a user: small files of every kind, the same every time."""

import io
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from genai_jax.data.images.loader import ImageDataConfig, ImageLoader

COLORS = {"grass": (60, 150, 60), "water": (50, 90, 200), "brick": (170, 70, 50)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> pathlib.Path:
    """A folder of decoded pictures for each test."""
    base = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base / "genai_jax" / "pictures"


def tile(name: str, number: int, size: int | tuple[int, int] = 16) -> Image.Image:
    """A picture of a class: patches of its color."""
    width, height = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng((list(COLORS).index(name), number))
    color = np.array(COLORS[name])
    shade = lambda: tuple(int(x) for x in np.clip(color + rng.integers(-30, 31), 0, 255))
    picture = Image.new("RGB", (width, height), shade())
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, side = rng.integers(0, width), rng.integers(0, height), rng.integers(2, width // 2)
        draw.rectangle((int(x), int(y), int(x + side), int(y + side)), fill=shade())
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def write_tiles(folder: pathlib.Path, each: int = 10, size: int = 16) -> pathlib.Path:
    """A folder for each class, with so many PNG files."""
    for name in COLORS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            (folder / name / f"{i:03}.png").write_bytes(encoded(tile(name, i, size)))
    return folder


def write_tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def loader(dataset: str, seed: int = 0, **settings) -> ImageLoader:
    config = {"batch_size": 4, "prefetch": 0} | settings
    return ImageLoader(ImageDataConfig(dataset=dataset, **config), seed)


def images_of(loader: ImageLoader, split: str) -> np.ndarray:
    source = loader.open(split)
    return np.stack([source[i]["image"] for i in range(len(source))])


def everything(loader: ImageLoader) -> list[dict]:
    """The examples of both splits."""
    sources = [loader.open(split) for split in ("train", "validation")]
    return [source[i] for source in sources for i in range(len(source))]
