"""Encoded pictures (PNG, JPEG, WebP, GIF, ...) to arrays of one shape.

A picture is turned as its EXIF orientation says, and flattened onto white where it is transparent.
To fit a shape, it is cropped to the largest centered rectangle with the aspect ratio of the shape,
which is resized with antialiasing (bicubic).
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from genai_jax.errors import ConfigError
from genai_jax.files import reason_of
from genai_jax.media import FORMATS, eight_bits, orientation, upright

MAX_PIXELS = 89_478_485  # of a picture; the number from which Pillow warns
MAX_FRAME_PIXELS = 16 * MAX_PIXELS  # of all frames of an animation
ANIMATED = ("GIF", "WEBP", "PNG")  # formats whose frames are pictures; those of others are pages
GRAY_MODES = ("1", "L", "LA", "La", "I", "F")


class Header(NamedTuple):
    """What is known of an encoded picture before its pixels are read.

    Attributes:
      height, width: of the picture as it is shown.
      gray: whether it is stored without colors.
      frames: number of pictures in it.
    """

    height: int
    width: int
    gray: bool
    frames: int


class Undecodable(ConfigError):
    """A picture that cannot be used; the message is the reason, as part of a line."""


def read_header(data: bytes) -> Header:
    """Reads the size of an encoded picture, but not its pixels.

    Raises:
      Undecodable: not a picture, a damaged header, or too many pixels or frames.
    """
    with _opened(data) as picture:
        width, height = picture.size
        frames = _frames(picture)
        if frames * width * height > MAX_FRAME_PIXELS:
            raise Undecodable(
                f"its {frames:,} frames have {frames * width * height:,} pixels; "
                f"{MAX_FRAME_PIXELS:,} are allowed"
            )
        gray = all(_is_gray(picture, frame) for frame in range(frames))
        if orientation(picture) >= 5:
            height, width = width, height
        return Header(height, width, gray, frames)


def decode(data: bytes, frames: slice, shape: tuple[int, int, int]) -> np.ndarray:
    """Some frames of an encoded picture, uint8 [frames, *shape].

    Args:
      data: the content of a file.
      frames: which frames.
      shape: (height, width, channels) to fit each of them to, with 1 or 3 channels.

    Raises:
      Undecodable: a damaged picture, or pixel values of no fixed range.
    """
    with _opened(data) as picture:
        if picture.format in ("JPEG", "MPO"):
            _shrink_on_load(picture, shape)
        numbers = range(_frames(picture))[frames]
        result = np.empty((len(numbers), *shape), np.uint8)
        for i, frame in enumerate(numbers):
            if picture.tell() != frame:
                picture.seek(frame)
            shown = eight_bits(upright(picture), "it", flatten=True)
            shown = shown.convert("L" if shape[2] == 1 else "RGB")
            values = np.asarray(shown).reshape(*shown.size[::-1], shape[2])
            result[i] = resized(values, shape)
        return result


def resized(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The largest center crop with the aspect ratio of `shape`, resized to it with antialiasing."""
    height, width, _ = shape
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    scale = min(image.shape[0] / height, image.shape[1] / width)
    crop_height, crop_width = scale * height, scale * width
    top, left = (image.shape[0] - crop_height) / 2, (image.shape[1] - crop_width) / 2
    box = (left, top, left + crop_width, top + crop_height)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture).reshape(shape)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """While entered, a Pillow image; whatever Pillow raises inside becomes `Undecodable`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            pixels = picture.width * picture.height
            if pixels > MAX_PIXELS:
                raise Undecodable(_too_many(f"{picture.width}x{picture.height}"))
            yield picture
    except Undecodable:
        raise
    except Image.UnidentifiedImageError:
        raise Undecodable(f"it is not an image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise Undecodable(_too_many("too many")) from None
    except Exception as error:  # decoders raise many types for damaged files
        raise Undecodable(reason_of(error)) from None


def _too_many(pixels: str) -> str:
    return f"its header announces {pixels} pixels; {MAX_PIXELS:,} are allowed"


def _frames(picture: Any) -> int:
    """The number of frames; only those of animations count."""
    return getattr(picture, "n_frames", 1) if picture.format in ANIMATED else 1


def _is_gray(picture: Any, frame: int) -> bool:
    """Whether a frame has no colors: by its mode, or by its palette."""
    if frame != picture.tell():
        picture.seek(frame)
    if picture.mode in GRAY_MODES or picture.mode.startswith("I;"):
        return True
    if picture.mode in ("P", "PA"):
        palette = picture.palette
        raw = palette.palette if (palette.rawmode or palette.mode) == "RGB" else None
        colors = np.array(picture.getpalette("RGB") if raw is None else list(raw)).reshape(-1, 3)
        return bool(np.all(colors == colors[:, :1]))
    if frame == 0:
        return False
    colors = np.asarray(picture.convert("RGB"))  # Pillow shows later frames in color
    return bool(np.all(colors == colors[..., :1]))


def _shrink_on_load(picture: Any, shape: tuple[int, int, int]):
    """Lets a JPEG be decoded at a fraction of its size, at least twice that of `shape`."""
    height, width, _ = shape
    if orientation(picture) >= 5:
        height, width = width, height
    scale = min(picture.width / width, picture.height / height) / 2
    if scale > 1:
        picture.draft(None, (int(picture.width / scale), int(picture.height / scale)))
