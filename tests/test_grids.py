"""Labels around the images of a grid, which leave the images as they are."""

import numpy as np
import pytest
from PIL import Image

from genai_jax import grids
from genai_jax.grids import Labels, beside, by_name, grid, scale
from genai_jax.requests import ArrayRequest, origin_of
from genai_jax.sampled import Arrays

RNG = np.random.default_rng(0)
LABELS = Labels("a title", ("zero", "one", "two"), ("first", "second"), tuple("abcdef"))


def images(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    """Random images, each with a color of its own in its corner."""
    pixels = RNG.integers(100, 240, (count, height, width, 3)).astype(np.uint8)
    pixels[:, 0, 0] = [(i, 250, 20) for i in range(count)]
    return pixels


def place_of(picture: np.ndarray, image: np.ndarray) -> tuple[int, int, int]:
    """(factor, y, x) of an enlarged image in a picture, pixel by pixel."""
    (ys, xs) = np.nonzero(np.all(picture == image[0, 0], -1))
    y, x, factor = int(ys[0]), int(xs[0]), int(ys[-1] - ys[0] + 1)
    large = image.repeat(factor, 0).repeat(factor, 1)
    part = picture[y : y + large.shape[0], x : x + large.shape[1]]
    np.testing.assert_array_equal(part, large)
    return factor, y, x


def text_in(picture: np.ndarray, rows: slice, columns: slice) -> bool:
    return bool(np.any(np.all(picture[rows, columns] == 255, -1)))


@pytest.mark.parametrize(
    "labels",
    [LABELS, Labels("t"), Labels(columns=LABELS.columns), Labels(rows=LABELS.rows),
     Labels(cells=LABELS.cells)],
)  # fmt: skip
def test_every_image_is_in_the_picture_as_it_is_in_reading_order(labels):
    shown = images(6)
    picture = grid(shown, 3, labels)
    factors, ys, xs = zip(*(place_of(picture, image) for image in shown), strict=True)
    assert len({*factors}) == 1 and factors[0] > 10
    assert list(ys) == sorted(ys) and len({*ys}) == 2 and len({*xs}) == 3
    assert xs[:3] == xs[3:] and list(xs[:3]) == sorted(xs[:3])
    side = 8 * factors[0]
    above = text_in(picture, slice(0, ys[0]), slice(xs[0], xs[0] + side))
    left = text_in(picture, slice(ys[0], ys[0] + side), slice(0, xs[0]))
    assert left == bool(labels.rows)
    assert above == bool(labels.columns or labels.cells)
    assert text_in(picture, slice(0, ys[0]), slice(None)) == (labels != Labels(rows=labels.rows))
    gap = text_in(picture, slice(ys[0] + side, ys[3]), slice(None))
    assert gap == bool(labels.cells)


def test_no_label_is_cut_that_can_be_written_smaller_or_has_room():
    tiny = images(40, 2, 2)  # enlarged as much as the names need, if that is possible
    wide = grid(tiny, 10, Labels(columns=("hummingbird",) * 10)).shape[1]
    plain = grid(tiny, 10).shape[1]
    assert plain <= wide <= grids.WIDE
    fitted = []

    class Canvas:
        def text(self, place, text, fill, font, anchor):
            fitted.append((text, font.getlength(text)))

    writer = grids._Writer(Canvas(), grids.FONT)
    for width in (10, 40, 80, 200):
        writer.center("a large red circle", 0, 0, width)
        assert fitted[-1][1] <= width
    assert fitted[-1][0] == "a large red circle" and fitted[-2][0].endswith("...")
    writer.center("two\nlines \x1b[31m", 0, 0, 500)
    assert fitted[-1][0] == "two lines \\x1b[31m"


def test_numbers_along_an_axis_are_left_out_where_there_is_no_room():
    writer = grids._Writer(None, grids.FONT)
    assert writer.stride(scale(0, 1, 64), 20) > 1
    assert writer.stride(scale(0, 1, 5), 200) == 1
    assert writer.stride(("zero", "one"), 3) == 1  # names are cut
    assert scale(0, 1, 5) == ("0", "0.25", "0.5", "0.75", "1")
    assert scale(-3, 3, 3, "+") == ("-3", "+0", "+3")


@pytest.mark.parametrize(
    ("names", "columns", "labels"),
    [
        ("0123456789" * 6, 10, Labels(columns=tuple("0123456789"))),
        ("0123456789" + "012345", 10, Labels(columns=tuple("0123456789"))),
        ("ab" * 32, 8, Labels(columns=tuple("abababab"))),
        ("a" * 9, None, Labels("a")),
        ("abc", 3, Labels(columns=tuple("abc"))),
        ("ab", 2, Labels(columns=tuple("ab"))),
        ("aab", 3, Labels(columns=tuple("aab"))),
        ([f"class {i}" for i in range(100)], None, None),
        (["a", "b", "c", "a", "a"] * 4 + ["c"], None, None),
    ],
)
def test_images_of_a_class_are_in_columns_of_their_own(names, columns, labels):
    assert by_name(list(names)) == (columns, labels or Labels(cells=tuple(names)))


def test_ten_thousand_names_take_no_time():
    names = ["a"] * 10_000 + ["b"]
    assert by_name(names)[1].cells == tuple(names)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_original_begins_every_row(count):
    edits, original = images(count), images(1)[0]
    shown, columns, labels = beside(original, edits, (), "strength 0.6")
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    assert all(np.array_equal(row[0], original) for row in rows)
    assert np.array_equal(np.concatenate([row[1:] for row in rows]), edits)
    assert labels.columns == ("original", *["strength 0.6"] * (columns - 1))
    _, _, labels = beside(original, edits, [str(i) for i in range(count)], "inpainted")
    if count > 1:
        assert labels.title == "inpainted" and labels.cells[: columns] == (
            "original", *map(str, range(columns - 1)),
        )  # fmt: skip
        assert len(labels.cells) == len(shown)
    else:
        assert labels == Labels("0", ("original", "inpainted"))


def sampled(*space: int, annotate: bool = True, **more) -> Arrays:
    origin = origin_of(ArrayRequest(annotate=annotate), 3)
    values = RNG.integers(0, 17, (6, *space, 1)).astype(np.uint8)
    labels = np.array([[0], [1], [2], [0], [1], [2]], np.int32)
    return Arrays("x", values, 17, labels, (("zero", "$one$", "two"),), origin=origin, **more)


@pytest.mark.parametrize("space", [(16,), (4, 5), (3, 4, 5)])
def test_labels_can_be_turned_off_and_are_never_in_arrays(tmp_path, space):
    with_labels, without = sampled(*space), sampled(*space, annotate=False)
    assert with_labels.picture().shape != without.picture().shape
    assert without.write("", tmp_path)[0].endswith(f"annotate-False{without.suffix}")
    for suffix in (".png", ".jpg", ".gif"):
        sizes = []
        for one in (with_labels, without):
            (path,) = one.write(str(tmp_path / f"x{suffix}"), tmp_path)
            with Image.open(path) as file:
                sizes.append((file.size, getattr(file, "n_frames", 1)))
        assert sizes[0][0] != sizes[1][0] and sizes[0][1] == sizes[1][1]
    (path,) = with_labels.write(str(tmp_path / "x.npy"), tmp_path)
    np.testing.assert_array_equal(np.load(path), with_labels.examples)
    with_labels.write(f"{tmp_path}/folder/", tmp_path)
    with Image.open(tmp_path / "folder" / f"00000{with_labels.suffix}") as file:
        assert len(space) == 1 or file.size == (5, 4)


@pytest.mark.parametrize("text", ["café naïve", "größer als ½", "Привет", "λ=0.5"])
def test_letters_beyond_ascii_have_shapes_of_their_own(text):
    font = grids._font(20, text.isascii())
    lacking = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != lacking for letter in text if letter != " ")
