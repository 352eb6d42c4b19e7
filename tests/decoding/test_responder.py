"""The rule-based responder: matching, the rules of its conversation, and what a script may hold."""

import json

import pytest

from genai_jax.config import ConfigError
from genai_jax.data.text.scripts import read_script
from genai_jax.decoding.responder import Conversation, match
from genai_jax.tasks.statistical.responder import SCRIPTS

KEYWORD = {"words": ["my"], "rules": [{"pattern": "* my *", "answers": ["Your {3}?"]}]}
SMALL = {
    "greetings": ["Hello.", "Hi."], "fallback": ["Go on.", "I see."],
    "reflect": {"my": "your", "me": "you"},
    "replace": {"mum": "mother", "im": "i am"}, "groups": {"kin": ["mother", "father"]},
    "keywords": [
        {"words": ["my"], "rank": 2, "rules": [
            {"pattern": "* my * @kin *", "answers": ["Your {4}?", "=dream", "="]},
            {"pattern": "* my *", "answers": ["Why your {3}?"]}],
         "memory": [{"pattern": "* my *", "answers": ["Earlier, your {3}."]}]},
        {"words": ["dream", "dreams"], "rank": 1, "rules": [
            {"pattern": "*", "answers": ["What about dreams?"]}]},
        {"words": ["i"], "rules": [{"pattern": "i 1 2 *", "answers": ["{2}, {3} and {4}"]}]},
    ],
}  # fmt: skip


@pytest.fixture
def talk():
    return Conversation(read_script(SMALL, "small"))


@pytest.mark.parametrize(
    ("pattern", "text", "parts"),
    [
        ("*", "", [""]),
        ("* b *", "a b c b", ["a", "b", "c b"]),  # the first * is as short as it can be
        ("* b", "b a b", ["b a", "b"]),
        ("* b * b *", "b b", ["", "b", "", "b", ""]),
        ("1 2 *", "a b c", ["a", "b c", ""]),
        ("1 2 *", "a b", None),
        ("@kin *", "father is", ["father", "is"]),
        ("@kin", "is", None),
        ("a", "", None),
    ],
)
def test_matching(pattern, text, parts):
    got = match(pattern.split(), text.split(), SMALL["groups"])
    assert (got and [" ".join(part) for part in got]) == parts


def test_matching_takes_time_in_proportion():
    assert match(["*", "a"] * 30 + ["b"], ["a"] * 1000, {}) is None  # hours by trial and error


def test_a_conversation(talk):
    assert talk.answer("  ") == "Hello."
    assert talk.answer("Well, MY mum hates me!") == "Your mother?"
    assert talk.answer("I dream of my father") == "What about dreams?"  # =dream
    assert talk.answer("my father and my dreams") == "What about dreams?"  # =: the next keyword
    assert talk.answer("my car. my father") == "Why your car?"  # the first clause with a keyword
    assert talk.answer("nothing") == "Earlier, your mother hates you."
    assert talk.answer("I see the sea there") == "See, the sea and there"
    for earlier in ("father", "father and your dreams", "car"):
        assert talk.answer("nothing") == f"Earlier, your {earlier}."
    assert [talk.answer("nothing") for _ in range(3)] == ["Go on.", "I see.", "Go on."]
    assert talk.answer("Bye!") == "Goodbye."


def test_answers_take_turns_from_any_of_them():
    answers = [Conversation(read_script(SMALL, "small"), turn).answer("so") for turn in range(3)]
    assert answers == ["Go on.", "I see.", "Go on."]


def test_the_script_that_is_there_answers():
    script = read_script(json.loads((SCRIPTS / "therapist.json").read_text()), "therapist")
    talk = Conversation(script)
    assert talk.answer("I'm afraid of my own code") == "Your own code?"
    assert talk.answer("I am unhappy.") == "I am sorry to hear that you are unhappy."
    assert talk.answer("Do machines think?") == "Do computers worry you?"
    assert talk.answer("Hmm") == "Let us talk more about why your own code."
    bare = {"remember", "forget", "forgot", "dreamed", "if", "was", "were", "can", "are", "your"}
    for keyword in script.keywords:  # each answers to its own words, but for those that need more
        for word in {*keyword.words} - bare:
            assert Conversation(script).answer(word) not in script.fallback


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fallback": []}, "'fallback' is []; it has to be a list of at least one"),
        ({"farewell": 3}, "'farewell' is 3; it has to be a text"),
        ({"code": "x"}, "the script has 'code'; allowed are greetings"),
        (
            {"keywords": [{"words": ["My"], "rules": []}]},
            "'words' has 'My'; it has to be a word in",
        ),
        ({"keywords": [{"words": ["my"]}]}, "a keyword has no 'rules'"),
        ({"keywords": [KEYWORD | {"rank": "1"}]}, "'rank' is '1'; it has to be a whole number"),
        ({"keywords": [3]}, "a keyword is not a JSON object"),
        ({"reflect": ["a"]}, "'reflect' is ['a']; it has to be a JSON object"),
        ({"groups": {}}, "the pattern element '@kin' is not one of 'groups'"),
    ],
)
def test_mistakes_in_a_script_are_one_line(changes, said):
    with pytest.raises(ConfigError) as error:
        read_script(SMALL | changes, "small")
    assert str(error.value).startswith(f"small: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "answer", "said"),
    [
        ("* my *", "{4}", "the answer '{4}' quotes part 4 of '* my *', which has 3"),
        ("* my *", "=no", "the answer '=no' names a word that no keyword has"),
        ("0 my", "a", "the pattern element '0' is not a number from 1 to 99"),
        ("* " * 65, "a", "the pattern '* * "),
    ],
)
def test_mistakes_in_a_rule(pattern, answer, said):
    rules = [{"pattern": pattern, "answers": [answer]}]
    with pytest.raises(ConfigError) as error:
        read_script(SMALL | {"keywords": [{"words": ["my"], "rules": rules}]}, "small")
    assert str(error.value).startswith(f"small: {said}")
