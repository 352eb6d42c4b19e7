"""A folder of pictures: what is read, how it is fitted, split, labeled, and said."""

import json
import os
import shutil
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from genai_jax.config import ConfigError
from genai_jax.data.images import collection, pixel_cache
from genai_jax.data.images.decoding import MAX_PIXELS, decode, read_header
from tests.data.images.picture_files import (
    COLORS,
    encoded,
    everything,
    images_of,
    loader,
    own_cache,  # noqa: F401  a fixture of all tests here
    tile,
    write_tiles,
)
from tests.test_files import png


def test_classes_are_folders_and_pixels_are_those_of_the_files(tmp_path, capsys):
    write_tiles(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    data = loader(f"images:{tmp_path}")
    assert data.label_names == (("brick", "grass", "water"),) and data.shape == (16, 16, 3)
    expected = {
        tile(name, i).tobytes(): sorted(COLORS).index(name) for name in COLORS for i in range(10)
    }
    found = {e["image"].tobytes(): int(e["labels"][0]) for e in everything(data)}
    assert found == expected and data.parse_label("grass") == (1,)
    for name in ("train", "validation"):  # the same share of each class
        counts = np.bincount([e["labels"][0] for e in map(data.open(name).__getitem__, range(6))])
        assert name == "train" or counts.tolist() == [2, 2, 2]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("note: images:")
    for part in ("30 pictures (24 train, 6 validation)", "3 classes (brick 10, grass 10, water 10)",
                 "16x16 pixels", "color", "1 hidden, 1 with other suffixes"):  # fmt: skip
        assert part in said[0]


def test_copies_fall_on_the_same_side_and_names_do_not_matter(tmp_path):
    for i in range(40):
        data = encoded(tile("grass", i % 20))
        for folder, name in (("a", f"{i}.png"), ("b", f"{99 - i}.png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(data)
    sides = []
    for folder in "ab":
        data = loader(f"images:{tmp_path / folder}", validation_percent=25)
        train, held_out = ({x.tobytes() for x in images_of(data, s)} for s in data_splits())
        assert not train & held_out and len(held_out) == 5 and len(train) == 15
        assert len(data.open("validation")) == 10
        sides.append(held_out)
    assert sides[0] == sides[1]


def data_splits():
    return "train", "validation"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text,kind\n{}"),
        ("captions.jsonl", "\n{}"),
    ],
)
def test_tables_give_captions_and_labels(tmp_path, capsys, name, text):
    rows = [(f"sub/{i}.png", f"tile, number {i}", i % 3) for i in range(9)]
    (tmp_path / "sub").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / row[0]).write_bytes(encoded(tile("grass", i)))
    rows.append(("sub/gone.png", "gone", 0))
    csv = [f'{file},"{caption}",{kind}' for file, caption, kind in rows]
    objects = [
        json.dumps(dict(file_name=file, caption=caption, kind=kind)) for file, caption, kind in rows
    ]
    lines = csv if name.endswith(".csv") else objects
    (tmp_path / name).write_text(text.format("\n".join(lines) + "\n"))
    data = loader(f"images:{tmp_path}", captions=True, label_key="kind")
    captions = {e["caption"]: int(e["labels"][0]) for e in everything(data)}
    assert captions == {caption: kind for _, caption, kind in rows[:9]}
    assert data.label_names == (("0", "1", "2"),)
    assert f"missing: {os.path.normpath('sub/gone.png')}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--data.caption_key=x: .* has "):
        loader(f"images:{tmp_path}", captions=True, caption_key="x")


def test_folders_named_as_splits_are_splits(tmp_path):
    for part, first, count in (("train", 0, 6), ("val", 6, 3), ("test", 9, 2)):
        for name in COLORS:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(first, first + count):
                (tmp_path / part / name / f"{i}.png").write_bytes(encoded(tile(name, i)))
    data = loader(f"images:{tmp_path}")
    assert [len(data.open(s)) for s in data_splits()] == [18, 9]
    assert data.label_names == (("brick", "grass", "water"),)
    with pytest.raises(ConfigError, match="validation_percent=50 has no effect"):
        loader(f"images:{tmp_path}", validation_percent=50)
    for part in ("val", "test"):
        shutil.rmtree(tmp_path / part)
    alone = loader(f"images:{tmp_path}")
    assert alone.label_names == data.label_names and len(everything(alone)) == 18


