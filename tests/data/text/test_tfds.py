import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from genai_jax.config import ConfigError
from genai_jax.data.text.loader import DataConfig, TextLoader
from genai_jax.data.text.sources import open_source


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    SIZES = {}  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "id": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {name: self._examples(name, size) for name, size in self.SIZES.items()}

    def _examples(self, name, size):
        for i in range(size):
            yield i, {"text": f"{name} example {i}: é", "id": str(i)}

    def _generate_examples(self):
        raise NotImplementedError


class TinyPlain(_Builder, skip_registration=True):
    SIZES = {"train": 40}  # noqa: RUF012


class TinySplit(_Builder, skip_registration=True):
    SIZES = {"train": 20, "validation": 5, "test": 4}  # noqa: RUF012


class TinyTest(_Builder, skip_registration=True):
    SIZES = {"train": 20, "test": 4}  # noqa: RUF012


class TinyOdd(_Builder, skip_registration=True):
    SIZES = {"everything": 3}  # noqa: RUF012


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TinyPlain, TinySplit, TinyTest, TinyOdd):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def open_split(data_dir, name, split="train", **changes):
    source = open_source(DataConfig(dataset=name, data_dir=data_dir, **changes), split)
    return source, [source[i] for i in range(len(source))]


def test_own_splits(data_dir):
    train, texts = open_split(data_dir, "tiny_split")
    assert sorted(texts) == sorted(f"train example {i}: é" for i in range(20))
    validation, texts = open_split(data_dir, "tiny_split", "validation")
    assert sorted(texts) == [f"validation example {i}: é" for i in range(5)]
    assert (train.name, validation.name) == (
        "tiny_split/1.0.0[train]",
        "tiny_split/1.0.0[validation]",
    )
    assert train.fingerprint() != validation.fingerprint()
    assert "tensorflow" not in sys.modules and "torch" not in sys.modules


def test_version_in_the_name(data_dir):
    assert open_split(data_dir, "tiny_split:1.0.0")[0].name == "tiny_split/1.0.0[train]"


def test_test_split_serves_as_validation(data_dir):
    source, texts = open_split(data_dir, "tiny_test", "validation")
    assert source.name == "tiny_test/1.0.0[test]" and len(texts) == 4
    assert len(open_split(data_dir, "tiny_test")[1]) == 20


def test_held_out_documents(data_dir):
    train, train_texts = open_split(data_dir, "tiny_plain", validation_percent=20)
    validation, texts = open_split(data_dir, "tiny_plain", "validation", validation_percent=20)
    assert validation.name == "tiny_plain/1.0.0[train]/validation"
    assert len(texts) == 8 and len(train_texts) == 32
    assert len(set(texts) | set(train_texts)) == 40
    assert train.fingerprint() != open_split(data_dir, "tiny_plain")[0].fingerprint()


def test_text_key(data_dir):
    _, texts = open_split(data_dir, "tiny_split", "validation", text_key="id")
    assert sorted(texts) == list("01234")
    with pytest.raises(ConfigError, match=r"text_key=body: tiny_split has .*id.*text"):
        open_split(data_dir, "tiny_split", text_key="body")


def test_no_train_split(data_dir):
    with pytest.raises(ConfigError, match="tiny_odd has no train split, only everything"):
        open_split(data_dir, "tiny_odd")


@pytest.mark.parametrize("name", ["python_dogs", "lm1bb", "nothing_like_it", "not a name", ""])
def test_unknown_name(data_dir, name):
    with pytest.raises(ConfigError, match="data set") as error:
        open_split(data_dir, name)
    message = str(error.value)
    assert repr(name) in message and "\n" not in message and len(message) < 500
    if name in ("python_dogs", "lm1bb"):
        assert "did you mean" in message and ("python_docs" in message and "TFDS" in message)
        assert data_dir in message
    assert ("lm1b," in message or "lm1b?" in message) == (name == "lm1bb")


def test_data_in_another_format(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/tiny_split", tmp_path / "tiny_split")
    info = tmp_path / "tiny_split" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match="tiny_split") as error:
        open_split(str(tmp_path), "tiny_split")
    assert "\n" not in str(error.value)


def test_data_that_cannot_be_prepared(tmp_path, monkeypatch):
    def fail(self, **kwargs):
        raise OSError("no network\nfor you")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(
        ConfigError, match=r"lm1b is not prepared in .*, and preparing it failed: no network for"
    ) as error:
        open_split(str(tmp_path), "lm1b")
    assert str(tmp_path) in str(error.value)


def test_loader_reads_tfds(data_dir):
    config = DataConfig(dataset="tiny_split", data_dir=data_dir, batch_size=2, sequence_length=32)
    loader = TextLoader(config, seed=0)
    iterator = loader.batches()
    assert "train example" in loader.tokenizer.decode(next(iterator)["tokens"][0])
    iterator.close()
    total = sum(batch["loss_mask"].sum() for batch in loader.evaluation_batches())
    assert total == 5 * (len("validation example 0: é".encode()) + 1)
    assert loader.fingerprint()["validation_documents"] == 5
