"""TFDS image sets, written and read as ArrayRecord without TensorFlow."""

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from genai_jax.config import ConfigError
from genai_jax.data.images.loader import ImageDataConfig, ImageLoader
from genai_jax.data.images.sources import open_images
from genai_jax.data.images.tfds import resized

SIZES = {"train": 20, "test": 6}


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (12, 16, 3)).astype(np.uint8)


def png(values: np.ndarray) -> bytes:
    """Encoded here: TFDS encodes arrays by TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    return file.getvalue()


class TinyPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(12, 16, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "text": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {name: self._examples(name, size) for name, size in SIZES.items()}

    def _examples(self, name, size):
        for i in range(size):
            index = i + 100 * (name == "test")
            yield i, {"image": png(picture(index)), "label": i % 2, "text": f"{name} {i}"}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def config(data_dir, **changes):
    return ImageDataConfig(dataset="tiny_pictures", data_dir=data_dir, batch_size=4, **changes)


def test_images_labels_and_captions_come_back_as_written(data_dir):
    source = open_images(config(data_dir, caption_key="text", captions=True), "train")
    assert source.shape == (12, 16, 3) and source.label_names == (("cat", "dog"),)
    assert len(source) == 20
    found = {source[i]["caption"]: source[i] for i in range(20)}
    for i in range(20):
        example = found[f"train {i}"]
        np.testing.assert_array_equal(example["image"], picture(i))
        assert example["labels"].tolist() == [i % 2]
    held_out = open_images(config(data_dir), "validation")
    assert held_out.name.endswith("[test]") and len(held_out) == 6
    assert "tensorflow" not in sys.modules and "torch" not in sys.modules


def test_batches_and_mirror_images(data_dir):
    loader = ImageLoader(config(data_dir, flip=True, image_size=8, prefetch=0), 0)
    batches = loader.batches()
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (4, 8, 8, 3) and batch["labels"].shape == (4, 1)
    assert loader.parse_label("dog") == (1,)
    source = loader.open("train")
    plain = {source[i]["image"].tobytes() for i in range(20)}
    mirrored = {source[i]["image"][:, ::-1].tobytes() for i in range(20)}
    kinds = [x.tobytes() in plain for x in batch["image"]]
    assert all(x.tobytes() in plain | mirrored for x in batch["image"])
    several = [next_batch for next_batch in _first(loader, 5)]
    kinds = [x.tobytes() in plain for b in several for x in b["image"]]
    assert any(kinds) and not all(kinds)


def _first(loader, count):
    batches = loader.batches()
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def test_the_centre_is_kept_and_resized():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 200
    assert np.all(resized(image, (4, 4, 3)) == 200)
    half = resized(image, (2, 4, 3))
    assert half.shape == (2, 4, 3) and half[:, 0].max() < 60 and half[:, 1:3].min() > 140


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_key": "x"}, "--data.image_key=x: tiny_pictures has image, label, text"),
        ({"label_key": "text"}, "--data.label_key=text of tiny_pictures is no class"),
        ({"image_key": "text"}, "of tiny_pictures is no image"),
        ({"captions": True}, "--data.captions: tiny_pictures has no captions"),
    ],
)
def test_features_that_are_not_there(data_dir, changes, said):
    with pytest.raises(ConfigError, match=said):
        open_images(config(data_dir, **changes), "train")
