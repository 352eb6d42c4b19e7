"""A stack of blocks: scanned, rematerialized, and as a pipeline over the mesh axis `stage`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from genai_jax.networks.parallel.axes import STAGE, ParallelConfig, axis_size
from genai_jax.networks.parallel.pipeline import pipeline
from genai_jax.networks.sequence.state import StackState

PyTree = Any


def _save(*names: str):
    """Saves only these, and where the tokens of experts go: small, and slow to recompute."""
    return jax.checkpoint_policies.save_only_these_names(*names, "places")


REMAT = {
    "none": None,
    "full": _save(),
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": _save("attention"),
    "offload_attention": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["places"],
        names_which_can_be_offloaded=["attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention_mlp": _save("attention", "mlp_hidden"),
}


@dataclasses.dataclass(frozen=True)
class BlockStack:
    """`num_layers` blocks, one after the other; of several kinds in a repeating pattern.

    A block is a Flax module `block(x, state, context) -> (x, state)`, where x and context are any
    pytrees; state is None, or what its mixer remembers.

    Parameters of the blocks are stacked on a leading axis, scanned or not, so that a checkpoint
    does not depend on `scan_layers`. With one kind of block the paths below the stack are those of
    the block, [num_layers, ...]; with a longer period they begin with the place of the block in it,
    `block_0/...`, `block_1/...`, [num_layers / period, ...].

    Attributes:
      blocks: one constructor per place in the period, `functools.partial(BlockClass, ...)`.
      num_layers: number of blocks, a multiple of the period.
      scan_layers: whether one compiled period is looped over; otherwise all are unrolled.
      remat: name of a policy in `REMAT`.
      parallel: microbatches and repeats of the pipeline.
    """

    blocks: tuple[functools.partial, ...]
    num_layers: int
    scan_layers: bool = True
    remat: str = "none"
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009 (frozen)

    def module(self, **options) -> nn.Module:
        """The blocks as a submodule of the network that makes them, for `run`; options: `name`."""
        return self._scanned(self.num_layers // len(self.blocks), self.remat, **options)

    def run(
        self,
        layers: nn.Module,
        x: PyTree,
        context: PyTree,
        state: StackState | None = None,
        complete: Callable[[PyTree], PyTree] = lambda context: context,
    ) -> tuple[PyTree, StackState | None]:
        """Applies all blocks: as a pipeline if the mesh has stages and there is no state.

        Args:
          layers: what `module` returned, in the calling module.
          x: arrays [batch, ...].
          context: what every block receives, arrays [batch, ...].
          state: what earlier calls left, or None.
          complete: applied to `context`, or to the part of it that belongs to a microbatch, before
            the blocks see it. What it adds is not handed from stage to stage.

        Returns:
          x after the last block, and the new state, None without one.
        """
        if axis_size(STAGE) > 1 and state is None and not layers.is_initializing():
            return self._run_pipeline(layers, x, context, complete), None
        places = None if state is None else self._by_period(state.places)
        x, places = layers(x, places, complete(context))
        return x, None if state is None else StackState(self._as_places(places))

    def _run_pipeline(self, layers, x, context, complete) -> PyTree:
        def apply_layers(params, x, context, key):
            count, once = jax.tree.leaves(params)[0].shape[0], self.parallel.repeats == 1
            stack = self._scanned(count, self.remat if once else "none", parent=None)
            rngs = {} if key is None else {"dropout": key}
            return stack.apply({"params": params}, x, None, complete(context), rngs=rngs)[0]

        network = layers.parent
        key = network.make_rng("dropout") if network.has_rng("dropout") else None
        unit = "layers" if len(self.blocks) == 1 else f"periods of {len(self.blocks)} layers"
        return pipeline(
            apply_layers, layers.variables["params"], x, context, self.parallel, key,
            REMAT[self.remat], unit,
        )  # fmt: skip

    def _scanned(self, periods: int, remat: str, **options) -> nn.Module:
        blocks = self.blocks
        if remat != "none":
            wrap = functools.partial(
                nn.remat, policy=REMAT[remat], prevent_cse=not self.scan_layers
            )
            blocks = tuple(functools.partial(wrap(b.func), *b.args, **b.keywords) for b in blocks)
        (period,) = blocks if len(blocks) == 1 else (functools.partial(Period, blocks),)
        scanned = nn.scan(
            period.func,
            variable_axes={"params": 0, "router": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=periods,
            unroll=1 if self.scan_layers else periods,
        )
        return scanned(*period.args, **period.keywords, **options)

    def _by_period(self, places: tuple) -> PyTree:
        return places[0] if len(self.blocks) == 1 else places

    def _as_places(self, places: PyTree) -> tuple:
        return (places,) if len(self.blocks) == 1 else places


class Period(nn.Module):
    """The blocks of one period of a pattern, one after the other."""

    blocks: tuple[functools.partial, ...]

    @nn.compact
    def __call__(self, x: PyTree, states: tuple | None, context: PyTree):
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(name=f"block_{i}")(x, None if states is None else states[i], context)
            after.append(state)
        return x, None if states is None else tuple(after)


def stacked_rules(prefix: str, rules: tuple, axis: str = "layers") -> tuple:
    """Partition rules of parameters below `prefix`, stacked on a leading logical axis."""
    return tuple((f"{prefix}{path}", (axis, *axes)) for path, axes in rules)
