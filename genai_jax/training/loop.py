"""The training loop: restore, step, log, evaluate, save."""

import dataclasses
import math
import pathlib
import re
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genai_jax.config import Config, ConfigError, field
from genai_jax.training import compiler
from genai_jax.training.batches import BatchPlacement, DeviceBatches
from genai_jax.training.checkpoint import Checkpointer, first_line
from genai_jax.training.distributed import everywhere, is_main
from genai_jax.training.ema_profiles import write_snapshot
from genai_jax.training.hardware import peak_of
from genai_jax.training.metrics_log import MetricsLog, plot_curves
from genai_jax.training.parameter_counts import parameter_counts
from genai_jax.training.phase import PyTree, Task
from genai_jax.training.population import Population
from genai_jax.training.progress import Progress
from genai_jax.training.restore import state_shapes
from genai_jax.training.sharding import (
    LOGICAL_AXES,
    axes_of,
    batch_shardings,
    batch_shards,
    make_mesh,
    mesh_context,
)
from genai_jax.training.step import init_state, make_step, phase_ran
from genai_jax.training.stop_signal import Stopped, StopSignal
from genai_jax.training.workdir import environment, write_record


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = field(1000, "steps of the whole run", minimum=1, changeable=True)
    log_every: int = field(10, "steps between rows of metrics.jsonl", minimum=1, changeable=True)
    accumulate: int = field(1, "microbatches a step, one in memory at a time", minimum=1)
    progress: bool = field(True, "show a progress bar", changeable=True)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = field(
        0, "steps between evaluations; 0 evaluates the last step alone", minimum=0, changeable=True
    )
    batches: int = field(
        -1, "held-out batches an evaluation; -1: all; 0: no evaluation", minimum=-1, changeable=True
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    start: int = field(0, "steps before the profile", minimum=0, changeable=True)
    steps: int = field(0, "steps to profile into workdir/profile", minimum=0, changeable=True)


class Compiled(NamedTuple):
    """What stays the same while a run goes on."""

    mesh: Mesh
    phases: tuple
    shapes: Any  # the state's shapes, with shardings
    batch_shardings: dict[str, NamedSharding]
    init: Any  # rng -> state
    step: Any  # (state, batch) -> (state, metrics)


def build(task: Task, config: Config, mesh: Mesh) -> Compiled:
    """Shapes first, then shardings, then the functions; nothing runs and nothing is allocated."""
    averages, accumulate = config.ema.averages(), config.train.accumulate
    device = mesh.devices.flat[0]
    platform = device.platform
    population = task if isinstance(task, Population) else None
    init = lambda rng: init_state(task, rng, averages)
    with mesh_context(mesh):
        shapes = state_shapes(task, config, mesh, init)
        phases = task.phases(shapes.params)
        for phase in phases:
            shards = 1 if population else batch_shards(mesh)
            check_rows(config.data.batch_size, phase.repeats * accumulate, shards)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        if population:
            population.check_mesh(mesh)
            batch_in = population.batch_shardings(mesh)
            init = population.init(averages, mesh)
            step = population.step(accumulate, averages, mesh)
        else:
            batch_in = batch_shardings(task.batch_shapes(), task.batch_axes, mesh)
            split = jax.tree.leaves(shardings), list(batch_in.values())
            check_mesh_is_used(mesh, *split, task.activation_axes)
            step = make_step(phases, accumulate=accumulate, averages=averages)
        step = jax.jit(
            step,
            in_shardings=(shardings, batch_in),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
            compiler_options=compiler.options(config.compiler, platform, device.device_kind),
        )
        init = jax.jit(
            init, out_shardings=shardings, compiler_options=compiler.init_options(platform)
        )
    return Compiled(mesh, phases, shapes, batch_in, init, step)


def check_mesh_is_used(mesh: Mesh, state: list, batch: list, more: tuple[str, ...] = ()):
    """An axis that splits nothing would only repeat the work of its devices.

    state, batch: shardings; more: axes that split activations. The batch goes over the expert axis
    as well, but what uses that is experts.
    """
    names = lambda shardings: {n for s in shardings for part in s.spec for n in axes_of(part)}
    used = names(state) | (names(batch) - {"expert"}) | {*more}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise ConfigError(f"--mesh.{axis}={size} splits nothing of this task")


def check_rows(rows: int, parts: int, shards: int):
    """The batch divides into microbatches, and each of them over the devices that share it."""
    if rows % (shards * parts):
        raise ConfigError(
            f"--data.batch_size={rows} is not divisible by {shards} device(s) of the axes "
            f"{', '.join(LOGICAL_AXES['batch'])} x {parts} part(s) a step"
        )


def train(task: Task, config: Config) -> int:
    """Trains to the end, or until a signal; resumes what the workdir holds.

    Returns:
      0, or 128 + the number of the signal that ended it.

    Raises:
      ConfigError: a mistake in the flags or the data, or a loss that is not finite.
    """
    if config.population.size > 1:
        task = Population(type(task), config)
    with StopSignal() as stop:
        return Run(task, config, stop).go()


class Run:
    """One process's life of a run."""

    def __init__(self, task: Task, config: Config, stop: StopSignal):
        self.task, self.config, self.stop = task, config, stop
        self.population = task if isinstance(task, Population) else None
        self.workdir = pathlib.Path(config.run.workdir)
        self.main = is_main()
        self.mesh = make_mesh(config.mesh)
        self.compiled = build(task, config, self.mesh)
        self.placement = BatchPlacement(task.batch_shapes(), self.compiled.batch_shardings)
        self.held_out = self.placement
        if self.population:  # whose members are scored one after another, each by all devices
            first = self.population.first
            shapes = first.batch_shapes()
            where = batch_shardings(shapes, first.batch_axes, self.mesh)
            self.held_out = BatchPlacement(shapes, where)
        self.source = task.train_batches(self.placement.rows)
        self.peak = peak_of(_nearest_first(self.mesh)) if self.main else None
        self.flops = task.flops_per_step()
        if config.eval.batches:  # held-out data that is missing is found now, not at the end
            next(iter(task.evaluation_batches(1, self.held_out.rows)), None)
        if self.main:
            write_record(self.workdir, self._record())
        self.checkpointer = Checkpointer(self.workdir / "checkpoints", config.checkpoint)
        self.seconds = 0.0  # spent in earlier processes
        self.began = time.perf_counter()
        self.profiling = False
        self.unfinished_row: dict | None = None  # of a step whose evaluation a signal cut short
        self.rare: dict[str, float] = {}  # metrics of phases that run seldom, as last seen

    def go(self) -> int:
        with mesh_context(self.mesh):
            start, state = self._restore_or_init()
            # A row that is still to come may be there, from a life that a later crash undid.
            logged = start if self.unfinished_row is None else start - 1
            self.log = MetricsLog(self.workdir, logged) if self.main else None
            self.batches = DeviceBatches(self.source, self.placement)
            rows = self.config.data.batch_size * self.config.population.size
            self.progress = Progress(
                start, self.config.train.steps, rows, self.task.tokens_per_step(),
                self.flops["flops_per_step"], self.peak, self.main and self.config.train.progress,
            )  # fmt: skip
            try:
                self._steps(start, state)
                self._wait_for_checkpoint()
            except BaseException:
                self._close_files()
                if jax.process_count() == 1:  # else the others may not be there to close with
                    self._close_checkpoints()
                raise
            self._close_files()
            self._close_checkpoints()
            self.stop.ask()
            stopped_by = self.stop.ask()  # the answer to the question before
        return 128 + stopped_by if stopped_by else 0

    def _close_files(self):
        """Leaves all files in order; what ended the run is not hidden by an error in here."""
        self._stop_profile()
        self.progress.close()
        self.source.close()
        try:
            if self.log:
                self.log.close()
                plot_curves(self.workdir, "loss", ("loss",), f"loss ({self.task.loss_unit})")
                for name, (ends, label) in self.task.curves.items():
                    plot_curves(self.workdir, name, ends, label)
        except OSError as error:
            print(f"warning: no plot in {self.workdir}: {error}", file=sys.stderr)

    def _close_checkpoints(self):
        try:
            self.checkpointer.close()
        except Exception as error:  # orbax and tensorstore raise many types for a failed save
            print(f"warning: {self._not_saved(error)}", file=sys.stderr)

    def _restore_or_init(self):
        restored = self.checkpointer.restore(self.compiled.shapes)
        if restored is None:
            return 0, self._begin()
        step, state, data, clock = restored
        self.checkpointer.set_aside_after(step)
        self.source.set_state(data)
        self.seconds = clock["seconds"]
        self.unfinished_row = clock["unfinished_row"]
        self.rare = clock.get("rare", {})
        self._say(f"resuming {self.workdir} at step {step}")
        return step, state

    def _say(self, text: str):
        if self.main:
            print(text, file=sys.stderr)

    def _begin(self):
        """A fresh state; what was trained elsewhere is put in place, in averages as well."""
        key = jax.random.key(self.config.run.seed)
        state = self.compiled.init(self.population.keys() if self.population else key)
        adopted = self.task.pretrained()
        if not adopted:
            return state

        def place(groups: dict, shapes: dict) -> dict:
            ours = {g: adopted[g] for g in groups if g in adopted}
            where = jax.tree.map(lambda x: x.sharding, _part(shapes, ours))
            # A copy: what is donated to the step may not be the memory of somebody's array.
            copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=where)
            return _overlaid(groups, copy(ours))

        shapes = self.compiled.shapes
        ema = {name: place(average, shapes.ema[name]) for name, average in state.ema.items()}
        return state.replace(params=place(state.params, shapes.params), ema=ema)

    def _steps(self, start: int, state):
        """Dispatches step after step; the metrics of one are read while the next one runs."""
        config = self.config
        if start >= config.train.steps:
            self._say(f"{self.workdir} is trained to step {start} already")
        if self.unfinished_row is not None:
            self._evaluate_and_log(start, state, self.unfinished_row)
            if self.unfinished_row is not None:  # stopped again; the checkpoint still says so
                return
        waiting = None  # (step, metrics) not read yet
        for step in range(start + 1, config.train.steps + 1):
            self._profile(step, state)
            batch = next(self.batches)
            with jax.transfer_guard("disallow"):
                state, metrics = self.compiled.step(state, batch)
            if waiting:
                self._report(*waiting)
            waiting = (step, metrics)
            last = step == config.train.steps
            evaluates = config.eval.batches != 0 and (last or _due(step, config.eval.every))
            saves = last or _due(step, config.checkpoint.every)
            if _due(step, config.ema.snapshot_every):
                write_snapshot(self.workdir, step, state.ema)
            stopping = self.stop.ask()
            if not (evaluates or saves or stopping):
                continue
            row = self._report(*waiting, write=not evaluates)
            waiting, paused = None, time.perf_counter()
            loss = self._evaluate_and_log(step, state, row) if evaluates else None
            stopping = self.stop.agreed
            if saves or stopping:
                self._save(step, state, loss)
            self.progress.leave_out(time.perf_counter() - paused)
            if stopping:
                self._say(f"stopped by signal {stopping} at step {step}")
                return

    def _report(self, step: int, metrics: dict, write: bool = True) -> dict:
        """Reads the metrics of a step, checks them, and writes its row if it is a logged one.

        A phase that did not run in this step shows what it gave when it last did.
        """
        phases = self.compiled.phases
        metrics = {
            name: value
            for name, value in jax.device_get(metrics).items()
            if phase_ran(phases, name, step - 1)
        }
        if self.population:
            metrics = self.population.joined(metrics)
        metrics = {name: float(value) for name, value in metrics.items()}
        self._check_alive(step, metrics)
        seldom = tuple(f"{phase.name}/" for phase in phases if phase.every > 1)
        self.rare |= {name: v for name, v in metrics.items() if name.startswith(seldom)}
        found = metrics | self.rare
        shown = {f"train/{n}": v for n, v in found.items() if not _HIDDEN.search(n)}
        row = {"step": step} | shown
        if step % self.config.train.log_every == 0 or step == self.config.train.steps or not write:
            speeds = self.progress.measure(step)
            row |= speeds
            loss = next((v for n, v in metrics.items() if "loss" in n), math.nan)
            self.progress.show(step, loss, speeds)
            if self.log and write:
                self.log.write(row)
        return row

    def _check_alive(self, step: int, metrics: dict):
        """Stops the run where a number of the step shows that it cannot go on."""
        found = [name for name, value in metrics.items() if _failed(name, value)]
        if not found:
            return
        # Losses first: they speak of the parameters of the step before.
        name = min(found, key=lambda name: "grad_norm" in name)
        self._wait_for_checkpoint()
        good = last_good(self.checkpointer.steps(), step, "grad_norm" not in name)
        self.checkpointer.set_aside_after(good or 0)
        everywhere(True)  # who raises first ends the others
        kept = f"the last good checkpoint is step {good}" if good else "none is saved before"
        *phase, kind = name.split("/")
        if not phase and "loss" not in kind and "grad_norm" not in kind:  # of the only phase
            phase = [self.compiled.phases[0].name]
        where = f"at step {step}" + (f" in phase {phase[0]}" if phase else "")
        what = "every verdict is the same" if kind == "alive" else f"{name} is {metrics[name]}"
        raise ConfigError(f"{what} {where}; {kept}")

    def _evaluate_and_log(self, step: int, state, row: dict) -> float | None:
        """Scores `state` and writes the row; returns the loss, None if a signal cut it short."""

        def batches():
            found = self.task.evaluation_batches(self.config.eval.batches, self.held_out.rows)
            return self.stop.watch(map(self.held_out.to_devices, found))

        model = state.params, state.mutables
        try:
            if self.population:
                scores = self.population.evaluate(*model, batches, self.mesh)
            else:
                scores = self.task.evaluate(*model, batches())
        except Stopped:
            self.unfinished_row = row
            return None
        self.unfinished_row = None
        row = row | {f"eval/{name}": value for name, value in scores.items()}
        if self.log:
            self.log.write(row)
        return scores["loss"]

    def _save(self, step: int, state, loss: float | None):
        elapsed = self.seconds + time.perf_counter() - self.began
        clock = {"seconds": elapsed, "unfinished_row": self.unfinished_row, "rare": self.rare}
        try:
            self.checkpointer.save(step, state, self.batches.get_state(), clock, loss)
        except Exception as error:
            raise self._not_saved(error) from None

    def _wait_for_checkpoint(self):
        try:
            self.checkpointer.wait()
        except Exception as error:
            raise self._not_saved(error) from None

    def _not_saved(self, error: Exception) -> ConfigError:
        steps = self.checkpointer.steps()
        kept = f"step {steps[-1]} is the last one saved" if steps else "nothing is saved"
        return ConfigError(
            f"cannot save a checkpoint in {self.workdir}: {first_line(error)}; {kept}"
        )

    def _profile(self, step: int, state):
        """Opens the profile window before its first step, closes it when its last one is done."""
        window = self.config.profile
        if window.steps and self.main and step == window.start + 1:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True
        elif self.profiling and step == window.start + window.steps + 1:
            jax.block_until_ready(state)
            self._stop_profile()

    def _stop_profile(self):
        if self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False

    def _record(self) -> dict:
        params = self.compiled.shapes.params
        if self.population:
            params = self.population.shapes_of_one(params)
        inactive = self.flops.get("inactive_parameters", 0)
        return {
            **environment(),
            "mesh": {axis: size for axis, size in self.mesh.shape.items() if size > 1},
            "data": self.task.data_record(),
            "parameters": parameter_counts(params, inactive),
            **self.flops,
            "peak": self.peak._asdict() if self.peak else None,
            "mfu": "flops_per_step / step_time_s / peak.flops_per_second",
        }


