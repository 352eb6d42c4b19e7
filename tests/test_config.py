"""Dataclasses to flags and back."""

import dataclasses
import re

import pytest

from genai_jax.components import DEFAULT_TASK, parse_run, run_help
from genai_jax.config import ConfigError, field, name_flags, parse
from genai_jax.tasks.registry import TASKS


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = field(3, "a number", minimum=1, maximum=9)
    rate: float | None = field(None, "a rate", minimum=0)
    kind: str = field("a", "a choice", choices=("a", "b"))
    deep: bool = field(True, "a switch")


COMPONENTS = {"inner": Inner}


def read(*argv):
    return parse(argv, COMPONENTS)[0].inner


def test_values_have_the_type_of_their_field():
    assert read() == Inner()
    given = read("--inner.size=4", "--inner.rate=1e-3", "--inner.kind=b", "--noinner.deep")
    assert given == Inner(4, 0.001, "b", False)
    assert read("--inner.size", "4", "--inner.deep=false") == Inner(4, deep=False)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--inner.size=x", "--inner.size=x: it is not a whole number$"),
        ("--inner.size=1e1", "--inner.size=1e1: it is not a whole number$"),
        ("--inner.rate=1e", "--inner.rate=1e: it is not a number$"),
        ("--inner.size=10", "10 is not a whole number from 1 to 9$"),
        ("--inner.rate=-1", "-1.0 is not a number of at least 0$"),
        ("--inner.kind=c", "<a|b>"),
        ("--inner.deep=maybe", "--inner.deep=maybe: it is neither true nor false$"),
        (
            "--inner.sizes=1",
            "--inner.sizes is not a flag of this command; did you mean --inner.size?",
        ),
    ],
)
def test_a_wrong_value_is_one_line_with_what_is_allowed(flag, said):
    with pytest.raises(ConfigError, match=said) as error:
        read(flag)
    assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Pair:
    low: int = field(0, "The lower bound.")
    high: int = field(9, "The upper bound.")

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(
                f"low={self.low} is more than high={self.high}: lower it or set `high`"
            )


def test_fields_that_contradict_each_other_are_named_as_the_flags_of_their_component():
    for components, said in (
        ({"one": Pair, "two": Pair}, "--two.low=12 is more than --two.high=9: lower it or set "
         "--two.high"),
        ({"run": Pair}, "--low=12 is more than --high=9: lower it or set --high"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            parse([said.split()[0]], components)
        assert str(error.value) == said
    named = "--first.low=1 and `other`, below=2"
    assert name_flags(named, "second", Pair) == named


def test_flagfiles_nest_and_the_later_line_wins(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.flags").write_text("# base\n--inner.size=5\n--inner.kind=b\n")
    (tmp_path / "sub" / "run.flags").write_text(
        "--flagfile=../base.flags\n\n// another comment\n--inner.size=6\n"
    )
    monkeypatch.chdir("/")
    flagfile = f"--flagfile={tmp_path / 'sub' / 'run.flags'}"
    assert read(flagfile) == Inner(6, kind="b")
    assert read(flagfile, "--inner.size=7") == Inner(7, kind="b")
    assert read("--inner.size=7", flagfile) == Inner(6, kind="b")
    assert read("--flagfile", str(tmp_path / "base.flags")) == Inner(5, kind="b")


def test_to_flags_reproduces_any_configuration(tmp_path):
    changed = ("--transformer.num_kv_heads=2", "--ema.decay=0.9,0.99", "--notrain.progress")
    config = parse_run(changed)
    path = tmp_path / "flags.txt"
    path.write_text(config.to_flags())
    assert parse_run([f"--flagfile={path}"]) == config


@pytest.mark.parametrize("task", TASKS)
def test_help_names_every_flag_of_a_task_with_its_default(task):
    text = run_help([f"--task={task}"], "usage")
    defaults = parse_run([f"--task={task}"]).items() | {"task": DEFAULT_TASK}
    for name, value in defaults.items():
        shown = {"": "empty", None: "unset"}.get(value, value)
        sentence = text.split(f"  --{name}\n")[1].split("\n")[0]
        assert re.search(rf"\(default {re.escape(str(shown))}[;)]", sentence)
