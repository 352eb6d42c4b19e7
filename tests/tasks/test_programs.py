"""Programs that sample are compiled once, whatever the parameters."""

import contextlib
import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import pytest

from genai_jax.components import make_task, parse_run, request_class
from genai_jax.errors import NotFinite
from genai_jax.tasks.programs import cached_program
from tests.commands import TINY
from tests.every_flag import CODEC
from tests.tasks.eight_devices import TASK_FLAGS

# Neighbors of words are no program.
WITHOUT = ("classifier", "unet_class", "skip_gram", "glove")
FAMILIES = {n: f for n, f in TASK_FLAGS.items() if n not in WITHOUT}
FAMILIES |= {"codec": CODEC, "text": (*TINY, "--data.unique_tokens=2000")}
compiled = []  # what jax reports


@pytest.fixture(autouse=True, scope="module")
def listener():
    def listen(event: str, seconds: float, **_):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_request_traces_nothing_and_keeps_no_parameters(name):
    task = make_task(parse_run(FAMILIES[name]))
    cls = request_class(type(task), "sample_request")
    few = {"max_tokens": 4, "sweeps": 2}
    names = {f.name for f in dataclasses.fields(cls)}
    request = cls(num_samples=2, **{n: x for n, x in few.items() if n in names})
    shapes, alive = jax.eval_shape(task.init, jax.random.key(0)), []

    def sample(value: float):
        model = jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)
        alive.extend(map(weakref.ref, jax.tree.leaves(model)))
        compiled.clear()
        with contextlib.suppress(NotFinite):  # of parameters that no training leads to
            task.sample(*model, request)
        return len(compiled)

    assert sample(0) > 0
    assert sample(1) == 0
    gc.collect()
    assert not [x for x in alive if x() is not None]  # no parameters stay with the programs


def test_a_program_belongs_to_its_owner_and_its_key():
    class Owner:
        pass

    first, second = Owner(), Owner()
    builds = [cached_program(o, k, object) for o in (first, second) for k in ("a", "b", "a")]
    assert builds[0] is builds[2] and len(set(map(id, builds))) == 4
