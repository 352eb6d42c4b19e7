"""Checkpoints: train state, data iterator and clock as one object, by orbax."""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax

from genai_jax.config import ConfigError, field
from genai_jax.training.checksum import checksums
from genai_jax.training.distributed import everywhere, is_main
from genai_jax.training.sharding import path_name


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(
        500, "steps between checkpoints; 0 saves the last step alone", minimum=0, changeable=True
    )
    keep: int = field(2, "newest checkpoints kept", minimum=1, changeable=True)
    keep_best: bool = field(
        True, "also keep the checkpoint with the lowest held-out loss", changeable=True
    )


class Checkpointer:
    """Saves in the background and restores the newest checkpoint that can be read."""

    def __init__(
        self, directory: str | pathlib.Path, config: CheckpointConfig, *, read_only: bool = False
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self._ocp = ocp
        keep = [policies.LatestN(config.keep)]
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,  # the lowest is the best
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            pathlib.Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
            item_names=("state", "data", "clock", "checksums"),
        )

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict, clock: dict, loss: float | None = None):
        """Starts saving; `state` may be donated once this returns.

        Raises:
          OSError: this save, or the one before it, could not be written.
        """
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.PyTreeSave(state),
                data=args.JsonSave(data),
                clock=args.JsonSave(clock),
                checksums=args.JsonSave(checksums(state, data=data, clock=clock)),
            ),
            metrics=None if loss is None else {"loss": loss},
            force=True,
        )

    def restore(
        self, shapes: Any, step: int | None = None, only: Sequence[str] | None = None
    ) -> tuple[int, Any, dict, dict] | None:
        """(step, state, data, clock) of a step, or of the newest that is whole, or None.

        Args:
          shapes: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto, which may
            belong to another mesh than the one that saved it.
          step: a certain step.
          only: the parts of the state to read, as paths ("params", "ema/0.99"); all if None. What
            is not in them comes back as None and is not read.

        Raises:
          ConfigError: `step` does not exist, or there are checkpoints but none can be read.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise ConfigError(f"no checkpoint of step {step}; there are {steps or 'none'}")
        candidates = [step] if step is not None else steps[::-1]
        problem = None
        for candidate in candidates:
            try:
                return candidate, *self._restore(candidate, shapes, only)
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                problem = f"checkpoint {candidate} cannot be restored: {first_line(error)}"
                if is_main():
                    print(f"warning: {problem}", file=sys.stderr)
        if problem:
            raise ConfigError(
                f"{problem}; no other checkpoint is left in {self._manager.directory}"
            )
        return None

    def _restore(
        self, step: int, shapes: Any, only: Sequence[str] | None
    ) -> tuple[Any, dict, dict]:
        args, left_out = self._ocp.args, self._ocp.PLACEHOLDER
        target = jax.tree_util.tree_map_with_path(
            lambda path, x: x if _is_part(path_name(path), only) else left_out, shapes
        )
        problem = None
        try:
            restored = self._manager.restore(
                step,
                args=args.Composite(
                    state=args.PyTreeRestore(
                        target, self._ocp.checkpoint_utils.construct_restore_args(target)
                    ),
                    data=args.JsonRestore(),
                    clock=args.JsonRestore(),
                    checksums=args.JsonRestore(),
                ),
            )
        except Exception as error:
            problem = error
        if not everywhere(problem is None):  # a damaged file is seen by those who read it
            raise problem or ValueError("another process cannot read it")
        state = jax.tree.map(lambda x: None if x is left_out else x, restored["state"])
        data, clock = restored["data"], restored["clock"]
        found, saved = checksums(state, data=data, clock=clock), restored["checksums"]
        names = found | saved if only is None else found
        damaged = [name for name in names if found.get(name) != saved.get(name)]
        if damaged:
            raise ValueError(f"{damaged[0]} is not what was saved (its checksum differs)")
        return state, data, clock

    def set_aside_after(self, step: int):
        """Moves checkpoints newer than `step` to the folder ``damaged`` beside the others'."""
        later = [other for other in self.steps() if other > step]
        if not later:
            return
        if is_main():
            self._move_aside(later)
        everywhere(True)  # nobody looks before they are moved
        self._manager.reload()

    def _move_aside(self, later: list[int]):
        folder = pathlib.Path(self._manager.directory)
        aside = folder.with_name("damaged")
        aside.mkdir(exist_ok=True)
        for other in later:
            shutil.rmtree(aside / str(other), ignore_errors=True)
            shutil.move(folder / str(other), aside / str(other))
            print(f"warning: checkpoint {other} is moved to {aside}", file=sys.stderr)

    def wait(self):
        """Blocks until the last save is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()


def _is_part(path: str, only: Sequence[str] | None) -> bool:
    """Whether a path is in one of the parts, each the beginning of a path."""
    return only is None or any(f"{path}/".startswith(f"{part}/") for part in only)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type; the middle of a long one is left out."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:130]} ... {line[-160:]}"
