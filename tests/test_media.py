"""Writing arrays as images, and reading them back."""

import numpy as np
import pytest
from PIL import Image

from genai_jax import grids, media
from genai_jax.config import ConfigError

IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)


def test_a_grid_has_its_images_in_reading_order_and_is_enlarged_by_a_whole_factor():
    sheet = media.grid(media.to_bytes(IMAGES, 6), columns=3)
    factor = sheet.shape[1] // 16
    assert sheet.shape == (11 * factor, 16 * factor, 3) and factor > 1
    small = sheet[::factor, ::factor]
    for i in range(6):
        y, x = (i // 3) * 5 + 1, (i % 3) * 5 + 1
        assert np.all(small[y : y + 4, x : x + 4] == i * 51)
    assert np.all(small[0] == grids.BACKGROUND)


def test_every_kind_of_example_can_be_every_kind_of_picture(tmp_path):
    for shape in ((3, 16, 1), (3, 4, 4, 3), (3, 5, 4, 4, 3)):
        values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        sizes = set()
        for suffix, kind in media.PICTURES.items():
            path = tmp_path / f"x{suffix}"
            media.write_examples(path, values, 256)
            media.write_example(tmp_path / f"one{suffix}", values[0], 256)
            moves = suffix == ".gif" and len(shape) == 5
            for name in (path, tmp_path / f"one{suffix}"):
                with Image.open(name) as file:
                    assert file.format == kind and getattr(file, "n_frames", 1) == 1 + 4 * moves
            with Image.open(path) as file:
                sizes |= set() if moves else {file.size}
        assert len(sizes) == 1


def test_rows_of_a_picture_of_videos_are_their_frames():
    videos = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((4, 4, 1), np.uint8)
    np.testing.assert_array_equal(media.picture(videos, 6), media.picture(IMAGES, 6, columns=3))


def test_a_written_image_is_read_back_exactly(tmp_path):
    levels = np.random.default_rng(0).integers(0, 17, (8, 8, 1)).astype(np.uint8)
    path = str(tmp_path / "x.png")
    Image.fromarray(media.to_bytes(levels, 17)[..., 0]).save(path)
    image = media.read_image(path, (8, 8, 1), flag="init_image", levels=17)
    np.testing.assert_array_equal(image, levels)


def test_images_of_the_wrong_size_or_format_are_errors(tmp_path):
    path = str(tmp_path / "x.png")
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(path)
    with pytest.raises(ConfigError, match=r"is 4x8 with 3 channel.*are 8x8 with 3"):
        media.read_image(path, (8, 8, 3), flag="init_image", levels=256)
    with pytest.raises(ConfigError, match=r"is 4x8 with 3 channel.*are 4x8 with 1"):
        media.read_image(path, (4, 8, 1), flag="init_image", levels=256)
    assert media.read_image(path, (4, 8, 1), flag="mask", levels=256).shape == (4, 8, 1)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ConfigError, match="it is not an image"):
        media.read_image(str(tmp_path / "text.png"), (8, 8, 1), flag="mask", levels=256)
    with pytest.raises(ConfigError, match="is for images"):
        media.read_image(path, (16, 1), flag="init_image", levels=256)


def read(path, picture, channels=1, flag="init_image", **options):
    picture.save(path, **options)
    height, width = 2, 4
    return media.read_image(str(path), (height, width, channels), flag=flag, levels=256)


GRAY = np.array([[0, 64, 128, 255], [1, 2, 3, 4]], np.uint8)


def test_pictures_of_other_modes_are_read_as_they_look(tmp_path):
    png, gray = tmp_path / "x.png", GRAY[..., None]
    color = np.repeat(gray, 3, -1)
    np.testing.assert_array_equal(read(png, Image.fromarray(GRAY.astype(np.uint16) * 257)), gray)
    wide = Image.fromarray(GRAY.astype(np.int32) * 257)
    np.testing.assert_array_equal(read(tmp_path / "x.tiff", wide), gray)
    white = np.where(gray > 99, 255, 0)
    np.testing.assert_array_equal(read(png, Image.fromarray(GRAY > 99)), white)
    np.testing.assert_array_equal(read(png, Image.fromarray(GRAY > 99), flag="mask"), white)
    opaque = np.concatenate([color, np.full_like(gray, 255)], -1)
    np.testing.assert_array_equal(read(png, Image.fromarray(opaque), 3), color)
    palette = Image.fromarray(color).quantize(8)
    np.testing.assert_array_equal(read(png, palette, 3), color)
    turned = Image.fromarray(np.rot90(GRAY))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    np.testing.assert_array_equal(read(png, turned, exif=exif), gray)


def test_pictures_without_a_fixed_look_are_refused(tmp_path):
    half = np.stack([GRAY] * 4, -1)
    for picture in (Image.fromarray(half), Image.fromarray(half).quantize(8)):
        for flag, channels in (("init_image", 3), ("mask", 1)):
            with pytest.raises(ConfigError, match=f"--{flag}=.* has transparent pixels: flatten"):
                read(tmp_path / "x.png", picture, channels, flag)
    for values in (GRAY.astype(np.float32), GRAY.astype(np.int32) << 16):
        with pytest.raises(ConfigError, match=r"mode [FI].*: save it as 8-bit gray or RGB"):
            read(tmp_path / "x.tiff", Image.fromarray(values))
