"""A split of a TFDS data set, stored as ArrayRecord and read without TensorFlow.

TFDS reads and writes ArrayRecord in plain Python. Many of its builders also prepare their data
without TensorFlow; prepare the others elsewhere and point ``--data.data_dir`` to the result.
"""

import contextlib
import difflib
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from genai_jax.config import ConfigError, MissingFile
from genai_jax.data.shapes_only import only_shapes_matter
from genai_jax.data.shuffle import permuted
from genai_jax.data.text.pair_documents import document_of

VALIDATION_NAMES = ("validation", "valid", "test")


class TfdsSource:
    """Some or all examples of a split.

    If the data set has no validation split, its train split is shuffled in a fixed order, and
    validation gets the beginning, train the rest.
    """

    size_bytes = None

    def __init__(
        self, config, builder: Any, tfds_split: str, part: str | None, keys: Sequence[str]
    ):
        """Opens the data.

        Args:
          config: a `DataConfig`.
          builder: a TFDS builder with prepared data.
          tfds_split: name of the data set's own split.
          part: "train" or "validation" if a part of `tfds_split` is held out; None for all of it.
          keys: features that are text; two make a pair, see `pair_documents`.
        """
        self.name = f"{builder.info.full_name}[{tfds_split}]" + (f"/{part}" if part else "")
        self._examples = builder.as_data_source(split=tfds_split)
        self._keys = keys
        self._strict = config.tokenizer != "bytes"
        self._info = builder.info.splits[tfds_split]
        self._part = part
        self._start, self._stop = held_out_range(
            len(self._examples), config.validation_percent, part
        )

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> str:
        index += self._start
        if self._part:
            index = permuted(index, len(self._examples), seed=(0,))
        example = self._examples[index]
        texts = [self._text(example[key], index) for key in self._keys]
        return texts[0] if len(texts) == 1 else document_of(*texts)

    def _text(self, text: str | bytes, index: int) -> str:
        if isinstance(text, str):
            return text
        try:
            return text.decode("utf-8", "strict" if self._strict else "surrogateescape")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.name}: example {index} is not UTF-8 (byte offset {error.start}); read raw "
                "bytes with --data.tokenizer=bytes"
            ) from None

    def fingerprint(self) -> str:
        """sha256 of the name (with its version), the split, and the sizes of its shards."""
        facts = [self.name, self._start, self._stop, self._info.shard_lengths, self._info.num_bytes]
        facts += [self._keys] * (len(self._keys) > 1)
        return hashlib.sha256(json.dumps(facts, default=int).encode()).hexdigest()


def held_out_range(total: int, percent: int, part: str | None) -> tuple[int, int]:
    """[start, stop) of the shuffled examples that belong to `part`; all of them if it is None."""
    held_out = max(1, total * percent // 100) if total > 1 else 0
    return (held_out if part == "train" else 0, held_out if part == "validation" else total)


def open_tfds(config, split: str, *, built_in: list[str]) -> TfdsSource:
    """Opens `split` ("train" or "validation") of the TFDS data set ``config.dataset``.

    Args:
      config: a `DataConfig`.
      split: "train" or "validation".
      built_in: names of the data sets that are not from TFDS, for the error of an unknown name.

    Raises:
      ConfigError: an unknown name, data that cannot be prepared, or no feature `config.text_key`.
    """
    builder = prepared_builder(config, built_in)
    return _open_split(config, split, builder, {"text_key": config.text_key})


def open_tfds_pairs(config, split: str, *, built_in: list[str]) -> TfdsSource:
    """`open_tfds` for pairs: the features `config.source_key` and `config.target_key`.

    If one is not set, it is that of the supervised task of the data set, as translations have.
    """
    builder = prepared_builder(config, built_in)
    supervised = builder.info.supervised_keys or (None, None)
    keys = {}
    for name, known in zip(("source_key", "target_key"), supervised, strict=False):
        key = getattr(config, name) or known
        if not isinstance(key, str):
            raise ConfigError(
                f"{config.dataset} does not say which of its features is the "
                f"{name.removesuffix('_key')}: set --data.{name}"
            )
        keys[name] = key
    return _open_split(config, split, builder, keys)


def _open_split(config, split: str, builder: Any, keys: Mapping[str, str]) -> TfdsSource:
    """Opens a split; `keys` are features by the flags that name them."""
    splits = list(builder.info.splits)
    features = builder.info.features
    for flag, key in keys.items():
        if key not in features:
            raise ConfigError(
                f"--data.{flag}={key}: {config.dataset} has {', '.join(sorted(features))}"
            )
    keys = tuple(keys.values())
    own = [name for name in VALIDATION_NAMES if name in splits]
    if split == "validation" and own:
        return _open(config, builder, own[0], None, keys)
    if "train" not in splits:
        raise ConfigError(f"{config.dataset} has no train split, only {', '.join(splits)}")
    return _open(config, builder, "train", None if own else split, keys)


def _open(config, builder: Any, tfds_split: str, part: str | None, keys) -> TfdsSource:
    try:
        source = TfdsSource(config, builder, tfds_split, part, keys)
    except (NotImplementedError, ValueError, OSError) as error:
        raise ConfigError(f"cannot read {config.dataset}: {reason(error)}") from None
    if not len(source):
        raise ConfigError(f"{source.name} has no examples")
    return source


def prepared_builder(config, built_in: list[str]) -> Any:
    """The TFDS builder of ``config.dataset``, with its data prepared unless only shapes matter."""
    import tensorflow_datasets as tfds

    where = config.data_dir or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(config.dataset, data_dir=config.data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        message = _unknown(config.dataset, where, built_in, str(error))
        raise MissingFile(message, "data.data_dir") from None
    except Exception as error:  # builders raise anything, always about the name or the data
        problem = reason(error)
        if problem.startswith("Parsing builder name string"):
            problem = "not a TFDS name (name[/config][:version])"
        raise ConfigError(f"cannot open data set {config.dataset!r}: {problem}") from None
    try:
        if not builder.is_prepared() and not only_shapes_matter():
            print(
                f"note: preparing {config.dataset} in {where}{_download(builder)}", file=sys.stderr
            )
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for a command's results
                builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise ConfigError(
            f"{config.dataset} is not prepared in {where}, and preparing it failed: {reason(error)}"
        ) from None
    return builder


def _download(builder: Any) -> str:
    size = builder.info.download_size
    return f", for which {size} are downloaded" if size else ""


def _unknown(name: str, where: str, built_in: list[str], message: str) -> str:
    known = [*built_in, *re.findall(r"^\s*- (\S+)$", message, re.MULTILINE)]
    near = difflib.get_close_matches(name.partition("/")[0], known, n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return (
        f"unknown data set {name!r}{hint}: use one of {', '.join(built_in)}, a TFDS name, or data "
        f"prepared in {where} (--data.data_dir)"
    )


def reason(error: Exception) -> str:
    """The error's message on one line, cut to 300 characters, and its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{' '.join(lines)[:300]} ({type(error).__name__})" if lines else type(error).__name__
