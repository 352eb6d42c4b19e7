"""Checkpoints: train state, data iterator and clock as one object, by orbax."""

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
from genai_jax.training.trees import leaf_paths, merged, nested, overlay, path_name, select


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(
        500, "steps between checkpoints; 0 saves the last step alone", minimum=0, changeable=True
    )
    keep: int = field(2, "newest checkpoints kept", minimum=1, changeable=True)
    keep_best: bool = field(
        True, "also keep the checkpoint with the lowest held-out loss", changeable=True
    )


DEFAULT = CheckpointConfig()


LAYOUT = 2  # of the state in a checkpoint; 1 kept counters of loss calls in the mutables


class OldLayout(ConfigError):
    """A checkpoint that another version of this project wrote."""


class Checkpointer:
    """Saves in the background and restores the newest checkpoint that can be read.

    Parameters that never change are saved once, in the folder ``frozen`` beside the checkpoints',
    which all checkpoints refer to.

    Args:
      directory: of the checkpoints.
      config: which to keep.
      read_only: leaves everything as it is.
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
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,  # the lowest is the best
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        directory = pathlib.Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                **{n: ocp.JsonCheckpointHandler() for n in ("data", "clock", "checksums")},
            },
        )
        self._store = FrozenStore(directory.with_name("frozen"), read_only)
        self._read_only = read_only

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict, clock: dict, loss: float | None = None):
        """Starts saving; `state` may be donated once this returns.

        Raises:
          OSError: this save, or the one before it, could not be written.
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
        """(step, state, data, clock) of a step, or of the newest that is whole, or None.

        Args:
          shapes: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto, which may
            belong to another mesh than the one that saved it.
          step: a certain step.
          only: the parts of the state to read, as paths ("params", "ema/0.99"); all if None. What
            is not in them comes back as None and is not read.

        Raises:
          ConfigError: `step` does not exist, there are checkpoints but none can be read, or they
            have an older layout.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise ConfigError(f"no checkpoint of step {step}; there are {steps or 'none'}")
        candidates = [step] if step is not None else steps[::-1]
        problem = None
        for candidate in candidates:
            try:
                return candidate, *self._restore(candidate, shapes, only)
            except OldLayout:
                raise
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                problem = f"checkpoint {candidate} cannot be restored: {first_line(error)}"
                if is_main():
                    print(f"warning: {problem}", file=sys.stderr)
        if problem:
            raise ConfigError(
                f"{problem}; no other checkpoint is left in {self._manager.directory}"
            )
        if not self._read_only:
            self._store.remove()  # what an earlier life of the run left that never saved
        return None

    def saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array of the state, whatever task saved it.

        Raises:
          ConfigError: a checkpoint of an older layout.
        """
        self._check_layout(step)
        saved = shapes_of(self._manager.item_metadata(step)["state"])
        frozen = {f"params/{path}": shape for path, shape in self._store.shapes().items()}
        return saved | frozen

    def read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Path -> array of the state, for paths and `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          ConfigError: an array that is not what was saved.
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
                f"checkpoint {step} in {self._manager.directory} is damaged: {damaged[0]} is not "
                "what was saved (its checksum differs)"
            )
        return arrays

    def _restore(
        self, step: int, shapes: Any, only: Sequence[str] | None
    ) -> tuple[Any, dict, dict]:
        args, left_out = self._ocp.args, self._ocp.PLACEHOLDER
        self._check_layout(step)
        shapes, frozen = self._without_frozen(shapes)
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
        if not all_processes(problem is None):  # a damaged file is seen by those who read it
            raise problem or ValueError("another process cannot read it")
        state = jax.tree.map(lambda x: None if x is left_out else x, restored["state"])
        if frozen:
            params = overlay(jax.tree.map(lambda _: None, frozen), unchanged)
            state = state.replace(params=merged(state.params, params))
        data, clock = restored["data"], restored["clock"]
        sums, saved = checksums(state, data=data, clock=clock), restored["checksums"]
        names = sums | saved if only is None else sums
        damaged = [name for name in names if sums.get(name) != saved.get(name)]
        if damaged:
            raise ValueError(f"{damaged[0]} is not what was saved (its checksum differs)")
        return state, data, clock

    def _check_layout(self, step: int):
        args = self._ocp.args.Composite(clock=self._ocp.args.JsonRestore())
        layout = self._manager.restore(step, args=args)["clock"].get("layout", 1)
        if layout != LAYOUT:
            raise OldLayout(
                f"checkpoint {step} in {self._manager.directory} has layout {layout} of another "
                f"version of genai_jax, and this one reads layout {LAYOUT}: train the run again, "
                "or use the version that run.json names"
            )

    def _without_frozen(self, state: Any) -> tuple[Any, Any]:
        """The state without the parameters that never change, and those."""
        if not self._frozen:
            return state, {}
        changing = frozenset(leaf_paths(state.params)) - self._frozen
        return (
            state.replace(params=select(state.params, changing)),
            select(state.params, self._frozen),
        )

    def set_aside_after(self, step: int):
        """Moves checkpoints newer than `step` to the folder ``damaged`` beside the others'."""
        later = [other for other in self.steps() if other > step]
        if not later:
            return
        if is_main():
            self._move_aside(later)
        barrier()  # nobody looks before they are moved
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


def _only_frozen(frozen: Any, only: Sequence[str] | None) -> Any:
    """What of the parameters that never change is in `only`."""
    return select(frozen, [p for p in leaf_paths(frozen) if _is_part(f"params/{p}", only)])


def _is_part(path: str, only: Sequence[str] | None) -> bool:
    """Whether a path is in one of the parts, each the beginning of a path."""
    return only is None or any(f"{path}/".startswith(f"{part}/") for part in only)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type; the middle of a long one is left out."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:130]} ... {line[-160:]}"