def last_good(steps: list[int], failed: int, loss_failed: bool) -> int | None:
    """The newest of the saved `steps` known to be sound when step `failed` is not finite.

    The loss of a step is that of the parameters saved at the step before, which are bad with it.
    """
    good = [step for step in steps if step < failed - loss_failed]
    return good[-1] if good else None


def _nearest_first(mesh: Mesh) -> list[jax.Device]:
    """The devices of a mesh, those of this process first."""
    here = jax.process_index()
    return sorted(mesh.devices.flatten(), key=lambda device: device.process_index != here)


_HIDDEN = re.compile("(weight|alive)(/[0-9]+)?$")  # what is for the step and the loop alone


def _failed(name: str, value: float) -> bool:
    """Whether a metric says that training cannot go on."""
    if name.endswith("alive"):
        return value == 0
    watched = "loss" in name or "grad_norm" in name or name.endswith("penalty")
    return watched and not math.isfinite(value)


def _part(whole: PyTree, names: PyTree) -> PyTree:
    """What `whole` has where `names` has something, in nested dictionaries."""
    if not isinstance(names, dict):
        return whole
    return {name: _part(whole[name], value) for name, value in names.items()}


def _overlaid(whole: PyTree, part: PyTree) -> PyTree:
    """`whole` with what `part` has in its place, in nested dictionaries."""
    if not isinstance(part, dict):
        return part
    return {**whole, **{name: _overlaid(whole[name], value) for name, value in part.items()}}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
