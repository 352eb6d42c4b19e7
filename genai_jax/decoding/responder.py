"""A conversation by rules in the manner of ELIZA (Weizenbaum 1966), which learns nothing.

The words of a line are replaced by others, cut into clauses, and searched for keywords. That of the
highest rank answers, by the first of its rules whose pattern matches; the answers of a rule take
turns. Without a keyword, something that was said earlier comes up, or an answer that fits anything.
"""

import re
from collections import Counter, deque
from collections.abc import Sequence

from genai_jax.data.text.scripts import QUOTED, Keyword, Rule, Script

CLAUSES = re.compile(r"[.,;:?!()\"\n]+|\bbut\b")
WORDS = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
MOST_WORDS = 1000  # of a line that are read
MEMORIES = 32  # that are kept


class Conversation:
    """Answers line after line.

    Args:
      script: the rules.
      turn: which of its answers each rule gives first, from 0; counted round.
    """

    def __init__(self, script: Script, turn: int = 0):
        self._script, self._turn = script, turn
        self._used: Counter = Counter()
        self._memories: deque[str] = deque(maxlen=MEMORIES)

    def answer(self, line: str) -> str:
        """The answer to a line; to an empty one, a greeting."""
        script = self._script
        clauses = self._clauses(line)
        if not clauses:
            return self._next("greetings", script.greetings)
        if len(clauses) == 1 and " ".join(clauses[0]) in script.goodbyes:
            return script.farewell
        for words in clauses:
            if keywords := self._keywords(words):
                self._remember(keywords[0], words)
                if answer := self._by_keywords(keywords, words):
                    return answer
                break
        if self._memories:
            return self._memories.popleft()
        return self._next("fallback", script.fallback)

    def _clauses(self, line: str) -> list[list[str]]:
        """Its clauses as words in lower case, those to be replaced replaced."""
        clauses, left = [], MOST_WORDS
        for clause in CLAUSES.split(line.lower()):
            words = [w.replace("\u2019", "'") for w in WORDS.findall(clause)][:left]
            left -= len(words)
            replaced = " ".join(self._script.replace.get(w, w) for w in words)
            if words:
                clauses.append(replaced.split())
        return clauses

    def _keywords(self, words: Sequence[str]) -> list[Keyword]:
        """Those of the words, from the highest rank; among equals, the first one first."""
        found = dict.fromkeys(word for word in words if self._script.keyword(word))
        keywords = [self._script.keyword(word) for word in found]
        return sorted(keywords, key=lambda keyword: -keyword.rank)

    def _by_keywords(self, keywords: Sequence[Keyword], words: Sequence[str]) -> str | None:
        left, seen = deque(keywords), []
        while left:
            keyword = left.popleft()
            if keyword in seen:
                continue
            seen.append(keyword)
            for rule in keyword.rules:
                parts = match(rule.pattern, words, self._script.groups)
                if parts is None:
                    continue
                answer = self._next(rule, rule.answers)
                if not answer.startswith("="):
                    return self._quoting(answer, parts)
                if answer != "=":
                    left.appendleft(self._script.keyword(answer[1:]))
                break
        return None

    def _remember(self, keyword: Keyword, words: Sequence[str]):
        for rule in keyword.memory:
            parts = match(rule.pattern, words, self._script.groups)
            if parts is not None:
                self._memories.append(self._quoting(self._next(rule, rule.answers), parts))
                return

    def _next(self, rule: Rule | str, answers: Sequence[str]) -> str:
        self._used[rule] += 1
        return answers[(self._turn + self._used[rule] - 1) % len(answers)]

    def _quoting(self, answer: str, parts: Sequence[Sequence[str]]) -> str:
        reflect = self._script.reflect
        quote = lambda number: " ".join(reflect.get(w, w) for w in parts[int(number[1]) - 1])
        text = " ".join(QUOTED.sub(quote, answer).split())
        text = re.sub(r"\s+([.,;:?!])", r"\1", text)
        text = re.sub(r"\bi\b", "I", text)
        return text[:1].upper() + text[1:]


def match(
    pattern: Sequence[str], words: Sequence[str], groups: dict[str, Sequence[str]]
) -> list[list[str]] | None:
    """The words for which each element of a pattern stands; None if it does not match.

    The first ``*`` stands for as few words as possible, then the second, and so on. Takes time in
    proportion to elements times words.
    """
    fits = [[False] * (len(words) + 1) for _ in range(len(pattern) + 1)]  # the rest from there
    fits[-1][-1] = True
    for i in range(len(pattern) - 1, -1, -1):
        for start in range(len(words), -1, -1):
            if pattern[i] == "*":
                later = start < len(words) and fits[i][start + 1]
                fits[i][start] = fits[i + 1][start] or later
            else:
                end = start + _length(pattern[i], words, start, groups)
                fits[i][start] = end > start and fits[i + 1][end]
    if not fits[0][0]:
        return None
    parts, start = [], 0
    for i, element in enumerate(pattern):
        if element == "*":
            end = next(e for e in range(start, len(words) + 1) if fits[i + 1][e])
        else:
            end = start + _length(element, words, start, groups)
        parts.append(list(words[start:end]))
        start = end
    return parts


def _length(element: str, words: Sequence[str], start: int, groups) -> int:
    """How many words at `start` an element other than ``*`` stands for; 0 if it does not fit."""
    if element.isdecimal():
        count = int(element)
        return count if start + count <= len(words) else 0
    if start == len(words):
        return 0
    word = words[start]
    return int(word in groups[element[1:]] if element.startswith("@") else word == element)
