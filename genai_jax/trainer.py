"""Training a run: from a command, a script, or a notebook."""

import contextvars
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable

from genai_jax.components import make_task, request_class
from genai_jax.config import Config, ConfigError
from genai_jax.requests import origin_of
from genai_jax.sampled import Sampled, with_origin
from genai_jax.standard_streams import interactive, message_stream
from genai_jax.tasks.protocol import Params, PyTree, Task
from genai_jax.tasks.registry import task_class
from genai_jax.training.distributed import is_main, join_processes
from genai_jax.training.lock import locked
from genai_jax.training.loop import train
from genai_jax.training.samples import Sampler
from genai_jax.training.schedule_notes import cut_schedules
from genai_jax.training.sharding import make_mesh
from genai_jax.training.stop_signal import StopSignal
from genai_jax.training.wandb_board import library
from genai_jax.training.workdir import check_path, claim


def run_training(config: Config, stop: StopSignal | None = None) -> int:
    """Trains or resumes the run in ``--workdir``.

    Args:
      config: of the run.
      stop: what ends it early; signals of this process if None.

    Returns:
      0, or 128 + the number of the signal that ended it.

    Raises:
      ConfigError: see `genai_jax.training.loop.train`; or the workdir is in use, or belongs to
        another run.
    """
    with join_processes(config.distributed):
        make_mesh(config.mesh)  # one that cannot work is refused before the data are opened
        check_samples(config)
        if not is_main():
            task = make_task(config)
            return train(task, config, stop, sampler_of(task, config))
        check_path(config.run.workdir)
        if config.train.wandb is not None:
            library(config.train.wandb)
        with locked(config.run.workdir, "run"):
            task = make_task(config)  # opens the data, which may take a download
            for change in claim(config):
                print(f"changed since the run began: {change}", file=message_stream())
            for note in cut_schedules(config):
                print(f"note: {note}", file=message_stream())
            return train(task, config, stop, sampler_of(task, config))


def check_samples(config: Config):
    """Raises `ConfigError` if ``--sample.every`` is set for a task that cannot be sampled from."""
    every = config.sample.every
    if every and not hasattr(task_class(config.run.task), "sample"):
        raise ConfigError(
            f"--sample.every={every}: --task={config.run.task} cannot be sampled from; leave it 0"
        )


def sampler_of(task: Task, config: Config) -> Sampler | None:
    """What ``--sample.every`` samples from a model: the request of a sample command without flags.

    Returns:
      (parameters, mutables, step) -> `genai_jax.sampled.Sampled`; None if it is 0.
    """
    if not config.sample.every:
        return None
    cls = request_class(type(task), "sample_request")
    request = getattr(task, "request_in_training", cls)()
    names = [f.name for f in dataclasses.fields(request)]
    if "num_samples" in names:
        count = config.sample.count or request.in_training
        request = dataclasses.replace(request, num_samples=count)
    elif config.sample.count:
        raise ConfigError(
            f"--sample.count={config.sample.count}: --task={config.run.task} has no --num_samples"
        )

    def sample(params: Params, mutables: PyTree, step: int) -> Sampled:
        return with_origin(task.sample(params, mutables, request), origin_of(request, step))

    return sample


def train_here(config: Config):
    """`run_training` in a way that suits the code that calls it.

    In a notebook or an interactive session it returns after an interrupt, once a checkpoint is
    saved. In a script a signal does afterwards what it would have done. In a thread other than the
    main one, and in a notebook, no signal handler is installed.

    Raises:
      KeyboardInterrupt: a second interrupt in a notebook; the run still saves, in the background.
    """
    if threading.current_thread() is not threading.main_thread():
        run_training(config)
    elif interactive():
        _interruptible(lambda stop: run_training(config, stop))
    elif code := run_training(config):
        signal.raise_signal(code - 128)


def _interruptible(work: Callable[[StopSignal], object]):
    """Calls `work` in a thread, so that an interrupt reaches only the caller, who waits for it.

    A KeyboardInterrupt inside a step would lose the state, whose memory the step has taken.
    """
    stop, done, problems = StopSignal(listens=False), threading.Event(), []

    def target():
        try:
            work(stop)
        except BaseException as error:
            problems.append(error)
        finally:
            done.set()

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(target,), name="training")
    try:
        thread.start()
        done.wait()
    except KeyboardInterrupt:
        stop.receive(signal.SIGINT)
        if thread.ident is None:  # it did not start
            raise
        print("saving; interrupt again to save in the background", file=sys.stderr)
        done.wait()
    if problems:
        raise problems[0]
