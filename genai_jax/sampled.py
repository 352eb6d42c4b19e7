"""What sampling returns: texts, or arrays that are images, signals, or videos; written by suffix.

A file ``--output`` decides by its suffix what is written; a name that ends in ``/``, or an existing
folder, gets one file per sample and ``metadata.jsonl``, one JSON object for each of them.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from genai_jax import media
from genai_jax.config import ConfigError
from genai_jax.files import writing_to
from genai_jax.grids import PLAIN, Labels, beside, by_name

FOLDER = "/"  # in place of a suffix
TEXT_SUFFIXES = (".txt", ".jsonl", FOLDER)
ARRAY_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".npy", ".npz", FOLDER)
METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where samples come from, as their files record it.

    Attributes:
      step: of the checkpoint.
      settings: the flags of the request that have a value, without those of files.
      stem: end of the default file's stem, different for different requests.
    """

    step: int
    settings: Mapping[str, Any]
    stem: str

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")


class Sampled(Protocol):
    """The result of `Samples.sample`."""

    @property
    def values(self) -> Any:
        """The samples themselves: a list of texts, or an array whose rows are the samples."""

    @property
    def suffix(self) -> str:
        """Of the file that shows them best."""

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes to `output`, or to the default place if it is empty; returns lines to print."""


def with_origin(sampled: Any, origin: Origin) -> Any:
    """Samples that know where they come from, if they are a dataclass with a field for it."""
    named = dataclasses.is_dataclass(sampled) and {f.name for f in dataclasses.fields(sampled)}
    return dataclasses.replace(sampled, origin=origin) if named and "origin" in named else sampled


def suffix_of(output: str) -> str:
    """The suffix of a file in lower case; `FOLDER` for a folder, which need not exist."""
    if output.endswith("/") or os.path.isdir(output):
        return FOLDER
    return pathlib.Path(output).suffix.lower()


def check_suffix(output: str, allowed: tuple[str, ...] | None):
    """Raises `ConfigError` for a file name that fits nothing that can be written.

    Args:
      output: the file or folder; empty for the default.
      allowed: suffixes; None for any. Text may go to a name without one, such as /dev/stdout.
    """
    if not output or allowed is None:
        return
    suffix = suffix_of(output)
    if suffix not in allowed and not (suffix == "" and ".txt" in allowed):
        names = [name for name in allowed if name != FOLDER]
        names += ["/ for a folder"] * (FOLDER in allowed)
        listed = ", ".join(names[:-1]) + ", or " * (len(names) > 1) + names[-1]
        raise ConfigError(f"--output={output} must end in {listed}")


def prepare_output(output: str):
    """Creates the folder of `output`, or the folder that it is.

    To be called before sampling, whose results would be lost otherwise.

    Raises:
      ConfigError: it cannot be written, or it is a folder that has files already.
    """
    if not output:
        return
    path = pathlib.Path(output)
    is_folder = suffix_of(output) == FOLDER
    with writing_to(f"--output={output}"):
        folder = path if is_folder else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if is_folder and any(folder.iterdir()):
            raise ConfigError(f"--output={output} is a folder that has files; name a new one")
        path = path / METADATA if is_folder else path
        new = not path.exists()
        if new or not path.is_fifo():  # whose reader would see its end
            open(path, "ab").close()
        if new:
            path.unlink()


@dataclasses.dataclass(frozen=True)
class Texts:
    """Sampled texts.

    Attributes:
      texts: the samples, prompts included.
      prompts: of each text; None if there are none.
    """

    texts: list[str]
    prompts: list[str] | None = None
    origin: Origin | None = None

    suffix: ClassVar = ".txt"

    @property
    def values(self) -> list[str]:
        return self.texts

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes to `output`; without one, returns the texts to be printed."""
        del folder
        check_suffix(output, TEXT_SUFFIXES)
        texts = self.texts
        if len(texts) > 1:
            texts = [f"--- sample {i + 1} of {len(texts)}\n{text}" for i, text in enumerate(texts)]
        if not output:
            return texts
        path, suffix = pathlib.Path(output), suffix_of(output)
        if suffix == FOLDER:
            write = lambda target, i: target.write_text(self.texts[i], encoding="utf-8")
            return _write_folder(path, ".txt", self._rows(), write)
        if suffix == ".jsonl":
            rows = [
                {**row, "text": text} for row, text in zip(self._rows(), self.texts, strict=True)
            ]
            _write_lines(path, rows)
        else:
            path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return []

    def _rows(self) -> list[dict]:
        """What is known about each text."""
        common = {}
        if self.origin:
            left_out = ("prompt", "prompt_file", "num_samples")
            known = {n: x for n, x in self.origin.settings.items() if n not in left_out}
            common = {"step": self.origin.step, **known}
        prompts = [{}] * len(self.texts)
        if self.prompts is not None:
            prompts = [{"prompt": prompt} for prompt in self.prompts]
        return [{**row, "sample": i, **common} for i, row in enumerate(prompts)]


