"""Rows and samples for Weights & Biases, which never stop or hold a run that has begun."""

import html
import json
import pathlib
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any

from genai_jax.config import Config, ConfigError
from genai_jax.files import read_object, read_text, reason_of, write_text, writing_to
from genai_jax.training.tensorboard import LARGEST, PICTURES

FILE = "wandb.json"  # in the workdir: which run of W&B a resumed run continues
FINISH_S = 60  # that the end of a run waits for what is not uploaded yet
SAMPLE_STEP = "sample_step"  # metric of W&B: the step that samples are of
INSTALL = 'pip install -e ".[wandb]"'


def library(project: str) -> Any:
    """The package; it is imported only if ``--train.wandb`` is set.

    Raises:
      ConfigError: it is not installed, or does not work here.
    """
    try:
        import wandb
    except ImportError:
        wandb = None
    except Exception as error:  # of its own requirements
        reason = reason_of(error)
        raise ConfigError(f"--train.wandb={project}: cannot import wandb: {reason}") from None
    if not hasattr(wandb, "init"):  # a folder ./wandb, such as W&B leaves, is imported as well
        raise ConfigError(f"--train.wandb={project} needs a package: {INSTALL}")
    return wandb


def wandb_boards(config: Config, step: int) -> "tuple[WandbBoard, ...]":
    """The board of ``--train.wandb``, or none.

    Args:
      config: of the run.
      step: that the run goes on from.

    Raises:
      ConfigError: W&B refuses a run that has not begun, or the file with its name is damaged. A run
        that goes on does so without it, after a warning.
    """
    project = config.train.wandb
    if not project:
        return ()
    try:
        return (WandbBoard(library(project), config),)
    except Exception as error:  # of the network, of the login, of the package
        line = f"W&B cannot begin: {reason_of(error)}"
        if not step:
            if isinstance(error, ConfigError):
                raise
            advice = "log in with `wandb login`, or set WANDB_MODE=offline"
            raise ConfigError(f"--train.wandb={project}: {line}; {advice}") from None
        print(f"warning: {line}; the run goes on without it", file=sys.stderr)
        return ()


class WandbBoard:
    """A run of W&B with the flags as its configuration, in the folder ``wandb`` of the workdir.

    The name of the W&B run stays in the workdir, so that a resumed run continues it. W&B reads its
    API key itself. After an error a warning says so once, and nothing more is sent.

    W&B takes no step again after a later one. What a resumed run repeats is there already, with the
    same values unless its flags have changed, and is not sent again. Samples that a signal left to
    the resumed run are shown at the next step of W&B; `SAMPLE_STEP` is the one they are of.
    """

    def __init__(self, wandb: Any, config: Config):
        workdir = pathlib.Path(config.run.workdir)
        entity, _, project = config.train.wandb.rpartition("/")
        self._wandb = wandb
        self._run = wandb.init(
            entity=entity or None,
            project=project,
            dir=str(workdir),
            id=_run_id(workdir),
            name=workdir.absolute().name,
            config=config.items(),
            resume="allow",
            settings=wandb.Settings(**_settings(wandb)),
        )
        self._run.define_metric(SAMPLE_STEP, hidden=True)
        self._run.define_metric("samples*", step_metric=SAMPLE_STEP)
        self._first = self._run.step  # that is not there yet
        self._repeats = config.run.resume_with_changes  # rows that may differ from those there

    def write(self, row: dict):
        """Sends {"step": ..., name: number, ...}, unless W&B has a row of the step already."""
        if self._run is None:
            return
        step = row["step"]
        if step >= self._first:
            self._send(lambda: step, lambda: {n: x for n, x in row.items() if n != "step"})
        elif self._repeats:
            print(
                f"warning: W&B keeps the rows of steps {step} to {self._first - 1} as they were "
                "before the changes",
                file=sys.stderr,
            )
            self._repeats = False

    def show(self, step: int, files: Mapping[str, pathlib.Path]):
        """Sends the pictures and texts among files, each under its name."""
        shown = {n: p for n, p in files.items() if p.suffix in (*PICTURES, ".txt")}
        if shown:
            media = lambda: {n: self._media(p) for n, p in shown.items()}
            self._send(lambda: max(step, self._run.step), lambda: media() | {SAMPLE_STEP: step})

    def close(self, failed: bool = False):
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _send(self, step: Callable[[], int], values: Callable[[], dict]):
        if self._run is None:
            return
        try:
            self._run.log(values(), step=step())
        except Exception as error:  # whatever the package raises
            self._give_up(error)

    def _media(self, path: pathlib.Path) -> Any:
        if path.suffix == ".gif":
            return self._wandb.Video(str(path), format="gif")
        if path.suffix in PICTURES:
            return self._wandb.Image(str(path))
        text = html.escape(read_text(path, limit=LARGEST))
        return self._wandb.Html(f"<pre>{text}</pre>", inject=False)

    def _give_up(self, error: Exception):
        print(f"warning: nothing more is sent to W&B: {reason_of(error)}", file=sys.stderr)
        self._run = None


def _settings(wandb: Any) -> dict[str, Any]:
    """Those that this version has; the progress bar stays on the terminal."""
    ours = {"console": "off", "quiet": True, "finish_timeout": FINISH_S}
    known = getattr(wandb.Settings, "model_fields", ours)
    return {name: value for name, value in ours.items() if name in known}


def _run_id(workdir: pathlib.Path) -> str:
    """The name of the W&B run: that of the workdir, or a new one, which is kept there.

    Raises:
      ConfigError: the file cannot be read or written, or holds something else.
    """
    path = workdir / FILE
    if path.exists() or path.is_symlink():
        name = read_object(path).get("id")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise ConfigError(f"{path} does not hold the name of a W&B run; delete it to begin one")
        return name
    name = secrets.token_hex(4)
    with writing_to(path):
        write_text(path, json.dumps({"id": name}) + "\n")
    return name
