"""How many bytes of a document each of its tokens stands for; the sum is the document's size."""

from collections.abc import Sequence

import numpy as np

_KEEPS_ALL = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


def by_ends(text: str, ends: Sequence[int]) -> np.ndarray:
    """Bytes of tokens that end at these characters of the text, int32 ``[tokens]``.

    A token stands for what lies between the end of the one before and its own. What tokenizers
    drop, such as spaces, thus counts for the next token, and at the end of the text for the last.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (codes >= 0x80) + (codes >= 0x800).astype(int) + (codes >= 0x10000)
    before = np.pad(np.cumsum(widths), (1, 0))
    furthest = np.maximum.accumulate(np.asarray(ends, np.int64))
    return closed(np.diff(before[np.minimum(furthest, len(text))], prepend=0), int(before[-1]))


def closed(sizes: np.ndarray, total: int) -> np.ndarray:
    """The sizes with the last one changed so that their sum is `total`; none stays none."""
    sizes = np.array(sizes, np.int32)
    if len(sizes):
        sizes[-1] += total - sizes.sum()
    return sizes


def is_lossless(parts: dict) -> bool:
    """Whether a `tokenizers` file spells every text with one character of a token per byte.

    It does if it is a BPE of all 256 bytes that changes nothing before it.
    """
    model, steps = parts["model"], parts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    stripping = any(added["lstrip"] or added["rstrip"] for added in parts["added_tokens"])
    if parts["normalizer"] or model.get("type") != "BPE" or stripping:
        return False
    return (
        any(step.get("type") == "ByteLevel" for step in steps)
        and all(_keeps_all(step) for step in steps)
        and sum(len(token) == 1 for token in model["vocab"]) >= 256
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    )


def _keeps_all(step: dict) -> bool:
    kind = step.get("type")
    if kind == "ByteLevel":
        return not step["add_prefix_space"]
    return kind == "Digits" or (kind == "Split" and step["behavior"] in _KEEPS_ALL)
