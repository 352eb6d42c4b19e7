"""TFDS image data sets, written and read as ArrayRecord without TensorFlow."""

import io
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from genai_jax.config import ConfigError
from genai_jax.data.images.loader import ImageDataConfig, ImageLoader
from genai_jax.data.images.sources import open_images
from genai_jax.data.images.tfds import resized
from genai_jax.data.shapes_only import shapes_only

SIZES = {"train": 20, "test": 6}


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (12, 16, 3)).astype(np.uint8)


def png(values: np.ndarray) -> bytes:
    """Encoded here, since TFDS would encode arrays with TensorFlow."""
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


def test_images_labels_and_captions_round_trip(data_dir):
    source = open_images(config(data_dir, caption_key="text", captions=True), "train")
    assert source.shape == (12, 16, 3) and source.label_names == (("cat", "dog"),)
    assert len(source) == 20
    by_caption = {source[i]["caption"]: source[i] for i in range(20)}
    for i in range(20):
        example = by_caption[f"train {i}"]
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
    assert all(x.tobytes() in plain | mirrored for x in batch["image"])
    is_plain = [x.tobytes() in plain for b in _first(loader, 5) for x in b["image"]]
    assert any(is_plain) and not all(is_plain)


def _first(loader, count):
    batches = loader.batches()
    first_batches = [next(batches) for _ in range(count)]
    batches.close()
    return first_batches


def test_resizing_keeps_the_center():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 200
    assert np.all(resized(image, (4, 4, 3)) == 200)
    half = resized(image, (2, 4, 3))
    assert half.shape == (2, 4, 3) and half[:, 0].max() < 60 and half[:, 1:3].min() > 140


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_key": "x"}, "--data.image_key=x: tiny_pictures has image, label, text"),
        ({"label_key": "text"}, "--data.label_key=text of tiny_pictures is not a class label"),
        ({"image_key": "text"}, "of tiny_pictures is not an image"),
        ({"captions": True}, "--data.captions: tiny_pictures has no captions"),
    ],
)
def test_missing_features_are_errors(data_dir, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_images(config(data_dir, **changes), "train")


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        (
            tfds.features.Image(shape=(8, 8, 4)),
            r"have 4 channel\(s\) of uint8; prepare it with 1 or 3",
        ),
        (tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16), r"1 channel\(s\) of uint16"),
        (tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32), r"1 channel\(s\) of float32"),
    ],
)
def test_pixels_that_cannot_be_shown_are_refused_before_training(monkeypatch, feature, said):
    info = types.SimpleNamespace(features={"image": feature}, splits={"train": None})
    builder = types.SimpleNamespace(info=info)
    monkeypatch.setattr("genai_jax.data.images.tfds.prepared_builder", lambda *_: builder)
    with pytest.raises(ConfigError, match=said):
        open_images(config("/nowhere", label_key=""), "train")


def test_shapes_are_known_without_the_data(tmp_path):
    with shapes_only():
        loader = ImageLoader(ImageDataConfig(dataset="cifar10", data_dir=str(tmp_path)), 0)
    assert loader.shape == (32, 32, 3) and loader.label_sizes == (10,)
    assert not list(tmp_path.iterdir())
