"""The training step of a run as a traced program, and what is inside one."""

from collections.abc import Iterator

import jax
from jax.extend import core

from genai_jax.components import make_task, parse_run
from genai_jax.tasks.protocol import step_spec
from genai_jax.training.execution import initializer
from genai_jax.training.phases import phases_of
from genai_jax.training.step import make_step


def traced_step(*flags: str):
    """The training step of a run as a program; nothing is compiled."""
    config = parse_run(flags)
    task = make_task(config)
    state = jax.eval_shape(initializer(task, config), jax.random.key(0))
    phases = phases_of(task, config)(state.params)
    step = make_step(
        phases, accumulate=config.train.accumulate, averages={}, materialize=task.materialize
    )
    batch = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in step_spec(task).items()}
    return jax.make_jaxpr(step)(state.replace(ema={}), batch)


def described(name: str, equation, out) -> str:
    frames = equation.source_info.traceback.frames if equation.source_info.traceback else ()
    ours = [f for f in frames if "genai_jax" in f.file_name or "kernels_pallas" in f.file_name]
    place = f" at {ours[0].file_name.rpartition('/')[2]}:{ours[0].line_num}" if ours else ""
    return f"{name} of {equation.invars[0].aval.str_short()} to {out.aval.str_short()}{place}"


def programs_of(equation) -> Iterator[core.Jaxpr]:
    """The programs inside an equation: of loops, branches, calls."""
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
        if _is_program(inner):
            yield getattr(inner, "jaxpr", inner)


def _is_program(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
