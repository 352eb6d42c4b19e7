"""Needles in haystacks: a fact somewhere in a long text, and the question about it at the end."""

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
DOCUMENTS = 20_000


class Needle(NamedTuple):
    """A fact, its question, and the answer: the question and the answer are the fact again."""

    fact: str
    question: str
    answer: str


def needle(rng: np.random.Generator) -> Needle:
    """A made-up fact: the number of some thing, of three digits."""
    question = f" The number of {THINGS[rng.integers(len(THINGS))]} is"
    answer = f" {rng.integers(100, 1000)}."
    return Needle(question + answer, question, answer)


def words(rng: np.random.Generator, characters: int) -> str:
    """Random words, at most so many characters."""
    count = characters // min(len(word) + 1 for word in WORDS) + 1
    chosen = [WORDS[i] for i in rng.integers(len(WORDS), size=count)]
    return " ".join(chosen)[:characters].rpartition(" ")[0]


def documents(characters: int) -> list[str]:
    """20,000 texts of random words, each with a fact in it and the same fact at its end.

    The words of a text have between a quarter of `characters` and all of them. The texts are the
    same every time.
    """
    if not 100 <= characters <= 100_000:
        raise ConfigError(
            f"needles:{characters}: the number of characters must be from 100 to 100,000"
        )
    rng = np.random.default_rng((characters, 19))
    texts = []
    for length in rng.integers(characters // 4, characters + 1, DOCUMENTS):
        fact = needle(rng)
        hay = words(rng, int(length))
        cut = hay.find(" ", int(rng.integers(len(hay))))
        cut = len(hay) if cut < 0 else cut
        texts.append(hay[:cut] + fact.fact + hay[cut:] + fact.question + fact.answer)
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
    for row in range(rows):
        rng = np.random.default_rng((seed, row))
        fact, question, answer = (np.asarray(tokenizer.encode(t), np.int32) for t in needle(rng))
        room = length - len(fact) - len(question) - len(answer)
        if room < 0:
            raise ConfigError(
                f"--needle_lengths={length} has no room for a needle, its question, and its "
                f"answer, of {length - room} tokens"
            )
        straw = np.resize(np.roll(hay, -rng.integers(len(hay))), room)
        cut = round(depth * room)
        read[row, 1:] = np.concatenate([straw[:cut], fact, straw[cut:], question, answer])
        is_answer[row, length - len(answer) :] = True
    return Haystacks(read[:, :-1], read[:, 1:], is_answer)
