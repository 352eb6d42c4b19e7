"""Writes images, videos and signals to files that people can look at, and reads images."""

import math
import pathlib
import warnings
from typing import Any

import numpy as np

from genai_jax.config import ConfigError
from genai_jax.errors import NotFinite
from genai_jax.files import open_regular, reason_of, unreadable
from genai_jax.grids import Labels, check_channels, columns_of, grid

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF"}  # that can be written
JPEG_QUALITY = 95  # of 100
# That can be read. Pillow runs Ghostscript for others.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")


def checked_levels(examples: np.ndarray) -> np.ndarray:
    """Sampled examples [n, ...] as uint8 levels.

    Raises:
      NotFinite: some have values that were not finite, which are marked by -1.
    """
    broken = int(np.sum(np.any(examples.reshape(len(examples), -1) < 0, 1)))
    if broken:
        raise NotFinite(broken, len(examples))
    return examples.astype(np.uint8)


def to_bytes(images: np.ndarray, levels: int) -> np.ndarray:
    """Scales values 0 .. levels - 1 to 0 .. 255, uint8."""
    if levels == 256:
        return images
    return np.round(images.astype(np.float32) * (255 / (levels - 1))).astype(np.uint8)


def picture(
    examples: np.ndarray, levels: int, columns: int | None = None, labels: Labels | None = None
) -> np.ndarray:
    """Examples in one picture [height, width, 3], uint8.

    Images are in a grid, signals in small panels; of a video each row shows the frames.

    Args:
      examples: [n, *space, channels] in levels.
      levels: values are 0 .. levels - 1.
      columns: columns of the grid; about square if None.
      labels: what is written around them.

    Raises:
      ConfigError: images of a number of channels that no picture has; signals may have any.
    """
    if examples.ndim == 3:
        return _panels(examples, levels, columns, labels or Labels())
    images = to_bytes(examples, levels)
    if examples.ndim == 5:
        labels = labels and labels.in_one_column(len(examples), columns)
        images, columns = images.reshape(-1, *images.shape[2:]), images.shape[1]
    return grid(images, columns, labels)


