"""The phases of a run: those of its task, restricted to what is to be trained."""

from collections.abc import Callable

from genai_jax.config import Config, ConfigError
from genai_jax.tasks.protocol import Params, Phase, Task
from genai_jax.training.step import trained_paths
from genai_jax.training.trees import matching_paths
from genai_jax.training.validate import check_phases


def phases_of(task: Task, config: Config) -> Callable[[Params], tuple[Phase, ...]]:
    """Parameters, or their shapes -> phases, restricted to what --optimizer.trainable names."""

    def phases(params: Params) -> tuple[Phase, ...]:
        every = check_phases(task.phases(params))
        if not config.optimizer.trainable:
            return every
        flag = "--optimizer.trainable"
        allowed = matching_paths(params, config.optimizer.trainable.split(","), flag)
        restricted = []
        for phase in every:
            trains = tuple(sorted(trained_paths(phase, params) & allowed))
            if not trains:
                raise ConfigError(
                    f"{flag}={config.optimizer.trainable} leaves phase {phase.name} nothing to "
                    "train"
                )
            restricted.append(phase._replace(trains=trains))
        return tuple(restricted)

    return phases