def test_every_frame_of_a_gif_is_a_picture_on_one_side(tmp_path):
    for n in range(4):
        frames = [tile("water", 10 * n + i) for i in range(3)]
        options = dict(save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / f"{n}.gif", **options)
    data = loader(f"images:{tmp_path}")
    assert sorted(len(data.open(s)) for s in data_splits()) == [3, 9] and data.shape == (16, 16, 3)
    shown = decode((tmp_path / "2.gif").read_bytes(), slice(1, 2), data.shape)
    difference = np.abs(shown[0].astype(int) - np.asarray(tile("water", 21)))
    assert difference.max() < 12  # of the palette
    assert any(np.array_equal(shown[0], e["image"]) for e in everything(data))


def test_linked_folders_do_not_go_in_circles(tmp_path):
    inside = write_tiles(tmp_path / "a" / "all", 2)
    outside = write_tiles(tmp_path / "outside", 3)
    (inside / "linked").symlink_to(outside / "grass")
    (outside / "grass" / "back").symlink_to(inside)
    data = loader(f"images:{inside}")
    assert len(everything(data)) == 9 and "linked" in data.label_names[0]


GRAY = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)


def forms_of_gray() -> dict[str, tuple[bytes, int]]:
    """Files that all show GRAY, and how far they may be from it."""
    gray = Image.fromarray(GRAY)
    color = gray.convert("RGB")
    turned = Image.fromarray(np.rot90(GRAY))
    exif = turned.getexif()
    exif[0x0112] = 6
    opaque = color.convert("RGBA")
    return {
        "16-bit": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)), 0),
        "float": (encoded(Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF"), 0),
        "gray with alpha": (encoded(gray.convert("LA")), 0),
        "palette": (encoded(color.quantize(256)), 2),
        "alpha": (encoded(opaque), 0),
        "on its side": (encoded(turned, exif=exif), 0),
        "CMYK": (encoded(color.convert("CMYK"), "JPEG", quality=100), 6),
        "WebP": (encoded(color, "WEBP", lossless=True), 0),
        "JPEG": (encoded(gray, "JPEG", quality=100), 2),
    }


@pytest.mark.parametrize("name", forms_of_gray())
def test_every_mode_is_read_as_it_looks(name):
    data, tolerance = forms_of_gray()[name]
    for channels in (1, 3):
        shown = decode(data, slice(None), (8, 8, channels))
        assert shown.shape == (1, 8, 8, channels)
        assert np.abs(shown[0].astype(int) - GRAY[..., None]).max() <= tolerance


def test_transparent_pixels_are_on_white_and_one_bit_is_black_and_white():
    half = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8), np.uint8)])
    half[:4, :, 3] = 255
    shown = decode(encoded(Image.fromarray(half)), slice(None), (8, 8, 3))[0]
    assert np.all(shown[:4] == 200) and np.all(shown[4:] == 255)
    bits = decode(encoded(Image.fromarray(GRAY > 100)), slice(None), (8, 8, 1))[0]
    np.testing.assert_array_equal(bits[..., 0], np.where(GRAY > 100, 255, 0))


@pytest.mark.parametrize(
    ("pictures", "channels"),
    [
        ([Image.fromarray(GRAY), Image.fromarray(GRAY).convert("LA")], 1),
        ([Image.fromarray(GRAY), Image.fromarray(GRAY > 9), Image.fromarray(GRAY).quantize(9)], 1),
        ([Image.fromarray(GRAY), Image.fromarray(GRAY).convert("RGB")], 3),
    ],
)
def test_one_channel_if_all_are_gray(tmp_path, pictures, channels):
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    assert loader(f"images:{tmp_path}").shape == (8, 8, channels)


