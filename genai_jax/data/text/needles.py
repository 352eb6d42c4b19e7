"""Needles in haystacks: a fact somewhere in a long text, which is asked for at its end.

A fact is the number of some thing, " lamps: 417.", as in the retrieval of values by their keys of
Liu et al. 2023 ("Lost in the middle", section 3).
"""

import itertools
from typing import NamedTuple

import numpy as np

from genai_jax.config import ConfigError

# Made-up facts are about these; the rest of a made-up text is of the other words.
THINGS = (
    "apples", "birds", "boats", "bricks", "candles", "chairs", "clouds", "coins", "doors", "drums",
    "flags", "forks", "horses", "keys", "lamps", "mirrors", "nails", "pears", "ropes", "stones",
)  # fmt: skip
WORDS = (
    "the", "a", "old", "red", "small", "house", "road", "river", "near", "over", "under", "went",
    "came", "saw", "and", "but", "slowly", "again", "there", "then", "quiet", "long", "one", "day",
)  # fmt: skip
DOCUMENTS = 10_000
FACTS = 4  # of a document


class Needle(NamedTuple):
    """A fact, the question, which is a question mark and the name of the thing, and the answer."""

    fact: str
    question: str
    answer: str


def needles(rng: np.random.Generator, count: int) -> list[Needle]:
    """Made-up facts: the numbers of so many different things, of three digits."""
    made_up = []
    for i in rng.permutation(len(THINGS))[:count]:
        thing, answer = f" {THINGS[i]}:", f" {rng.integers(100, 1000)}."
        made_up.append(Needle(thing + answer, f" ?{thing}", answer))
    return made_up


def words(rng: np.random.Generator, characters: int) -> str:
    """Random words, at most so many characters."""
    count = characters // min(len(word) + 1 for word in WORDS) + 1
    chosen = [WORDS[i] for i in rng.integers(len(WORDS), size=count)]
    return " ".join(chosen)[:characters].rpartition(" ")[0]


def documents(characters: int) -> list[str]:
    """10,000 texts of random words with four facts in them, a question mark, and the facts again.

    The facts are asked for in another order. The words of a text have between a quarter of
    `characters` and all of them. The texts are the same every time. With ``--data.answer_after=?``,
    only what follows the question mark is predicted.
    """
    if not 100 <= characters <= 100_000:
        raise ConfigError(
            f"--data.dataset=needles:{characters}: the number of characters must be from 100 to "
            "100,000"
        )
    rng = np.random.default_rng((characters, 19))
    texts = []
    for length in rng.integers(characters // 4, characters + 1, DOCUMENTS):
        hidden = needles(rng, FACTS)
        hay = words(rng, int(length)).split(" ")
        cuts = [0, *sorted(rng.integers(len(hay) + 1, size=FACTS)), len(hay)]
        pieces = ["".join(f" {word}" for word in hay[a:b]) for a, b in itertools.pairwise(cuts)]
        facts = [piece + each.fact for piece, each in zip(pieces[:-1], hidden, strict=True)]
        asked = [hidden[i].fact for i in rng.permutation(FACTS)]
        texts.append("".join([*facts, pieces[-1], " ?", *asked])[1:])
    return texts


class Haystacks(NamedTuple):
    """Rows of tokens with a needle each; all of one length.

    Attributes:
      tokens, targets: [rows, length]; the tokens begin with the boundary.
      is_answer: which targets are those of the answer, [rows, length] bool.
    """

    tokens: np.ndarray
    targets: np.ndarray
    is_answer: np.ndarray


def haystacks(
    tokenizer, hay: np.ndarray, length: int, depth: float, rows: int, seed: int
) -> Haystacks:
    """Texts with a needle at a depth and its question at the end, and what answers it.

    Args:
      tokenizer: of the model.
      hay: ids that are cut to size, and repeated where they are too short.
      length: tokens of a row.
      depth: where the needle is, from 0, the beginning, to 1, just before the question.
      rows: number of needles.
      seed: of needles and hay.

    Raises:
      ConfigError: a length without room for needle, question, and answer.
    """
    read = np.full((rows, length + 1), tokenizer.boundary_id, np.int32)
    is_answer = np.zeros((rows, length), bool)
    rngs = [np.random.default_rng((seed, row)) for row in range(rows)]
    hidden = [
        [np.asarray(tokenizer.encode(text), np.int32) for text in needles(rng, 1)[0]]
        for rng in rngs
    ]
    longest = max(sum(map(len, parts)) for parts in hidden)
    if length < longest:
        raise ConfigError(
            f"--needle_lengths={length} is too short: a needle, its question, and its answer take "
            f"up to {longest} tokens"
        )
    for row, (rng, (fact, question, answer)) in enumerate(zip(rngs, hidden, strict=True)):
        room = length - len(fact) - len(question) - len(answer)
        straw = np.resize(np.roll(hay, -rng.integers(len(hay))), room)
        cut = round(depth * room)
        read[row, 1:] = np.concatenate([straw[:cut], fact, straw[cut:], question, answer])
        is_answer[row, length - len(answer) :] = True
    return Haystacks(read[:, :-1], read[:, 1:], is_answer)
