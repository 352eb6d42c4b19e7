"""Flags that name files and folders."""

import dataclasses
import re

from genai_jax import compile_check, components, coordinate_check, fit, study, train_tokenizer
from genai_jax.config import last_value
from genai_jax.scaling.ladder import LadderRequest
from genai_jax.scaling.study.analyses import ANALYSES
from genai_jax.tasks.registry import TASKS, task_class

COMMANDS = {
    "compile_check": {"run": compile_check.CheckRequest},
    "coordinate_check": {"run": coordinate_check.CoordinateRequest},
    "fit": {"run": fit.FitRequest},
    "ladder": {"run": LadderRequest},
    "study": {"run": study.StudyRequest},
    "train_tokenizer": train_tokenizer.COMPONENTS,
    **{name: {"study": analysis.config} for name, analysis in ANALYSES.items()},
}
NAMES_A_FILE = re.compile(r"\b([Ff]iles?|[Ff]olders?|[Ww]orkdir|[Ff]lagfiles?|PATH)\b")


def components_of_all():
    for task in TASKS:
        cls = task_class(task)
        yield f"train {task}", components.components_of(cls)
        for kind in components.REQUESTS:
            if kind != "sample_request" or hasattr(cls, "sample"):
                yield f"{kind} {task}", {"run": components.request_class(cls, kind)}
    yield from COMMANDS.items()


def text_flags(parts):
    for component, cls in parts.items():
        for f in dataclasses.fields(cls):
            if f.type in (str, str | None, "str", "str | None"):
                yield component, f


def test_every_flag_that_names_a_file_is_marked_as_a_path():
    for user, parts in components_of_all():
        for component, f in text_flags(parts):
            names_a_file = bool(NAMES_A_FILE.search(f.metadata["help"]))
            assert names_a_file <= f.metadata["path"], f"{user}: {component}.{f.name}: path=True"


def test_the_home_folder_is_expanded_where_flags_are_read(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--workdir=~/runs/a", "--data.dataset=text:~/books", "--data.tokenizer=~/t.json"]
    config = components.parse_run([*given, "--init_from", "a~b", "--data.answer_after=~"])
    expected = {
        "workdir": "/home/me/runs/a", "data.dataset": "text:/home/me/books",
        "data.tokenizer": "/home/me/t.json", "init_from": "a~b", "data.answer_after": "~",
    }  # fmt: skip
    assert config.items() | expected == config.items()
    assert "--data.dataset=text:/home/me/books\n" in config.to_flags()
    assert last_value(["--workdir", "~/runs/a"], "workdir") == "/home/me/runs/a"
