"""The one evaluator: reduces the metrics of examples over all held-out batches."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError
from genai_jax.tasks.protocol import (
    Batch,
    Mean,
    Params,
    PyTree,
    Rows,
    Task,
    batch_rows,
    held_out_spec,
)
from genai_jax.training.distributed import to_host
from genai_jax.training.validate import check_example_metrics


class Evaluator:
    """Computes the held-out metrics of a task; its one program is compiled once per batch shape."""

    def __init__(self, task: Task):
        self._task = task
        self._step = jax.jit(self._of_batch)

    def check(self, params: Params, mutables: PyTree):
        """Traces the metrics on shapes, so that a mistake in them is not found after training.

        Raises:
          ConfigError: metrics that are not those of examples.
        """
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype)
            for name, x in held_out_spec(self._task.data).items()
        }
        jax.eval_shape(self._of_batch, params, mutables, batch, jax.eval_shape(_key))

    def __call__(
        self, params: Params, mutables: PyTree, batches: Iterable[Batch], seed: int = 0
    ) -> dict[str, float]:
        """Metric name -> number; "loss" is among them, the lower the better.

        All processes have to call it, with their batches on the devices.

        Args:
          params: as the run trains them.
          mutables: of the run.
          batches: held-out batches.
          seed: of what is random in the metrics; batch i gets the i-th key that follows from it.
        """
        key = jax.random.key(seed)
        sums: list[dict[str, Mean]] = []
        rows: dict[str, list[Rows]] = {}
        for i, batch in enumerate(batches):
            metrics = self._step(params, mutables, batch, jax.random.fold_in(key, i))
            sums.append({name: x for name, x in metrics.items() if isinstance(x, Mean)})
            for name, x in metrics.items():
                if isinstance(x, Rows) and i * len(x.mask) < x.limit:
                    rows.setdefault(name, []).append(x)
        if not sums:
            raise ConfigError("there are no held-out batches to evaluate on")
        reduced: dict[str, Any] = {name: _total([s[name] for s in sums]) for name in sums[0]}
        reduced |= {name: _collected(parts) for name, parts in rows.items()}
        params = self._task.materialize(params)
        metrics = self._task.summarize(reduced, params, mutables, key)
        if "loss" not in metrics:
            raise ConfigError(
                f"the held-out metrics of {type(self._task).__name__} are {', '.join(metrics)}; "
                '"loss" has to be among them'
            )
        return metrics

    def _of_batch(self, params, mutables, batch, key) -> dict:
        params = self._task.materialize(params)
        metrics = self._task.example_metrics(params, mutables, batch, key)
        check_example_metrics(metrics, batch_rows(batch))
        return {
            name: Mean(*(jnp.sum(a, 0, dtype=jnp.float32) for a in x)) if isinstance(x, Mean) else x
            for name, x in metrics.items()
        }


def _key() -> jax.Array:
    return jax.random.key(0)


def _total(parts: list[Mean]) -> Mean:
    """The sum over batches, on the host in float64."""
    parts = to_host(parts)
    return Mean(*(np.sum(np.asarray(column, np.float64), 0) for column in zip(*parts, strict=True)))


def _collected(parts: list[Rows]) -> np.ndarray:
    """The first `limit` examples that are not padding, [examples, ...]."""
    hosted = to_host([(x.values, x.mask) for x in parts])
    values, mask = (np.concatenate(column) for column in zip(*hosted, strict=True))
    return values[mask > 0][: parts[0].limit]