def _panels(signals: np.ndarray, levels: int, columns: int | None, labels: Labels) -> np.ndarray:
    """Plots signals [n, length, channels] in a grid of small panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(signals)
    columns = columns or columns_of(count)
    rows = math.ceil(count / columns)
    size = 2 * columns, 1.2 * rows + 0.2 * rows * bool(labels)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, signal in zip(panels.flat, signals, strict=False):
        panel.plot(signal.astype(np.float32) * (2 / (levels - 1)) - 1, linewidth=0.9)
        panel.set_ylim(-1.05, 1.05)
    for panel, text in zip(panels.flat, labels.of_each(count, columns), strict=False):
        panel.set_title(text, fontsize=7, parse_math=False)
    if labels.title:
        figure.suptitle(labels.title, fontsize=9, parse_math=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def kind_of(examples: np.ndarray) -> str:
    """The suffix of the file in which examples [n, *space, channels] are shown by default."""
    return ".gif" if examples.ndim == 5 else ".png"


def write_examples(
    path: pathlib.Path, examples: np.ndarray, levels: int, columns: int | None = None,
    labels: Labels | None = None,
) -> None:  # fmt: skip
    """Writes examples [n, *space, channels] as one picture; videos move in a .gif.

    The suffix of `path`, one of `PICTURES`, is the format.

    Raises:
      ConfigError: see `picture`; nothing is written.
    """
    kind = PICTURES[path.suffix.lower()]
    if kind == "GIF" and examples.ndim == 5:
        images = to_bytes(examples, levels)
        frames = range(images.shape[1])
        _write_frames(path, [grid(images[:, i], columns, labels) for i in frames])
    else:
        _save(path, picture(examples, levels, columns, labels), kind)


def write_example(path: pathlib.Path, example: np.ndarray, levels: int) -> None:
    """Writes one example [*space, channels]: an image, or a video in a .gif, pixel by pixel.

    The suffix of `path`, one of `PICTURES`, is the format.

    Raises:
      ConfigError: see `picture`; nothing is written.
    """
    kind = PICTURES[path.suffix.lower()]
    if example.ndim == 2 or (example.ndim == 4 and kind != "GIF"):
        _save(path, picture(example[None], levels), kind)
        return
    check_channels(example)
    pixels = to_bytes(example, levels)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if example.ndim == 4:
        _write_frames(path, list(pixels))
    else:
        _save(path, pixels, kind)


def _save(path: pathlib.Path, pixels: np.ndarray, kind: str):
    from PIL import Image

    options = {"quality": JPEG_QUALITY} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(path, format=kind, **options)


def _write_frames(path: pathlib.Path, frames: list[np.ndarray]):
    """Writes frames [height, width, ...], uint8, as a GIF that loops forever."""
    from PIL import Image

    first, *others = map(Image.fromarray, frames)
    first.save(path, format="GIF", save_all=True, append_images=others, duration=120, loop=0)


def read_image(path: str, shape: tuple[int, ...], *, flag: str, levels: int) -> np.ndarray:
    """Reads an image file as levels, uint8 in `shape` (height, width, channels).

    Args:
      path: the image file.
      shape: (height, width, channels) that the image must have.
      flag: name of the flag that gives the path, for errors; "mask" reads any image as grayscale.
      levels: values are 0 .. levels - 1.

    Raises:
      ConfigError: not a readable image, or its size or channels differ from `shape`.
    """
    if len(shape) != 3:
        raise ConfigError(f"--{flag} is for images, but this model's examples have shape {shape}")
    height, width, channels = shape
    label = f"--{flag}={path}"
    picture = eight_bits(_read_picture(path, label, shape), label)
    if flag == "mask":
        picture = picture.convert("L")
    bands = len(picture.getbands())
    if (picture.height, picture.width, bands) != (height, width, channels):
        raise _other_shape(label, (picture.height, picture.width, bands), shape)
    values = np.asarray(picture).reshape(shape)
    if levels == 256:
        return values
    return np.round(values.astype(np.float32) * ((levels - 1) / 255)).astype(np.uint8)


def eight_bits(picture: Any, name: str, *, flatten: bool = False) -> Any:
    """A Pillow image as 8-bit gray (L) or RGB.

    Values of 16 bits are divided by 257; floating-point values from 0 to 1 are multiplied by 255.

    Args:
      picture: of any mode.
      name: what an error calls it.
      flatten: whether transparent pixels are blended with white; otherwise they are an error.

    Raises:
      ConfigError: it has transparent pixels, or values of no fixed range.
    """
    from PIL import Image

    if picture.mode[0] in "IF":  # 16 bits per pixel, which Pillow may read as 32; floating point
        values = np.asarray(picture).astype(np.float32)
        largest = 1.0 if picture.mode == "F" else 2.0**16 - 1
        if np.all((values >= 0) & (values <= largest)):
            return Image.fromarray(np.round(values * (255 / largest)).astype(np.uint8))
    kinds = {"1": "L", "L": "L", "LA": "L", "La": "L"}
    kinds |= dict.fromkeys(("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr"), "RGB")
    if picture.has_transparency_data:
        colors = picture.convert("RGBA")
        if colors.getextrema()[3][0] < 255 and not flatten:
            raise ConfigError(
                f"{name} has transparent pixels: flatten it, for example onto white, and save it "
                "without an alpha channel"
            )
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, colors).convert(kinds.get(picture.mode, "RGB"))
    if picture.mode not in kinds:
        raise ConfigError(
            f"{name} has pixels of Pillow's mode {picture.mode}: save it as 8-bit gray or RGB"
        )
    return picture.convert(kinds[picture.mode])


def upright(picture: Any) -> Any:
    """A Pillow image turned as its EXIF orientation says; a photograph may be stored on its side.

    An orientation that cannot be read is none.
    """
    from PIL import Image

    turns = Image.Transpose
    turn = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }.get(orientation(picture))  # fmt: skip
    return picture if turn is None else picture.transpose(turn)


def orientation(picture: Any) -> int:
    """EXIF orientation of a Pillow image, 1 to 8; its sides are swapped from 5 on."""
    try:
        value = picture.getexif().get(0x0112)
    except Exception:  # of many types, for damaged EXIF data
        return 1
    return value if value in range(1, 9) else 1


def _other_shape(label: str, found: tuple[int, ...], shape: tuple[int, ...]) -> ConfigError:
    """Both shapes are (height, width, channels)."""
    size = "{}x{} with {}".format
    return ConfigError(
        f"{label} is {size(*found)} channel(s); this model's images are {size(*shape)}"
    )


def _read_picture(path: str, label: str, shape: tuple[int, ...]) -> Any:
    """The picture of a file; its pixels are read only if its header gives the expected size."""
    from PIL import Image, UnidentifiedImageError

    with open_regular(path, label) as stream, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(stream, formats=FORMATS) as file:
                if sorted(file.size) == sorted(shape[:2]):
                    file.load()
                    return upright(file)
                found = file.height, file.width, len(file.getbands())
        except UnidentifiedImageError:
            raise unreadable(path, f"it is not an image ({', '.join(FORMATS)})", label) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise unreadable(path, "its header announces too many pixels", label) from None
        except Exception as error:  # decoders raise many types for damaged files
            raise unreadable(path, f"it is a damaged image ({reason_of(error)})", label) from None
    raise _other_shape(label, found, shape)
