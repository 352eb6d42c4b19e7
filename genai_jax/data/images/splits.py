"""Which pictures are held out, by the hash of their content."""

import collections
from collections.abc import Sequence

import numpy as np


def hold_out_pictures(
    digests: Sequence[bytes], usable: np.ndarray, labels: np.ndarray | None, percent: int
) -> np.ndarray:
    """Chooses pictures for validation, bool [pictures].

    Different pictures are ranked by their hashes, so the split depends neither on their order nor
    on their names, and copies fall on the same side. `percent` percent of them are held out, at
    least one, and as far as possible the same share of each class; the last one of a class is held
    out only if there is nothing else.

    Args:
      digests: hash of the content of each picture.
      usable: which pictures count, bool [pictures].
      labels: class of each; copies of a picture count for the class of the first.
      percent: of different pictures.
    """
    class_of: dict[bytes, int] = {}
    for i in np.flatnonzero(usable):
        class_of.setdefault(digests[i], 0 if labels is None else int(labels[i]))
    if len(class_of) < 2:
        return np.zeros(len(digests), bool)
    ranked = sorted(class_of)
    left = collections.Counter(class_of.values())
    quota = {name: count * percent // 100 for name, count in left.items()}
    held_out: set[bytes] = set()

    def take(digest: bytes):
        held_out.add(digest)
        left[class_of[digest]] -= 1

    for digest in ranked:
        if quota[class_of[digest]] > 0:
            quota[class_of[digest]] -= 1
            take(digest)
    total = max(1, len(ranked) * percent // 100)
    for fewest in (1, 0):  # how many of its class must be left
        for digest in ranked:
            if len(held_out) < total and digest not in held_out and left[class_of[digest]] > fewest:
                take(digest)
    return np.array([digest in held_out for digest in digests]) & usable
