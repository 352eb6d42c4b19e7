"""Parameters that a run never changes: saved once, beside its checkpoints."""

import pathlib
import shutil
from typing import Any

import jax

from genai_jax.training.checksum import checksums
from genai_jax.training.distributed import barrier, is_main
from genai_jax.training.trees import path_name


class FrozenStore:
    """A folder with one nested dictionary of arrays, which all checkpoints of a run refer to."""

    def __init__(self, folder: pathlib.Path, read_only: bool):
        self._folder, self._read_only = folder, read_only
        self._sums: dict[str, int] | None = None  # of what is in the folder, once known

    def save(self, tree: Any) -> dict[str, int]:
        """Saves the arrays unless they are there; returns path -> checksum."""
        if self._sums is None:
            import orbax.checkpoint as ocp

            with self._manager() as manager:
                if not manager.all_steps():
                    args = ocp.args.Composite(params=ocp.args.PyTreeSave(tree))
                    manager.save(0, args=args, force=True)
                    manager.wait_until_finished()
            self._sums = checksums(tree)
        return self._sums

    def read(self, target: Any) -> Any:
        """The arrays of a nested dictionary of `jax.ShapeDtypeStruct`s with shardings."""
        if not target:
            return {}
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            args = ocp.args.Composite(params=partial_restore(target))
            return manager.restore(0, args=args)["params"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of the arrays that are there."""
        if not (self._folder / "0").is_dir():
            return {}
        with self._manager() as manager:
            return shapes_of(manager.item_metadata(0)["params"])

    def remove(self):
        """Removes the arrays; all processes have to call it."""
        if is_main():
            shutil.rmtree(self._folder, ignore_errors=True)
        barrier()

    def _manager(self):
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=not self._read_only, read_only=self._read_only
        )
        handlers = {"params": ocp.PyTreeCheckpointHandler()}
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)


def partial_restore(target: Any):
    """Arguments of orbax that read these arrays of a saved tree, and no others."""
    import orbax.checkpoint as ocp

    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, arguments, partial_restore=True)


def shapes_of(metadata: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the arrays that the metadata of an item of orbax describes."""
    leaves = jax.tree_util.tree_flatten_with_path(getattr(metadata, "tree", metadata))[0]
    return {path_name(path): tuple(x.shape) for path, x in leaves if hasattr(x, "shape")}
