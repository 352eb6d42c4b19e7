"""What `sample` shows of word vectors: nearest neighbors and answers to analogies, with a map."""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.data.text.words import split_words
from genai_jax.errors import printable
from genai_jax.metrics.word_vectors import (
    analogy_queries,
    nearest,
    normalized,
    principal_components,
)
from genai_jax.requests import SampleRequest
from genai_jax.sampled import Origin, check_suffix, suffix_of
from genai_jax.tasks.words.data import WordData

SUFFIXES = (".txt", ".jsonl", ".png")
FREQUENT, LETTERS = 8, 5  # words that are shown if none is named, and their least length


@dataclasses.dataclass(frozen=True)
class WordRequest(SampleRequest):
    words: str = field(
        "", "Comma-separated words whose nearest neighbors are shown; frequent ones if empty."
    )
    analogy: str = field(
        "", "A question a:b::c, answered by the words nearest to b - a + c, instead of --words."
    )
    neighbors: int = field(10, "Neighbors of each word.", minimum=1)
    suffixes: ClassVar = SUFFIXES

    def __post_init__(self):
        if self.seed:
            raise ValueError(f"seed={self.seed} has no effect: neighbors involve no randomness")
        if self.words and self.analogy:
            raise ValueError("`words` and `analogy` exclude each other")


@dataclasses.dataclass(frozen=True)
class Neighborhoods:
    """Words near each of some words, as `genai_jax.sampled.Sampled`.

    Attributes:
      near: what was asked for -> words and their cosines, the nearest first.
      points: of each word on the map, [words, 2].
      labels: what was asked for and the word, of each point.
    """

    near: dict[str, list[tuple[str, float]]]
    points: np.ndarray
    labels: list[tuple[str, str]]
    origin: Origin | None = None

    suffix: ClassVar = ".txt"

    @property
    def values(self) -> dict[str, list[tuple[str, float]]]:
        return self.near

    def lines(self) -> list[str]:
        """A line for each of what was asked for."""
        show = lambda words: ", ".join(f"{word} {cosine:.2f}" for word, cosine in words)
        return [f"{name}: {show(words)}" for name, words in self.near.items()]

    def write(self, output: str, folder: pathlib.Path) -> list[str]:
        """Writes `output` by its suffix; without one, a map into `folder`, and returns lines."""
        check_suffix(output, SUFFIXES)
        end = self.origin.stem if self.origin else ""
        path = pathlib.Path(output) if output else folder / f"neighbors{end}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = suffix_of(output) if output else ".png"
        if suffix == ".png":
            plot_words(self.points, self.labels).savefig(path, dpi=120)
            return [str(path)] if output else [*self.lines(), str(path)]
        lines = self.lines() if suffix == ".txt" else self._rows()
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return []

    def _rows(self) -> list[str]:
        step = {"step": self.origin.step} if self.origin else {}
        named = lambda words: [{"word": word, "cosine": cosine} for word, cosine in words]
        rows = [{"asked": name, "near": named(near), **step} for name, near in self.near.items()]
        return [json.dumps(row) for row in rows]


def neighborhoods(data: WordData, vectors: np.ndarray, request: WordRequest) -> Neighborhoods:
    """The answer to a request, by `vectors` [words, dim].

    Raises:
      ConfigError: a word that is not known, or an analogy of another form.
    """
    vectors, names = normalized(vectors), data.vocabulary.words
    if request.analogy:
        ids = np.array([ids_of(data, _parts(request.analogy), f"--analogy={request.analogy}")])
        queries, left_out = analogy_queries(vectors, ids), ids
        asked = ["{}:{}::{}".format(*(names[i] for i in ids[0]))]
    else:
        words = request.words.split(",") if request.words else _frequent(names)
        ids = np.array(list(dict.fromkeys(ids_of(data, words, f"--words={request.words}"))))
        queries, left_out, asked = vectors[ids], ids[:, None], [names[i] for i in ids]
    indices, cosines = nearest(vectors, queries, request.neighbors, left_out)
    near = {
        name: [(names[i], float(x)) for i, x in zip(row, xs, strict=True)]
        for name, row, xs in zip(asked, indices, cosines, strict=True)
    }
    shown = {int(i): name for name, row in zip(asked, left_out, strict=True) for i in row}
    for name, row in zip(asked, indices, strict=True):
        shown = {int(i): name for i in row} | shown  # what was asked for keeps its own place
    points = principal_components(vectors[list(shown)])
    return Neighborhoods(near, points, [(name, names[i]) for i, name in shown.items()])


def ids_of(data: WordData, words: Sequence[str], label: str) -> list[int]:
    """The ids of words.

    Raises:
      ConfigError: a text that is not one word, or a word that is not in the vocabulary.
    """
    ids = []
    for text in words:
        split = split_words(text)
        if len(split) != 1:
            raise ConfigError(f"{printable(label)}: {printable(text)!r} is not one word")
        if split[0] not in data.ids:
            near = difflib.get_close_matches(split[0], data.vocabulary.words[:20_000], n=1)
            raise ConfigError(
                f"{printable(label)}: {printable(split[0])!r} is not among the {len(data.ids):,} "
                f"words of the run{f' (did you mean {near[0]}?)' if near else ''}"
            )
        ids.append(data.ids[split[0]])
    return ids


def _parts(analogy: str) -> list[str]:
    left, _, third = analogy.partition("::")
    first, _, second = left.partition(":")
    parts = [first, second, third]
    if not all(part.strip() for part in parts) or ":" in second + third:
        raise ConfigError(f"--analogy={printable(analogy)}: write a:b::c, three words")
    return parts


def _frequent(names: Sequence[str]) -> list[str]:
    """The most frequent of the longer words, or of all if there are none."""
    return [name for name in names if len(name) >= LETTERS][:FREQUENT] or list(names[:FREQUENT])


def plot_words(points: np.ndarray, labels: Sequence[tuple[str, str]]) -> Any:
    """A figure of words at `points` [n, 2], each (what it is near to, word) in that one's color."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups = list(dict.fromkeys(group for group, _ in labels))
    for i, group in enumerate(groups):
        mine = [j for j, (of, _) in enumerate(labels) if of == group]
        axes.scatter(*points[mine].T, s=14, color=f"C{i % 10}")
        for j in mine:
            word = labels[j][1]
            asked = word in groups or word in group.replace("::", ":").split(":")
            axes.annotate(
                word, points[j], xytext=(3, 2), textcoords="offset points", color=f"C{i % 10}",
                fontsize=11 if asked else 8, fontweight="bold" if asked else "normal",
                parse_math=False,
            )  # fmt: skip
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.margins(0.08)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.12 * (right - left))  # room for the words on the right
    return figure
