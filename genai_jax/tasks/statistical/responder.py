"""A rule-based responder as a task: it has no parameters, and its data are its script."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np

from genai_jax.config import Config, ConfigError, MissingFile, field, refuse_set
from genai_jax.data.kept import Keeper, KeptData
from genai_jax.data.text.scripts import Script, read_script
from genai_jax.decoding.responder import Conversation
from genai_jax.files import parse_json, read_text
from genai_jax.requests import ExactEvaluateRequest, SampleRequest
from genai_jax.sampled import TEXT_SUFFIXES, Texts
from genai_jax.tasks.language.sampling import read_prompts
from genai_jax.tasks.protocol import ArraySpec, Params, Phase, Task

SCRIPTS = pathlib.Path(__file__).parent / "scripts"
BUILT_IN = ("therapist",)
OWN = "script:"


@dataclasses.dataclass(frozen=True)
class ScriptConfig:
    dataset: str = field(
        "therapist",
        f"Script: {', '.join(BUILT_IN)}, or {OWN}PATH of a JSON file of your own.",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class LineRequest(SampleRequest):
    num_samples: int = field(
        1, "Answers to each line; of a rule's answers, each begins with the next one.", minimum=1
    )
    prompt: str = field("", "What the user says; empty for a greeting.")
    prompt_file: str = field(
        "", "File with what the user says in a conversation, a line each.", path=True
    )
    suffixes: ClassVar = TEXT_SUFFIXES

    def __post_init__(self):
        if self.prompt and self.prompt_file:
            raise ValueError("`prompt` and `prompt_file` exclude each other")

    def prompts(self) -> list[str]:
        """The lines: at least one, which may be empty."""
        return read_prompts(self.prompt, self.prompt_file)


class ScriptData:
    """The script as `genai_jax.tasks.protocol.Data`: there is nothing to train on or to score."""

    batch_spec: ClassVar = {"rows": ArraySpec((1,), np.int32, ("batch",))}

    def __init__(self, config: Config):
        self._dataset, place = config.data.dataset, config.kept.get("data.dataset")
        self._kept = KeptData(place) if place else None

    @functools.cached_property
    def _text(self) -> str:
        if self._kept and (kept := self._kept.documents("script")):
            return kept[0]
        if self._dataset in BUILT_IN:
            return read_text(SCRIPTS / f"{self._dataset}.json")
        label, path = f"--data.dataset={self._dataset}", self._dataset.removeprefix(OWN)
        if path == self._dataset:
            raise ConfigError(
                f"{label} is neither {', '.join(BUILT_IN)} nor {OWN}PATH of a JSON file"
            )
        if "\0" not in path and not pathlib.Path(path).exists():
            raise MissingFile(f"{label}: no such file", "data.dataset")
        return read_text(path, label)

    @functools.cached_property
    def script(self) -> Script:
        """The checked script.

        Raises:
          ConfigError: it cannot be read, or is wrong.
        """
        label = f"--data.dataset={self._dataset}"
        try:
            return read_script(parse_json(self._text), label)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{label}: {error}") from None

    def train(self, rows: Sequence[int] | None = None) -> "_Nothing":
        return _Nothing()

    def held_out(self, max_batches: int, rows: Sequence[int] | None = None):
        return iter(())

    def record(self) -> dict:
        sha256 = hashlib.sha256(self._text.encode()).hexdigest()
        return {"dataset": self._dataset, "keywords": len(self.script.keywords), "sha256": sha256}

    def keep(self, folder: pathlib.Path, record: dict) -> None:
        """Keeps the script, so that a run answers alike when the file has changed."""
        keeper = Keeper(folder, record, {})
        if not keeper.is_there():
            keeper.documents("script", [self._text])
            keeper.finish()

    def check(self, trained_on: dict) -> None:
        """Any script goes with a model that has no parameters."""


class _Nothing:
    """An endless iterator of empty batches."""

    def __next__(self) -> dict:
        return {"rows": np.zeros(1, np.int32)}

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        pass

    def close(self) -> None:
        pass


class Responder(Task):
    """The task behind ``--task=responder``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {"data": ScriptConfig}
    partition_rules: ClassVar = ()
    sample_request = LineRequest
    evaluate_request = ExactEvaluateRequest
    is_scored = False

    def __init__(self, config: Config):
        refuse_set("run", config.run, ("dtype", "seed"), "has no effect on a responder")
        self.data = ScriptData(config)
        self.data.script  # noqa: B018  a mistake in it is named now

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        return {}, {}

    def phases(self, params: Params) -> tuple[Phase, ...]:
        return ()

    def fit(self, batches) -> Params:
        return {}

    def example_metrics(self, params, mutables, batch, key) -> dict:
        raise ConfigError("a responder assigns no probabilities: there is nothing to score")

    def sample(self, params, mutables, request: LineRequest) -> Texts:
        """Answers line after line, in `num_samples` conversations; the texts include the lines."""
        lines, count = request.prompts(), request.num_samples
        talks = [Conversation(self.data.script, request.seed + i) for i in range(count)]
        prompts = [line for line in lines for _ in talks]
        answers = [talk.answer(line) for line in lines for talk in talks]
        texts = [f"{line}\n{a}" if line else a for line, a in zip(prompts, answers, strict=True)]
        return Texts(texts, prompts)