def label_texts(labels: np.ndarray, names: Sequence[Sequence[str]]) -> list[str]:
    """Labels [n, attributes] as ``--label`` takes them: "3", or "red:circle"."""
    named = lambda row: zip(names, row, strict=True)
    return [":".join(values[value] for values, value in named(row)) for row in labels]


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Sampled images, signals, or videos.

    Attributes:
      name: stem of the default file.
      examples: [n, *space, channels] in levels, uint8.
      levels: values are 0 .. levels - 1.
      labels: requested of each example, [n, attributes]; None without classes.
      label_names: of the values of each attribute.
      prompts: the caption of each example; None without captions.
      strip: [rows, columns, *space, channels], the sampling trajectory of each of the first
        examples; written to a second file.
      columns: columns of the grid; if None, about square, with each class in columns of its own.
      around: labels of the grid; if it has none but a title, the classes or the captions.
      strip_around: labels of the strip.
      original: image that the examples are edits of, [*space, channels]; it begins every row.

    Raises:
      ConfigError: values that were not finite, see `media.checked_levels`.
    """

    name: str
    examples: np.ndarray
    levels: int
    labels: np.ndarray | None = None
    label_names: tuple[tuple[str, ...], ...] = ()
    prompts: list[str] | None = None
    strip: np.ndarray | None = None
    columns: int | None = None
    around: Labels = PLAIN
    strip_around: Labels = PLAIN
    original: np.ndarray | None = None
    origin: Origin | None = None

    def __post_init__(self):
        object.__setattr__(self, "examples", media.checked_levels(self.examples))
        if self.strip is not None:
            object.__setattr__(self, "strip", media.checked_levels(self.strip))

    @property
    def values(self) -> np.ndarray:
        return self.examples

    @property
    def suffix(self) -> str:
        return media.kind_of(self.examples)

    def label_texts(self) -> list[str] | None:
        """The label of each example as ``--label`` takes it: "3", or "red:circle"."""
        if self.labels is None or not self.labels.size:
            return None
        return label_texts(self.labels, self.label_names)

    def picture(self) -> np.ndarray:
        """All examples in one picture [height, width, 3], uint8; see `media.picture`."""
        return media.picture(*self._arranged())

    def _arranged(self) -> tuple[np.ndarray, int, int | None, Labels | None]:
        """Examples, levels, columns, and labels, as `media.picture` takes them."""
        texts = self.label_texts() or self.prompts or []
        examples, columns, around = self.examples, self.columns, self.around
        if not self._annotated:
            return examples, self.levels, columns, None
        if self.original is not None:
            examples, columns, around = beside(self.original, examples, texts, around.title)
        elif texts and columns is None and not any(around[1:]):
            columns, around = by_name(texts, around.title)
        return examples, self.levels, columns, around

    @property
    def _annotated(self) -> bool:
        return not self.origin or self.origin.settings.get("annotate", True)

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes to `output` by its suffix, or a picture into `folder`; returns the paths."""
        check_suffix(output, ARRAY_SUFFIXES)
        end = self.origin.stem if self.origin else ""
        path = pathlib.Path(output) if output else folder / f"{self.name}{end}{self.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = suffix_of(output) if output else self.suffix
        if suffix == FOLDER:
            return self._write_folder(path)
        if suffix == ".npz":
            with open(path, "wb") as file:
                np.savez_compressed(file, **self._entries())
            return [str(path)]
        self._write_one(path, suffix, self.examples, *self._arranged())
        if self.strip is None:
            return [str(path)]
        second = path.with_name(f"{path.stem}_strip{path.suffix}")
        flat = self.strip.reshape(-1, *self.strip.shape[2:])
        around = self.strip_around if self._annotated else None
        self._write_one(second, suffix, self.strip, flat, self.levels, self.strip.shape[1], around)
        return [str(path), str(second)]

    def _write_one(self, path: pathlib.Path, suffix: str, array: np.ndarray, *arranged: Any):
        if suffix == ".npy":
            with open(path, "wb") as file:
                np.save(file, array)
        else:
            media.write_examples(path, *arranged)

    def _entries(self) -> dict[str, np.ndarray]:
        """The arrays of an .npz file; texts are arrays of text, which need no pickle."""
        entries = {"images": self.examples, "levels": np.int64(self.levels)}
        more = {"labels": self.labels, "strip": self.strip}
        texts = {"label_names": self.label_texts(), "prompts": self.prompts}
        entries |= {n: x for n, x in more.items() if x is not None}
        entries |= {n: np.array(x, np.str_) for n, x in texts.items() if x is not None}
        if self.origin:
            entries["step"] = np.int64(self.origin.step)
            entries["settings"] = np.array(json.dumps(dict(self.origin.settings)))
            if self.origin.seed is not None:
                entries["seed"] = np.int64(self.origin.seed)
        return entries

    def _write_folder(self, path: pathlib.Path) -> list[str]:
        """One picture for each example, in its own size."""
        known = {"step": self.origin.step, "seed": self.origin.seed} if self.origin else {}
        columns = {"label": self.label_texts(), "prompt": self.prompts}
        columns = {name: values for name, values in columns.items() if values is not None}
        rows = [
            {name: values[i] for name, values in columns.items()} | known
            for i in range(len(self.examples))
        ]
        write = lambda target, i: media.write_example(target, self.examples[i], self.levels)
        return _write_folder(path, media.kind_of(self.examples), rows, write)


