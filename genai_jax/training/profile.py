"""A profile of some steps, into ``workdir/profile``."""

import pathlib

import jax

from genai_jax.training.options import ProfileConfig


class Profiler:
    """Opens the window of --profile.* before its first step and closes it after its last one."""

    def __init__(self, config: ProfileConfig, workdir: pathlib.Path, active: bool):
        self._config, self._folder = config, workdir / "profile"
        self._active, self._running = active and config.steps > 0, False

    def before(self, step: int, state):
        """To be called before step `step` is dispatched; `state` is that of the step before."""
        first = self._config.start + 1
        if self._active and step == first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step == first + self._config.steps:
            jax.block_until_ready(state)
            self.close()

    def close(self):
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
