"""The training loop: restore, step, log, evaluate, save."""

import math
import pathlib
import time

import jax

from genai_jax.config import Config, ConfigError
from genai_jax.standard_streams import message_stream
from genai_jax.tasks.protocol import Task, held_out_spec
from genai_jax.training.announcements import beginning, ending
from genai_jax.training.batches import BatchPlacement, DeviceBatches
from genai_jax.training.checkpoint import Checkpointer
from genai_jax.training.distributed import barrier, is_main
from genai_jax.training.execution import Execution, SingleRun
from genai_jax.training.fitted import fit
from genai_jax.training.hardware import nearest_first, peak_of
from genai_jax.training.memory import check_batch_fits, check_state_fits
from genai_jax.training.metrics_log import MetricsLog
from genai_jax.training.plots import plot_metrics
from genai_jax.training.population import Population
from genai_jax.training.portable import keep
from genai_jax.training.profile import Profiler
from genai_jax.training.progress import Progress
from genai_jax.training.reports import CannotGoOn, ReportReader, last_good
from genai_jax.training.samples import Sampler, SampleWriter
from genai_jax.training.saving import Saver
from genai_jax.training.schedule_notes import changed_schedules
from genai_jax.training.sharding import batch_shardings, make_mesh, mesh_context
from genai_jax.training.step import TrainState, frozen_paths
from genai_jax.training.stop_signal import FAILED, Stopped, StopSignal
from genai_jax.training.wandb_board import wandb_boards
from genai_jax.training.workdir import data_flags, run_record, write_record


def train(
    task: Task, config: Config, stop: StopSignal | None = None, sampler: Sampler | None = None
) -> int:
    """Trains to the end, or until a signal; resumes what the workdir holds.

    Args:
      task: what to learn.
      config: of the run.
      stop: what ends it early; the signals of this process if None.
      sampler: what is sampled every ``--sample.every`` steps; None for nothing.

    Returns:
      0, or 128 + the number of the signal that ended it.

    Raises:
      ConfigError: a mistake in the flags or the data, a loss that is not finite, or files that
        cannot be written.
    """
    if hasattr(task, "fit"):
        return fit(task, config)
    mesh = make_mesh(config.mesh)
    check_batch_fits(task.data.batch_spec, mesh)
    kind = Population if config.population.size > 1 else SingleRun
    with stop or StopSignal() as stop:
        execution = kind(task, config, mesh)
        check_state_fits(execution.compiled.shapes, mesh)
        return Run(execution, config, stop, sampler).run()


