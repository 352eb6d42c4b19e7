"""Speed of a run: the progress bar and the metrics ``perf/*``."""

import time

from genai_jax.standard_streams import interactive, message_stream
from genai_jax.training.hardware import Peak


class Progress:
    """A progress bar with loss, tokens per second, MFU, and time left; and the clock for them."""

    def __init__(self, start: int, total: int, examples: int, tokens: int | None, flops: float,
                 peak: Peak | None, show: bool):  # fmt: skip
        from tqdm import tqdm

        self._examples, self._tokens, self._flops, self._peak = examples, tokens, flops, peak
        self._last_step, self._last_time = start, time.perf_counter()
        stream = message_stream()
        terminal = stream.isatty()
        seconds = 0.2 if terminal else 1 if interactive() else 10
        self._bar = tqdm(
            total=total,
            initial=start,
            disable=not show,
            unit="step",
            file=stream,
            mininterval=seconds,
            dynamic_ncols=terminal,
        )

    def leave_out(self, seconds: float):
        """Excludes time that was not spent on steps (evaluating, saving) from the measurement."""
        self._last_time += seconds

    def measure(self, step: int) -> dict[str, float]:
        """``perf/*`` over the steps since the last measurement, of which `step` is the newest."""
        now = time.perf_counter()
        seconds = (now - self._last_time) / max(step - self._last_step, 1)
        self._last_step, self._last_time = step, now
        speeds = {
            "perf/step_time_s": seconds,
            "perf/examples_per_second": self._examples / seconds,
        }
        if self._tokens:
            speeds["perf/tokens_per_second"] = self._tokens / seconds
        if self._peak:
            speeds["perf/mfu"] = self._flops / seconds / self._peak.flops_per_second
        return speeds

    def show(self, step: int, loss: float, speeds: dict[str, float]):
        """Moves the bar to `step`."""
        text = f"loss {loss:.3f}"
        if "perf/tokens_per_second" in speeds:
            text += f", {speeds['perf/tokens_per_second']:,.0f} tokens/s"
        if "perf/mfu" in speeds:
            text += f", MFU {speeds['perf/mfu']:.0%}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self):
        self._bar.close()
