"""Grids of images, with labels around them."""

import functools
import importlib.util
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from genai_jax.errors import ConfigError, printable

PIXELS = 1024  # grids are enlarged up to this height and width
WIDE = 2 * PIXELS  # for tiny images, or for their labels
LEAST = 24  # pixels of an image to be seen
GAP = 1  # pixels between images, before scaling
BACKGROUND = 90
TEXT = "white"
FONT = 16  # pixels, in a grid of `PIXELS`; larger in a larger one
SMALL = 11  # pixels, where it does not fit otherwise
SHARE = 0.25  # of the width, that labels of rows have at most
MOST_COLUMNS = 20  # with a name for each
MOST_IN_A_ROW = 6  # more than in a square grid, of images whose names never repeat
SCALE = re.compile(r"[-+.\d]+")  # numbers along an axis, some of which can be left out


class Labels(NamedTuple):
    """Texts around a grid; each tuple is empty, or has one for each column, row, or image.

    Attributes:
      title: above all of it.
      columns: above the columns.
      rows: to the left of the rows.
      cells: above each image.
    """

    title: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(map(bool, self))

    def of_each(self, count: int, columns: int) -> list[str]:
        """The labels of each of `count` images in so many columns, in one line."""
        of = lambda texts, i: texts[i : i + 1]
        parts = [
            (*of(self.rows, i // columns), *of(self.columns, i % columns), *of(self.cells, i))
            for i in range(count)
        ]
        return [", ".join(part) for part in parts]

    def in_one_column(self, count: int, columns: int | None) -> "Labels":
        """The labels of the images of a grid where each has a row of its own."""
        return Labels(self.title, rows=tuple(self.of_each(count, columns or columns_of(count))))


PLAIN = Labels()


def scale(first: float, last: float, count: int, sign: str = "") -> tuple[str, ...]:
    """Labels of values at even distances; `sign` is "+" for a sign before every number."""
    texts = [f"{value:{sign}.2f}" for value in np.linspace(first, last, count)]
    return tuple(text.rstrip("0").rstrip(".") for text in texts)


def columns_of(count: int) -> int:
    """Columns of a grid of so many images that is about square."""
    return math.ceil(math.sqrt(count))


def by_name(names: Sequence[str], title: str = "") -> tuple[int | None, Labels]:
    """Columns and labels of a grid of images with these names.

    Names that repeat in order have columns of their own; one name for all is in the title; any
    other ones are above their images.
    """
    count = len(names)
    repeats = lambda p: all(names[i] == names[i % p] for i in range(count))
    period = next(filter(repeats, range(1, min(count, MOST_COLUMNS) + 1)), count)
    if period == 1:
        return None, Labels(", ".join(filter(None, [names[0], title])))
    if period > MOST_COLUMNS or (period == count and count > columns_of(count) + MOST_IN_A_ROW):
        return None, Labels(title, cells=tuple(names))
    columns = min(count, period * max(1, round(columns_of(count) / period)))
    return columns, Labels(title, tuple(names[:columns]))


def beside(
    original: np.ndarray, edits: np.ndarray, names: Sequence[str], kind: str
) -> tuple[np.ndarray, int, Labels]:
    """Images with the original at the beginning of every row; their columns and labels.

    Args:
      original: [*space, channels].
      edits: [n, *space, channels].
      names: of the edits; empty if they have none.
      kind: of all edits.
    """
    columns = columns_of(len(edits))
    starts = range(0, len(edits), columns)
    parts = [part for i in starts for part in (original[None], edits[i : i + columns])]
    if len({*names}) > 1:
        cells = [text for i in starts for text in ("original", *names[i : i + columns])]
        labels = Labels(kind, cells=tuple(cells))
    else:
        labels = Labels("".join(names[:1]), ("original", *[kind] * columns))
    return np.concatenate(parts), columns + 1, labels


def check_channels(images: np.ndarray):
    """Raises `ConfigError` unless images [..., channels] are gray or RGB, as pictures are."""
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise ConfigError(
            f"images with {channels} channels cannot be shown as pictures, which have 1 or 3; "
            "write them to an .npy or .npz file"
        )


def grid(
    images: np.ndarray, columns: int | None = None, labels: Labels | None = None
) -> np.ndarray:
    """Arranges images [n, height, width, channels], uint8, in a grid [height, width, 3].

    Small grids are enlarged by a whole factor, images in them by the same one.

    Args:
      images: in reading order.
      columns: of the grid; about square if None.
      labels: what is written around them.

    Raises:
      ConfigError: a number of channels that no picture has.
    """
    check_channels(images)
    count, height, width, _ = images.shape
    columns = columns or columns_of(count)
    rows = math.ceil(count / columns)
    sheet = np.full(
        (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), BACKGROUND, np.uint8
    )
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + GAP) + GAP, (i % columns) * (width + GAP) + GAP
        sheet[y : y + height, x : x + width] = image  # one channel fills all three
    largest = max(sheet.shape[:2])
    factor = max(1, PIXELS // largest, min(math.ceil(LEAST / min(height, width)), WIDE // largest))
    if not labels:
        return sheet.repeat(factor, 0).repeat(factor, 1)
    longest = max((_width(text, FONT) for text in _above(labels)), default=0)
    wanted = math.ceil((longest + FONT / 2) / (width + GAP))
    factor = max(factor, min(wanted, WIDE // largest))
    enlarged = sheet.repeat(factor, 0).repeat(factor, 1)
    return _labeled(enlarged, (height + GAP) * factor, (width + GAP) * factor, labels)


def _above(labels: Labels) -> tuple[str, ...]:
    """The texts that are not to be longer than a column is wide."""
    names = labels.columns if not _is_scale(labels.columns) else ()
    return (*names, *labels.cells)


def _labeled(sheet: np.ndarray, height: int, width: int, labels: Labels) -> np.ndarray:
    """An enlarged grid with its labels; (height, width) is the distance between images."""
    from PIL import Image, ImageDraw

    size = max(FONT, min(2 * FONT, FONT * sheet.shape[1] // PIXELS, height // 2))
    line, pad = math.ceil(1.5 * size), size // 2
    rows, gap = sheet.shape[0] // height, sheet.shape[0] % height
    strip = line * bool(labels.cells)
    left = _left(labels, size, int(SHARE * sheet.shape[1]))
    top = line * (bool(labels.title) + bool(labels.columns))
    canvas = Image.new(
        "RGB", (left + sheet.shape[1], top + sheet.shape[0] + rows * strip), (BACKGROUND,) * 3
    )
    write = _Writer(ImageDraw.Draw(canvas), size)
    for i in range(rows):
        y = top + i * (height + strip) + strip
        part = sheet[i * height : (i + 1) * height + gap]
        canvas.paste(Image.fromarray(part), (left, y))
        if i < len(labels.rows):
            write.left(labels.rows[i], pad, y + height // 2, left - 2 * pad)
    columns = sheet.shape[1] // width
    middle = lambda column: left + column * width + (width + gap) // 2
    for i, text in enumerate(labels.cells):
        y = top + (i // columns) * (height + strip) + strip // 2
        write.center(text, middle(i % columns), y + pad // 2, width)
    write.center(labels.title, left + sheet.shape[1] // 2, line // 2, sheet.shape[1])
    stride = write.stride(labels.columns, width)
    for i, text in enumerate(labels.columns[:columns]):
        if i % stride == 0:
            write.center(text, middle(i), top - line // 2, width * stride, canvas.width)
    return np.asarray(canvas)


def _left(labels: Labels, size: int, most: int) -> int:
    """Width of the labels of the rows with their margins."""
    widths = [_width(text, size) for text in labels.rows]
    return min(math.ceil(max(widths)), most) + size if widths else 0


class _Writer:
    """Writes texts in at most a given width: smaller, or else cut."""

    def __init__(self, draw: Any, size: int):
        self._draw, self._size = draw, size

    def center(self, text: str, x: float, y: float, width: float, within: float | None = None):
        """Centered at (x, y), but inside of 0 .. within."""
        text, font = self._fit(text, width)
        half = font.getlength(text) / 2
        if within is not None:
            x = min(max(x, half), within - half)
        self._draw.text((x, y), text, TEXT, font, anchor="mm")

    def left(self, text: str, x: float, y: float, width: float):
        """From x on, centered at y."""
        text, font = self._fit(text, width)
        self._draw.text((x, y), text, TEXT, font, anchor="lm")

    def stride(self, texts: tuple[str, ...], width: int) -> int:
        """Every how many columns one label of a scale fits; 1 for names, which are cut instead."""
        if not _is_scale(texts):
            return 1
        longest = max(_width(f"{text}0", self._size) for text in texts)
        return math.ceil(longest / width)

    def _fit(self, text: str, width: float) -> tuple[str, Any]:
        text = _line(text)
        for size in range(self._size, SMALL - 1, -1):
            font = _font(size, text.isascii())
            if font.getlength(text) <= width:
                return text, font
        while text and font.getlength(f"{text}...") > width:
            text = text[:-1]
        return f"{text}..." if text else "", font


def _is_scale(texts: tuple[str, ...]) -> bool:
    return bool(texts) and all(SCALE.fullmatch(text) for text in texts)


def _width(text: str, size: int) -> float:
    text = _line(text)
    return _font(size, text.isascii()).getlength(text)


def _line(text: str) -> str:
    """At most so much of a text as any grid has room for."""
    return printable(text[:500])


@functools.cache
def _font(size: int, plain: bool = True) -> Any:
    """Pillow's own font or, for letters beyond ASCII, the one that comes with matplotlib."""
    from PIL import ImageFont

    if plain:
        return ImageFont.load_default(size)
    package = importlib.util.find_spec("matplotlib")
    folder = pathlib.Path(package.origin).parent if package and package.origin else pathlib.Path()
    try:
        return ImageFont.truetype(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    except OSError:
        return _font(size)