def test_other_sizes_are_cropped_to_a_square_and_resized(tmp_path):
    for i, size in enumerate(((40, 20), (20, 40), (64, 64), (300, 200))):
        picture = Image.new("RGB", size, (200, 10, 10))
        side = min(size)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        picture.paste((10, 200, i), (left, top, left + side, top + side))  # all that is kept
        picture.save(tmp_path / f"{i}.{'jpg' if i == 3 else 'png'}", quality=100)
    with pytest.raises(ConfigError, match=r"--data.image_size must be set.*40x20 to 200x300"):
        loader(f"images:{tmp_path}")
    images = [e["image"] for e in everything(loader(f"images:{tmp_path}", image_size=8))]
    assert len(images) == 4
    for image in images:
        assert image.shape == (8, 8, 3)
        assert np.abs(image[1:-1, 1:-1, :2] - [10.0, 200]).max() < 5
        assert np.abs(image[..., :2] - [10.0, 200]).max() < 30  # blocks of a JPEG cross the edge
    wide = loader(f"images:{write_sizes(tmp_path / 'wide', (24, 16))}")
    assert wide.shape == (16, 24, 3)


def write_sizes(folder, size, count=4):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encoded(tile("grass", i, size)))
    return folder


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    for data in (encoded(Image.fromarray(stripes)), encoded(Image.fromarray(stripes), "JPEG")):
        shown = decode(data, slice(None), (8, 8, 1))
        assert np.abs(shown.astype(int) - 127).max() < 14