@dataclasses.dataclass(frozen=True)
class Files:
    """Samples of another kind as files, each kind of file with the function that writes it.

    Attributes:
      name: stem of the default file.
      writers: suffix -> function that writes to a path: ".wav", "_score.png".
    """

    name: str
    writers: Mapping[str, Callable[[pathlib.Path], None]]
    origin: Origin | None = None

    @property
    def values(self) -> Any:
        raise ConfigError(
            f"these samples are files ({', '.join(self.writers)}): write them with genai_jax.sample"
        )

    @property
    def suffix(self) -> str:
        return next(iter(self.writers))

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes each kind next to `output`, or in `folder` if that is empty; returns the paths."""
        first, end = self.suffix, self.origin.stem if self.origin else ""
        check_suffix(output, (pathlib.Path(f"x{first}").suffix,))
        path = pathlib.Path(output) if output else folder / f"{self.name}{end}{first}"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = []
        for suffix, write in self.writers.items():
            target = path if suffix == first else path.with_name(path.stem + suffix)
            write(target)
            written.append(str(target))
        return written


def _write_folder(
    folder: pathlib.Path, suffix: str, rows: list[dict], write: Callable[[pathlib.Path, int], Any]
) -> list[str]:
    """Writes one file per row with `write(path, index)`, and a file that says what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(len(rows) - 1)))
    names = [f"{i:0{digits}}{suffix}" for i in range(len(rows))]
    for i, name in enumerate(names):
        write(folder / name, i)
    _write_lines(
        folder / METADATA, [{"file_name": n, **row} for n, row in zip(names, rows, strict=True)]
    )
    return [str(folder)]


def _write_lines(path: pathlib.Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
