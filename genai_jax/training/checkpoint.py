"""Checkpoints: train state, data iterator, and clock as one object, saved by orbax."""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from genai_jax.config import ConfigError, field
from genai_jax.training.checksum import checksums
from genai_jax.training.distributed import all_processes, barrier, is_main
from genai_jax.training.frozen import FrozenStore, partial_restore, shapes_of
from genai_jax.training.readable import check_readable, not_opened, not_readable
from genai_jax.training.trees import (
    dictionaries,
    leaf_paths,
    merged,
    nested,
    overlay,
    path_name,
    select,
)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(
        500, "Steps between checkpoints; 0 saves only the last step.", minimum=0, changeable=True
    )
    keep: int = field(2, "Number of newest checkpoints to keep.", minimum=1, changeable=True)
    keep_best: bool = field(
        True,
        "Also keep the checkpoint with the lowest held-out loss, that of --ema.use if it is set.",
        changeable=True,
    )


DEFAULT = CheckpointConfig()


LAYOUT = 2  # of the state in a checkpoint; layout 1 had counters of loss calls in the mutables


FROZEN = "frozen"  # the folder of the parameters that never change


class Misfit(ConfigError):
    """A checkpoint that is whole, but not of the model that is to be restored."""


class OldLayout(Misfit):
    """A checkpoint written by another version of this project."""


class Unreadable(Misfit):
    """A checkpoint that may be whole, but cannot be read now: no permission, or an I/O error."""