def test_a_bomb_is_refused_by_its_header():
    bomb = png(30_000, 3_000, b"IDAT")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with pytest.raises(ConfigError, match=f"30000x3000 pixels; {MAX_PIXELS:,} are allowed"):
        read_header(bomb)
    frames = [Image.new("L", (1200, 1200), i) for i in range(2)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    block = gif[gif.rindex(b"\x21\xf9") : -1]  # the last frame
    with pytest.raises(ConfigError, match=r"frames have .* pixels; .* are allowed"):
        read_header(gif[:-1] + block * 1000 + gif[-1:])


def test_damaged_pictures_are_named_and_skipped(tmp_path, capsys):
    write_tiles(tmp_path, 4)
    whole = (tmp_path / "grass" / "000.png").read_bytes()
    (tmp_path / "grass" / "empty.png").touch()
    (tmp_path / "grass" / "bomb.png").write_bytes(png(60_000, 60_000, b"IDAT"))
    (tmp_path / "grass" / "text.gif").write_text("text")
    (tmp_path / "grass" / "cut.png").write_bytes(whole[: len(whole) // 2])
    data = loader(f"images:{tmp_path}", image_size=16)
    assert len(everything(data)) == 12
    said = capsys.readouterr().err
    for name in ("empty.png", "bomb.png", "text.gif", "cut.png"):
        assert said.count(f"grass/{name}: ") == 1 and "12 pictures" in said
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.png").write_bytes(whole[:40])
    with pytest.raises(ConfigError, match=r"none of the 1 pictures .* can be read.*only/a.png: "):
        loader(f"images:{only}", image_size=8)


def test_a_second_run_reads_the_cache_and_a_damaged_cache_is_replaced(
    tmp_path, monkeypatch, own_cache  # noqa: F811
):  # fmt: skip
    write_tiles(tmp_path, 4)
    cut = (tmp_path / "grass" / "000.png").read_bytes()[:-40]
    (tmp_path / "grass" / "cut.png").write_bytes(cut)
    decoded = []
    counted = lambda *a: decoded.append(1) or decode(*a)
    monkeypatch.setattr(collection, "decode", counted)
    expected = images_of(loader(f"images:{tmp_path}", image_size=16), "train")
    assert len(decoded) == 13
    (file,) = own_cache.iterdir()
    content = file.read_bytes()
    for damaged in (None, content[:-1], content[:9] + b"!" + content[10:], b"", content + b"x"):
        if damaged is not None:
            file.write_bytes(damaged)
        decoded.clear()
        images = images_of(loader(f"images:{tmp_path}", image_size=16, batch_size=3), "train")
        np.testing.assert_array_equal(images, expected)
        assert len(decoded) == (0 if damaged is None else 13) and file.read_bytes() == content
    (tmp_path / "grass" / "004.png").write_bytes(encoded(tile("grass", 77)))
    loader(f"images:{tmp_path}", image_size=16)
    assert len(list(own_cache.iterdir())) == 2
    monkeypatch.setattr(pixel_cache, "MAX_TOTAL", 2 * len(content))
    loader(f"images:{tmp_path}", image_size=8)
    loader(f"images:{tmp_path}", image_size=12)
    assert sum(f.stat().st_size for f in own_cache.iterdir()) <= 2 * len(content)
    own_cache.joinpath("x").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where nothing can be written
    assert len(everything(loader(f"images:{tmp_path}", image_size=10))) == 13


def test_batches_are_the_same_whether_or_not_the_pictures_fit_into_memory(tmp_path, monkeypatch):
    write_tiles(tmp_path, 7)
    frames = [tile("water", 50 + i) for i in range(3)]
    options = dict(save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "water" / "x.gif", **options)

    def batches(count: int, prefetch: int, state=None):
        data = loader(f"images:{tmp_path}", batch_size=5, prefetch=prefetch, flip=True)
        iterator = data.batches()
        if state:
            iterator.set_state(state)
        found = [next(iterator) for _ in range(count)]
        state = iterator.get_state()
        iterator.close()
        return found, state

    expected, state = batches(9, 0)
    fingerprint = loader(f"images:{tmp_path}").fingerprint()
    monkeypatch.setattr(collection, "IN_MEMORY", 100)
    late = lambda data, *a: time.sleep(hash(data) % 4 / 1000) or decode(data, *a)
    monkeypatch.setattr(collection, "decode", late)  # workers end in another order
    streamed, streamed_state = batches(9, 3)
    assert streamed_state == state and loader(f"images:{tmp_path}").fingerprint() == fingerprint
    middle = batches(4, 3)[1]
    resumed, _ = batches(5, 2, middle)
    for got, want in (*zip(streamed, expected), *zip(resumed, expected[4:])):  # noqa: B905
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_a_picture_that_is_damaged_later_is_replaced_by_the_next(tmp_path, monkeypatch, capsys):
    write_tiles(tmp_path, 5)
    monkeypatch.setattr(collection, "IN_MEMORY", 100)
    data = loader(f"images:{tmp_path}")
    source, expected = data.open("train"), images_of(data, "train")
    first = tmp_path / "brick" / "000.png"
    index = [x.tobytes() for x in expected].index(tile("brick", 0).tobytes())
    first.write_bytes(first.read_bytes()[:60])
    example = source.many([index])[0]
    np.testing.assert_array_equal(example["image"], expected[(index + 1) % len(expected)])
    assert "skipped a picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("write", "settings", "message"),
    [
        ({}, {}, "has no pictures"),
        ({"x.txt": b""}, {}, "has no pictures: skipped files: 1 with other suffixes"),
        ({"a/x.png": b"1", "y.png": b"2"}, {}, r"outside of them: y.png; .*label_key= for no"),
        ({"x.png": b"1", "metadata.csv": b"a,b\n1,2\n"}, {}, "has no column file_name"),
        ({"x.png": b"1", "metadata.jsonl": b'{"a": 1}\n'}, {}, "a row has no file_name"),
        ({"x.png": b"1", "metadata.jsonl": b"[1]\n"}, {}, "line 1 is not a JSON object"),
        ({"x.png": b"1", "metadata.csv": b"file_name,a\nx.png\n"}, {}, "row 2 has 1 values for 2"),
        ({"x.png": b"1", "metadata.csv": b"file_name,a\nz.png,3\n"}, {}, "z.png are not there"),
        ({"x.png": b"1"}, {"label_key": "kind"}, "label_key=kind: .* has none"),
        ({"x.png": b"1"}, {"captions": True, "caption_key": "t"}, "has no metadata.csv or"),
        ({"x.png": b"1"}, {"data_dir": "/x"}, "data_dir=/x does not apply to images:PATH"),
        ({"x.png": b"1"}, {"image_key": "i"}, "image_key=i does not apply to images:PATH"),
        ({"x.png": encoded(tile("grass", 0))}, {}, "no pictures for validation: add different"),
        ({"x.png": encoded(tile("grass", 0)), "y.png": encoded(tile("grass", 1))},
         {"captions": True}, "has no captions"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(tmp_path, write, settings, message):
    folder = tmp_path / "pictures"
    for name, data in write.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    folder.mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=message) as error:
        loader(f"images:{folder}", **settings).fingerprint()
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"images:.*/gone: no such folder"):
        loader(f"images:{tmp_path / 'gone'}")
    (tmp_path / "file.png").write_bytes(b"1")
    with pytest.raises(ConfigError, match="it is not a folder"):
        loader(f"images:{tmp_path / 'file.png'}")
    with pytest.raises(ConfigError, match="did you mean images:PATH"):
        loader("image")
