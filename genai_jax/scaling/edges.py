"""Best values at the edge of what was tried, said in the same words by every analysis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

SMALLEST, LARGEST = "smallest", "largest"
BEYOND = {SMALLEST: "smaller", LARGEST: "larger"}
NAMED = 4  # runs of a metric, and metrics, in a sentence


def edge(points: Iterable[tuple[float, float]]) -> str:
    """Whether the best of the tried values is the `SMALLEST` or the `LARGEST` of them.

    Args:
      points: (tried value, score); lower scores are better, scores that are not finite lose.

    Returns:
      "" if it is neither, if several are equally good and one is neither, or if only one was tried.
    """
    points = list(points)
    tried = sorted({value for value, _ in points})
    scores = [score for _, score in points if math.isfinite(score)]
    if len(tried) < 2 or not scores:
        return ""
    best = {value for value, score in points if score == min(scores)}
    ends = {tried[0]: SMALLEST, tried[-1]: LARGEST}
    return ends.get(*best, "") if len(best) == 1 else ""


def sentences(quantity: str, edges: Sequence[tuple[str, str]], what: str) -> list[str]:
    """Sentences for a report; none if no best value is at an edge.

    Args:
      quantity: what was varied, in the singular: "learning rate".
      edges: (whose best value it is, the result of `edge`).
      what: is best there: "lowest eval/loss".
    """
    return [
        f"At the edge of the tried range: the {what} is at the {end} {quantity} for "
        f"{', '.join(names)}; a {BEYOND[end]} one may be better."
        for end in (SMALLEST, LARGEST)
        if (names := _at(end, edges))
    ]


def step_sentences(edges: Sequence[tuple[str, str, str]]) -> list[str]:
    """The same about the step at which a metric was best, one sentence for each end.

    Args:
      edges: (metric, run, the result of `edge`).
    """
    lines = {
        LARGEST: "Still best at the last step, so that more steps may improve it",
        SMALLEST: "Best at the first logged step, and worse ever after",
    }
    return [
        f"{line}: {groups}." for end, line in lines.items() if (groups := _by_metric(end, edges))
    ]


def _by_metric(end: str, edges: Sequence[tuple[str, str, str]]) -> str:
    """Each metric with a few of the runs that are best there: "loss of a, b; bits of a"."""
    runs: dict[str, list[str]] = {}
    for metric, run, where in edges:
        if where == end:
            runs.setdefault(metric, []).append(run)
    groups = [f"{metric} of {_few(names, 'runs')}" for metric, names in runs.items()]
    return _few(groups, "metrics", "; ")


def _few(names: Sequence[str], of: str, separator: str = ", ") -> str:
    """At most `NAMED` of the names, and the number of the others, which are at least two."""
    if len(names) <= NAMED + 1:
        return separator.join(names)
    return separator.join([*names[:NAMED], f"and {len(names) - NAMED} more {of}"])


def _at(end: str, edges: Sequence[tuple[str, str]]) -> list[str]:
    return [name for name, where in edges if where == end]