class Checkpointer:
    """Saves in the background, and restores the newest checkpoint that can be read.

    Parameters that never change are saved only once, in the folder ``frozen`` next to the folder of
    the checkpoints, and shared by all of them.

    Args:
      directory: folder of the checkpoints.
      config: which checkpoints to keep.
      read_only: whether to leave all files as they are.
      frozen: paths of the parameters that no step changes ("teacher/...").
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        config: CheckpointConfig = DEFAULT,
        *,
        read_only: bool = False,
        frozen: Collection[str] = (),
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self._ocp = ocp
        self._frozen = frozenset(frozen)
        keep = [policies.LatestN(config.keep)]
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=_loss_of,
                    reverse=True,  # the lowest loss is best
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        directory = pathlib.Path(directory).absolute()
        if is_main():  # one process may look at thousands of files, not all of them
            check_readable(directory)
            check_readable(directory.with_name(FROZEN))
        try:
            self._manager = ocp.CheckpointManager(
                directory,
                options=ocp.CheckpointManagerOptions(
                    best_fn=_loss_of,  # has the metrics written
                    best_mode="min",
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                ),
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    **{n: ocp.JsonCheckpointHandler() for n in ("data", "clock", "checksums")},
                },
            )
        except Exception as error:  # it reads a file of every checkpoint, which may be damaged
            raise not_opened(error, directory) from None
        self._store = FrozenStore(directory.with_name(FROZEN), read_only)
        self._read_only = read_only

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step whose checkpoint has the lowest held-out loss; None if none has a loss."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, data: dict, clock: dict, loss: float | None = None):
        """Starts to save a checkpoint; `state` may be donated once this returns.

        Raises:
          OSError: this checkpoint or the one before it could not be written.
        """
        args = self._ocp.args
        state, frozen = self._without_frozen(state)
        clock = {**clock, "layout": LAYOUT}
        sums = checksums(state, data=data, clock=clock)
        if frozen:
            sums |= {f"params/{path}": value for path, value in self._store.save(frozen).items()}
        self._manager.save(
            step,
            args=args.Composite(
                state=args.PyTreeSave(state),
                data=args.JsonSave(data),
                clock=args.JsonSave(clock),
                checksums=args.JsonSave(sums),
            ),
            metrics=None if loss is None else {"loss": loss},
            force=True,
        )

    def restore(
        self, shapes: Any, step: int | None = None, only: Sequence[str] | None = None
    ) -> tuple[int, Any, dict, dict] | None:
        """Restores (step, state, data, clock); None if there are no checkpoints.

        Args:
          shapes: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto, on any mesh.
          step: the step to restore; None for the newest checkpoint that is intact.
          only: parts of the state to read, as paths ("params", "ema/0.99"); all if None. Other
            parts are not read and come back as None.

        Raises:
          ConfigError: `step` does not exist, all checkpoints are damaged, or they have another
            layout.
          Unreadable: a checkpoint cannot be read now; unlike a damaged one, it is not passed over.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise ConfigError(f"no checkpoint of step {step}; there are {steps or 'none'}")
        candidates = [step] if step is not None else steps[::-1]
        problem = None
        for candidate in candidates:
            try:
                return candidate, *self._restore(candidate, shapes, only)
            except Misfit:
                raise
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                self.raise_if_unreadable(candidate, error)
                folder = pathlib.Path(self._manager.directory) / str(candidate)
                problem = f"checkpoint {folder} is damaged: {first_line(error)}"
                if is_main():
                    print(f"warning: {problem}; an older one is tried", file=sys.stderr)
        if problem:
            raise ConfigError(f"{problem}; no other checkpoint is left")
        if not self._read_only:
            self._store.remove()  # what an earlier life of the run left that never saved
        return None

    def saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array of the state; needs no code of the task that saved it.

        Raises:
          ConfigError: the checkpoint has another layout.
        """
        self._check_layout(step)
        saved = shapes_of(self._manager.item_metadata(step)["state"])
        frozen = {f"params/{path}": shape for path, shape in self._store.shapes().items()}
        return saved | frozen

    def read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Reads some arrays of the state.

        Args:
          step: of the checkpoint.
          wanted: path -> `jax.ShapeDtypeStruct` with the sharding to read onto.

        Returns:
          Path -> array.

        Raises:
          ConfigError: an array is damaged.
        """
        saved = shapes_of(self._manager.item_metadata(step)["state"])
        here = nested({path: x for path, x in wanted.items() if path in saved})
        frozen = nested({p.removeprefix("params/"): x for p, x in wanted.items() if p not in saved})
        state: Any = {}
        if here:
            args = self._ocp.args.Composite(state=partial_restore(here))
            state = self._manager.restore(step, args=args)["state"]
        if frozen:
            state = overlay({"params": {}, **state}, {"params": self._store.read(frozen)})
        arrays = {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(state)[0]}
        args = self._ocp.args.Composite(checksums=self._ocp.args.JsonRestore())
        expected = self._manager.restore(step, args=args)["checksums"]
        damaged = [p for p, value in checksums(state).items() if expected.get(p) != value]
        if damaged:
            raise ConfigError(
                f"checkpoint {step} in {self._manager.directory} is damaged: the checksum of "
                f"{damaged[0]} differs"
            )
        return arrays

    def _restore(
        self, step: int, shapes: Any, only: Sequence[str] | None
    ) -> tuple[Any, dict, dict]:
        args, left_out = self._ocp.args, self._ocp.PLACEHOLDER
        self._check_layout(step)
        self._check_fits(step, shapes)
        whole = shapes
        shapes, frozen = self._without_frozen(whole)
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
            unchanged = self._store.read(_only_frozen(frozen, only)) if frozen else {}
        except Exception as error:
            problem = error
        # Only the processes that read a damaged file see the error.
        if not all_processes(problem is None):
            reason = self._not_readable(step, problem) if problem else None
            if not all_processes(reason is None):
                raise self._unreadable(step, reason or "another process cannot read it")
            raise problem or ValueError("another process cannot read it")
        state = jax.tree.map(lambda x: None if x is left_out else x, restored["state"])
        if frozen:
            params = overlay(jax.tree.map(lambda _: None, frozen), unchanged)
            params = merged(state.params, params)
            # Groups without arrays are nowhere else.
            state = state.replace(params=merged(dictionaries(whole.params), params))
        data, clock = restored["data"], restored["clock"]
        sums, saved = checksums(state, data=data, clock=clock), restored["checksums"]
        names = sums | saved if only is None else sums
        damaged = [name for name in names if sums.get(name) != saved.get(name)]
        if damaged:
            raise ValueError(f"{damaged[0]} is not what was saved (its checksum differs)")
        return state, data, clock

    def raise_if_unreadable(self, step: int, error: Exception):
        """Raises `Unreadable` if a checkpoint failed with `error`, but may not be damaged."""
        reason = self._not_readable(step, error)
        if reason:
            raise self._unreadable(step, reason) from None

    def _not_readable(self, step: int, error: Exception) -> str | None:
        folder = pathlib.Path(self._manager.directory)
        return not_readable(error, folder / str(step), folder.with_name(FROZEN))

    def _unreadable(self, step: int, reason: str) -> Unreadable:
        return Unreadable(
            f"checkpoint {step} in {self._manager.directory} cannot be read now: {reason}; nothing "
            "was changed"
        )

    def _check_fits(self, step: int, shapes: Any):
        """Raises `Misfit` for parameters that the checkpoint lacks, or has in another shape."""
        saved, parts = self.saved_shapes(step), {"params": getattr(shapes, "params", {})}
        if not saved:  # its files are missing, which restoring it will tell
            return
        for path, x in jax.tree_util.tree_flatten_with_path(parts)[0]:
            name, shape = path_name(path), tuple(x.shape)
            if saved.get(name) != shape:
                there = f"{name} of shape {saved[name]}" if name in saved else f"no {name}"
                raise Misfit(
                    f"checkpoint {step} in {self._manager.directory} has {there}, and this model "
                    f"has it of shape {shape}: was the task's code changed?"
                )

    def _check_layout(self, step: int):
        args = self._ocp.args.Composite(clock=self._ocp.args.JsonRestore())
        layout = self._manager.restore(step, args=args)["clock"].get("layout", 1)
        if layout != LAYOUT:
            raise OldLayout(
                f"checkpoint {step} in {self._manager.directory} has layout {layout} of another "
                f"version of genai_jax; this one reads layout {LAYOUT}: train the run again, or "
                "use the commit that run.json names"
            )

    def _without_frozen(self, state: Any) -> tuple[Any, Any]:
        """The state without the parameters that never change, and those parameters."""
        if not self._frozen:
            return state, {}
        changing = frozenset(leaf_paths(state.params)) - self._frozen
        return (
            state.replace(params=select(state.params, changing)),
            select(state.params, self._frozen),
        )

    def set_aside_after(self, step: int):
        """Moves checkpoints newer than `step` to the folder ``damaged`` next to the checkpoints."""
        later = [other for other in self.steps() if other > step]
        if not later:
            return
        if is_main():
            self._move_aside(later)
        barrier()  # no process looks before they are moved
        self._manager.reload()

    def _move_aside(self, later: list[int]):
        folder = pathlib.Path(self._manager.directory)
        aside = folder.with_name("damaged")
        aside.mkdir(exist_ok=True)
        for other in later:
            shutil.rmtree(aside / str(other), ignore_errors=True)
            shutil.move(folder / str(other), aside / str(other))
            print(f"warning: checkpoint {other} was moved to {aside}", file=sys.stderr)

    def wait(self):
        """Blocks until the last checkpoint is on disk; raises the error if saving it failed."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()


def _only_frozen(frozen: Any, only: Sequence[str] | None) -> Any:
    """The parameters that never change, restricted to the parts in `only`."""
    return select(frozen, [p for p in leaf_paths(frozen) if _is_part(f"params/{p}", only)])


def _is_part(path: str, only: Sequence[str] | None) -> bool:
    """Whether a path lies within one of the parts, which are leading segments of paths."""
    return only is None or any(f"{path}/".startswith(f"{part}/") for part in only)


def first_line(error: BaseException) -> str:
    """First line of an error's message, shortened in the middle if long; its type if empty."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:130]} ... {line[-160:]}"


def _loss_of(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]
