"""A split of a TFDS data set, stored as ArrayRecord and read without TensorFlow.

TFDS reads and writes ArrayRecord in plain Python. Many of its builders also prepare without
TensorFlow; those that do not must be prepared elsewhere and found through ``--data.data_dir``.
"""

import contextlib
import difflib
import hashlib
import json
import re
import sys
from typing import Any

from genai_jax.config import ConfigError
from genai_jax.data.shuffle import permuted

VALIDATION_NAMES = ("validation", "valid", "test")


class TfdsSource:
    """Some or all examples of a split.

    Without a validation split of its own, the data set's train split is put in a fixed random order
    of which validation gets the beginning and train the rest.
    """

    size_bytes = None

    def __init__(self, config, builder: Any, tfds_split: str, part: str | None = None):
        """Opens the data.

        Args:
          config: a `DataConfig`.
          builder: a TFDS builder whose data is prepared.
          tfds_split: the split of the data set.
          part: "train" or "validation" to hold out a part of `tfds_split`; None for all of it.
        """
        self.name = f"{builder.info.full_name}[{tfds_split}]" + (f"/{part}" if part else "")
        self._examples = builder.as_data_source(split=tfds_split)
        self._key = config.text_key
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
        text = self._examples[index][self._key]
        if isinstance(text, str):
            return text
        try:
            return text.decode("utf-8", "strict" if self._strict else "surrogateescape")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.name}: example {index} is not UTF-8 (byte offset {error.start}): use "
                "--data.tokenizer=bytes"
            ) from None

    def fingerprint(self) -> str:
        """sha256 of the name with version, the split and the sizes of its shards."""
        facts = [self.name, self._start, self._stop, self._info.shard_lengths, self._info.num_bytes]
        return hashlib.sha256(json.dumps(facts, default=int).encode()).hexdigest()


def held_out_range(total: int, percent: int, part: str | None) -> tuple[int, int]:
    """Which of `total` examples, once shuffled, belong to a part; all of them without one."""
    held_out = max(1, total * percent // 100) if total > 1 else 0
    return (held_out if part == "train" else 0, held_out if part == "validation" else total)


def open_tfds(config, split: str, *, embedded: list[str]) -> TfdsSource:
    """Opens `split` ("train" or "validation") of the TFDS data set ``config.dataset``.

    Raises:
      ConfigError: an unknown name, data that cannot be prepared, no text under ``config.text_key``.
    """
    builder = prepared_builder(config, embedded)
    splits = list(builder.info.splits)
    features = builder.info.features
    if config.text_key not in features:
        raise ConfigError(
            f"--data.text_key={config.text_key}: {config.dataset} has {', '.join(sorted(features))}"
        )
    own = [name for name in VALIDATION_NAMES if name in splits]
    if split == "validation" and own:
        return _open(config, builder, own[0])
    if "train" not in splits:
        raise ConfigError(f"{config.dataset} has no train split, only {', '.join(splits)}")
    return _open(config, builder, "train", part=None if own else split)


def _open(config, builder: Any, tfds_split: str, part: str | None = None) -> TfdsSource:
    try:
        source = TfdsSource(config, builder, tfds_split, part)
    except (NotImplementedError, ValueError, OSError) as error:
        raise ConfigError(f"cannot read {config.dataset}: {reason(error)}") from None
    if not len(source):
        raise ConfigError(f"{source.name} has no examples")
    return source


def prepared_builder(config, embedded: list[str]) -> Any:
    import tensorflow_datasets as tfds

    where = config.data_dir or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(config.dataset, data_dir=config.data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ConfigError(_unknown(config.dataset, where, embedded, str(error))) from None
    except Exception as error:  # builders raise what they like; each is about the name or the data
        problem = reason(error)
        if problem.startswith("Parsing builder name string"):
            problem = "this is no TFDS name (name[/config][:version])"
        raise ConfigError(f"cannot open data set {config.dataset!r}: {problem}") from None
    try:
        if not builder.is_prepared():
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for what a command answers
                builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise ConfigError(
            f"{config.dataset} is not prepared in {where} and cannot be: {reason(error)}"
        ) from None
    return builder


def _unknown(name: str, where: str, embedded: list[str], message: str) -> str:
    known = [*embedded, *re.findall(r"^\s*- (\S+)$", message, re.MULTILINE)]
    near = difflib.get_close_matches(name.partition("/")[0], known, n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return (
        f"unknown data set {name!r}{hint}: it is none of {', '.join(embedded)}, a TFDS "
        f"name, or data prepared in {where} (--data.data_dir)"
    )


def reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{' '.join(lines)[:300]} ({type(error).__name__})" if lines else type(error).__name__