class Run:
    """One process's life of a run."""

    def __init__(
        self, execution: Execution, config: Config, stop: StopSignal, sampler: Sampler | None
    ):
        self.execution, self.config, self.stop, self.sampler = execution, config, stop, sampler
        self.task, self.compiled = execution.task, execution.compiled
        self.workdir, self.main = pathlib.Path(config.run.workdir), is_main()
        mesh, data = self.compiled.mesh, self.task.data
        self.placement = BatchPlacement(execution.batch_spec(), execution.data_shardings())
        # Members of a population are evaluated one after another, each by all devices.
        scored = held_out_spec(data)
        self.held_out = BatchPlacement(scored, batch_shardings(scored, mesh))
        self.source = execution.train(self.placement.rows)
        self.data_flags = data_flags(config)
        self.peak = peak_of(nearest_first(mesh)) if self.main else None
        if config.eval.batches:  # held-out data that is missing is noticed now, not at the end
            next(iter(data.held_out(1, self.held_out.rows)), None)
        params = self.compiled.shapes.params
        if self.main:
            one = execution.shapes_of_one(params)
            record = run_record(self.task, mesh, one, execution.flops, self.peak)
            write_record(self.workdir, record, data if config.run.resume_with_changes else None)
            keep(self.task, config, record["data"])
            if config.train.progress:
                text = beginning(config, record, execution.examples, execution.tokens)
                print(text, file=message_stream())
        self.checkpointer = Checkpointer(
            self.workdir / "checkpoints",
            config.checkpoint,
            frozen=frozen_paths(self.compiled.phases, params),
        )
        self.saver = Saver(self.checkpointer, self.workdir)
        self.reader = ReportReader(self.compiled.phases, execution.numbers, execution.rate)
        self.profiler = Profiler(config.profile, self.workdir, self.main)
        self.seconds = 0.0  # spent in earlier processes
        self.began = time.perf_counter()
        self.scores: dict[str, float] = {}  # of the last evaluation
        self.unfinished_row: dict | None = None  # of a step whose evaluation a signal cut short
        self.unwritten: list[dict] = []  # rows that an earlier process could not write
        self.unsampled = False  # whether a signal came before the samples of the last step

    def run(self) -> int:
        with mesh_context(self.compiled.mesh):
            start, state = self._restore_or_begin()
            # metrics.jsonl may already hold rows after the restored step.
            missing = [*self.unwritten, *filter(None, [self.unfinished_row])]
            logged = missing[0]["step"] - 1 if missing else start
            self.log = None
            if self.main:
                boards = wandb_boards(self.config, start)
                self.log = MetricsLog(self.workdir, logged, boards)
            self._write(*self.unwritten)
            self.samples = None
            if self.sampler:
                self.samples = SampleWriter(self.sampler, self.execution, self.workdir, self.log)
            self.batches = DeviceBatches(self.source, self.placement)
            self.progress = Progress(
                start, self.config.train.steps, self.execution.examples, self.execution.tokens,
                self.execution.flops["flops_per_step"], self.peak,
                self.main and self.config.train.progress,
            )  # fmt: skip
            try:
                self._steps(start, state)
                self.saver.wait()
            except BaseException:
                self._close_files(failed=True)
                if jax.process_count() == 1:  # else the others may not be there to close with
                    self.saver.close()
                raise
            self._close_files()
            self.saver.close()
            if self.log:
                self.log.check(self.saver.kept())
            self.saver.check()
            self.stop.ask()
            stopped_by = self.stop.ask()  # the answer to the question before
            steps = self.config.train.steps
            if self.config.train.progress and not stopped_by and start < steps:
                self._say(ending(self.config, steps, self.scores, hasattr(self.task, "sample")))
        return 128 + stopped_by if stopped_by else 0

    def _restore_or_begin(self) -> tuple[int, TrainState]:
        restored = self.checkpointer.restore(self.compiled.shapes)
        if restored is None:
            return 0, self.execution.begin()
        step, state, data, clock = restored
        self.checkpointer.set_aside_after(step)
        if clock.get("data", self.data_flags) == self.data_flags:
            self.source.set_state(data)
        else:
            self._say("the data have changed, and start from their beginning")
        self.seconds, self.unfinished_row = clock["seconds"], clock["unfinished_row"]
        self.unwritten = clock.get("unwritten", [])
        self.unsampled = clock.get("unsampled", False)
        self.reader.rare = clock["rare"]
        self._say(f"resuming {self.workdir} at step {step}")
        for note in changed_schedules(self.task, self.config, step, clock.get("steps")):
            self._say(note)
        return step, state

    def _steps(self, start: int, state: TrainState):
        """Dispatches step after step; the report of one is read while the next one runs."""
        config = self.config
        if start >= config.train.steps:
            self._say(f"{self.workdir} is trained to step {start} already")
        if self.unfinished_row is not None:
            self._evaluate_and_log(start, state, self.unfinished_row)
            if self.unfinished_row is not None:  # stopped again; the checkpoint still says so
                return
        if self.samples and start < config.train.steps:
            self.samples.check(state)
        if self.unsampled:
            if self.stop.agreed:  # stopped again; the checkpoint still says so
                return
            if self.samples:
                self.samples.write(start, state)
            self.unsampled = False
        waiting = None  # (step, report, metrics of collecting), not read yet
        for step in range(start + 1, config.train.steps + 1):
            self.profiler.before(step, state)
            batch, collected = self.execution.collect(state, next(self.batches))
            with jax.transfer_guard("disallow"):
                state, report = self.compiled.step(state, batch)
            if waiting:
                self._log_step(*waiting)
            waiting = (step, report, collected)
            last = step == config.train.steps
            evaluates = config.eval.batches != 0 and (last or _due(step, config.eval.every))
            saves = last or _due(step, config.checkpoint.every)
            samples = self.samples and (last or _due(step, config.sample.every))
            due = _due(step, config.ema.snapshot_every)
            if due and not self.saver.snapshot(step, state.ema):
                self.stop.fail()  # once the state is saved
            stopping = self.stop.ask()
            if not (evaluates or saves or samples or stopping):
                continue
            row = self._log_step(*waiting, write=not evaluates)
            waiting, paused = None, time.perf_counter()
            loss = self._evaluate_and_log(step, state, row) if evaluates else None
            stopping = self.stop.agreed
            self.unsampled = bool(samples and stopping)
            if saves or stopping:  # before the samples, which the state is worth more than
                self._save(step, state, loss)
            if samples and not stopping:
                self.samples.write(step, state)
            self.progress.leave_out(time.perf_counter() - paused)
            if stopping:
                self.progress.close()
                if stopping != FAILED:
                    self._say(f"stopped by signal {stopping} at step {step}")
                return

    def _log_step(self, step: int, report, collected: dict, write: bool = True) -> dict:
        """Reads and checks the report of a step, and writes its row if it is a logged one."""
        try:
            metrics = {**self.reader.read(step, report), **collected}
        except CannotGoOn as error:
            raise self._cannot_go_on(step, error) from None
        row = {"step": step} | {f"train/{name}": value for name, value in metrics.items()}
        if step % self.config.train.log_every == 0 or step == self.config.train.steps or not write:
            speeds = self.progress.measure(step)
            row |= speeds
            loss = next((v for n, v in metrics.items() if n.endswith("loss")), math.nan)
            self.progress.show(step, loss, speeds)
            if write:
                self._write(row)
        return row

    def _write(self, *rows: dict):
        if self.log and not self.log.write(*rows):
            self.stop.fail()  # once the state is saved

    def _cannot_go_on(self, step: int, error: CannotGoOn) -> ConfigError:
        self.saver.wait()
        good = last_good(self.checkpointer.steps(), step, error.loss_failed)
        self.checkpointer.set_aside_after(good or 0)
        barrier()  # whoever raises first ends the others
        kept = f"the last good checkpoint is step {good}" if good else "no checkpoint is before it"
        return ConfigError(f"{error.what}; {kept}")

    def _evaluate_and_log(self, step: int, state: TrainState, row: dict) -> float | None:
        """Evaluates and writes the row; returns the loss, None if a signal cut it short."""

        def batches():
            rows = self.task.data.held_out(self.config.eval.batches, self.held_out.rows)
            return self.stop.watch(map(self.held_out.to_devices, rows))

        try:
            metrics = self.execution.evaluate(state, batches)
        except Stopped:
            self.unfinished_row = row
            return None
        self.unfinished_row, self.scores = None, metrics
        used = metrics.get("ema/loss", metrics["loss"])  # in sampling and evaluation
        if not math.isfinite(used):
            raise self._cannot_go_on(
                step, CannotGoOn(f"the held-out loss is {used} at step {step}", loss_failed=False)
            )
        row = row | {f"eval/{name}": value for name, value in metrics.items()}
        self._write(row)
        return used

    def _save(self, step: int, state: TrainState, loss: float | None):
        elapsed = self.seconds + time.perf_counter() - self.began
        clock = {"seconds": elapsed, "steps": self.config.train.steps, "rare": self.reader.rare}
        clock |= {"unfinished_row": self.unfinished_row, "data": self.data_flags}
        if self.unsampled:
            clock["unsampled"] = True
        if self.log and self.log.unwritten:
            clock["unwritten"] = self.log.unwritten
        self.saver.save(step, state, self.batches.get_state(), clock, loss)

    def _close_files(self, failed: bool = False):
        """Leaves all files in order; what ended the run is not hidden by an error in here."""
        self.profiler.close()
        self.progress.close()
        self.source.close()
        if self.log:
            self.log.close(failed)
        if self.log and not self.log.unwritten:
            plot_metrics(self.workdir, self.task)

    def _say(self, text: str):
        if self.main:
            print(text, file=message_stream())


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
