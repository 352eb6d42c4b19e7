"""Scripts of a rule-based responder: JSON, which is checked and never executed.

    {"greetings": ["..."], "farewell": "...", "goodbyes": ["bye"], "fallback": ["Go on."],
     "replace": {"dont": "don't"}, "reflect": {"my": "your"}, "groups": {"kin": ["mother"]},
     "keywords": [{"words": ["my"], "rank": 2,
                   "rules": [{"pattern": "* my @kin *", "answers": ["Your {3}?", "=dream", "="]}],
                   "memory": [{"pattern": "* my *", "answers": ["Earlier, your {3}?"]}]}]}

A pattern is matched against the words of a line: ``*`` stands for any number of words, a number for
so many, ``@kin`` for one of a group, and another word for itself. An answer quotes its parts,
counted from 1, as {1}; ``=word`` answers as another keyword does, and ``=`` as the next keyword of
the line.
"""

import dataclasses
import re
from typing import Any

from genai_jax.errors import ConfigError, printable

MOST = 64  # elements of a pattern
QUOTED = re.compile(r"\{(\d{1,3})\}")
REQUIRED = ("greetings", "fallback", "keywords")
KNOWN = (*REQUIRED, "farewell", "goodbyes", "replace", "reflect", "groups")


@dataclasses.dataclass(frozen=True)
class Rule:
    pattern: tuple[str, ...]
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Keyword:
    words: tuple[str, ...]
    rank: int
    rules: tuple[Rule, ...]
    memory: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Script:
    """See the top of this file."""

    greetings: tuple[str, ...]
    farewell: str
    goodbyes: tuple[str, ...]
    fallback: tuple[str, ...]
    replace: dict[str, str]
    reflect: dict[str, str]
    groups: dict[str, tuple[str, ...]]
    keywords: tuple[Keyword, ...]

    def keyword(self, word: str) -> Keyword | None:
        return next((k for k in self.keywords if word in k.words), None)


def read_script(content: Any, label: str) -> Script:
    """A script from parsed JSON.

    Args:
      content: of the file.
      label: what an error calls it.

    Raises:
      ConfigError: a part that is missing, unknown, of another type, or refers to nothing.
    """
    reader = _Reader(label)
    reader.check_names(content, KNOWN, REQUIRED, "the script")
    groups = reader.mapping(content, "groups")
    script = Script(
        greetings=reader.texts(content, "greetings"),
        farewell=reader.text({"farewell": "Goodbye.", **content}, "farewell"),
        goodbyes=reader.words({"goodbyes": ["bye", "goodbye"], **content}, "goodbyes"),
        fallback=reader.texts(content, "fallback"),
        replace={w: reader.text(reader.mapping(content, "replace"), w)
                 for w in reader.mapping(content, "replace")},
        reflect={w: reader.text(reader.mapping(content, "reflect"), w)
                 for w in reader.mapping(content, "reflect")},
        groups={name: reader.words(groups, name) for name in groups},
        keywords=tuple(reader.keyword(k) for k in reader.items(content, "keywords")),
    )  # fmt: skip
    reader.check_references(script)
    return script


class _Reader:
    """Reads parts of a script, and names what is wrong with them."""

    def __init__(self, label: str):
        self._label = label

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._label}: {printable(what)[:300]}")

    def check_names(self, content: Any, known, required, where: str):
        if not isinstance(content, dict):
            raise self.wrong(f"{where} is not a JSON object")
        for name in content:
            if name not in known:
                raise self.wrong(f"{where} has {name!r}; allowed are {', '.join(known)}")
        for name in required:
            if name not in content:
                raise self.wrong(f"{where} has no {name!r}")

    def text(self, content: dict, name: str) -> str:
        value = content[name]
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{name!r} is {value!r}; it has to be a text")
        return value

    def items(self, content: dict, name: str) -> list:
        value = content.get(name)
        if not isinstance(value, list) or not value:
            raise self.wrong(f"{name!r} is {value!r}; it has to be a list of at least one")
        return value

    def texts(self, content: dict, name: str) -> tuple[str, ...]:
        return tuple(self.text({name: value}, name) for value in self.items(content, name))

    def words(self, content: dict, name: str) -> tuple[str, ...]:
        words = self.texts(content, name)
        for word in words:
            if word != word.lower() or len(word.split()) > 1:
                raise self.wrong(f"{name!r} has {word!r}; it has to be a word in lower case")
        return words

    def mapping(self, content: dict, name: str) -> dict[str, Any]:
        value = content.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(f"{name!r} is {value!r}; it has to be a JSON object")
        return value

    def keyword(self, content: Any) -> Keyword:
        known = ("words", "rank", "rules", "memory")
        self.check_names(content, known, ("words", "rules"), "a keyword")
        rank = content.get("rank", 0)
        if type(rank) is not int:
            raise self.wrong(f"'rank' is {rank!r}; it has to be a whole number")
        memory = self.items(content, "memory") if "memory" in content else []
        return Keyword(
            self.words(content, "words"), rank,
            tuple(map(self.rule, self.items(content, "rules"))), tuple(map(self.rule, memory)),
        )  # fmt: skip

    def rule(self, content: Any) -> Rule:
        self.check_names(content, ("pattern", "answers"), ("pattern", "answers"), "a rule")
        pattern = tuple(self.text(content, "pattern").lower().split())
        answers = self.texts(content, "answers")
        if len(pattern) > MOST:
            raise self.wrong(f"the pattern {content['pattern']!r} has over {MOST} parts")
        for element in pattern:
            if element.isdecimal() and not re.fullmatch("[1-9][0-9]?", element):
                raise self.wrong(f"the pattern element {element!r} is not a number from 1 to 99")
        for answer in answers:
            for part in map(int, QUOTED.findall(answer)):
                if not 1 <= part <= len(pattern):
                    raise self.wrong(
                        f"the answer {answer!r} quotes part {part} of {content['pattern']!r}, "
                        f"which has {len(pattern)}"
                    )
        return Rule(pattern, answers)

    def check_references(self, script: Script):
        rules = [r for k in script.keywords for r in (*k.rules, *k.memory)]
        for element in (e for rule in rules for e in rule.pattern):
            if element.startswith("@") and element[1:] not in script.groups:
                raise self.wrong(f"the pattern element {element!r} is not one of 'groups'")
        for answer in (a for rule in rules for a in rule.answers):
            if answer.startswith("=") and answer != "=" and not script.keyword(answer[1:]):
                raise self.wrong(f"the answer {answer!r} names a word that no keyword has")
        for rule in (r for k in script.keywords for r in k.memory):
            if any(answer.startswith("=") for answer in rule.answers):
                raise self.wrong(f"the memory {' '.join(rule.pattern)!r} has an answer with '='")
