"""`evaluate --seed` is a flag of the families whose scores involve randomness, and of no other."""

import jax
import pytest
from jax.extend import core

from genai_jax.components import make_task, parse_run, request_class
from genai_jax.tasks.protocol import Reports
from tests.every_flag import BASES, flags_of_base, needs_a_run


def uses(program: core.Jaxpr, variable: core.Var) -> bool:
    """Whether a result of the program may depend on the variable."""
    for equation in program.eqns:
        for place, value in enumerate(equation.invars):
            if value is not variable:
                continue
            inner = [p for p in equation.params.values() if isinstance(p, core.ClosedJaxpr)]
            if not inner or any(uses(p.jaxpr, p.jaxpr.invars[place]) for p in inner):
                return True
    return variable in program.outvars


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(b, marks=[pytest.mark.depends_on("every flag")] if needs_a_run(b) else [])
        for b in BASES
        if b != "responder"  # which has no score
    ],
)
def test_a_seed_is_asked_for_where_it_changes_a_score(base):
    task = make_task(parse_run(flags_of_base(base)))
    params, mutables = jax.eval_shape(task.init, jax.random.key(0))
    spec = task.data.batch_spec
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in spec.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(task.example_metrics)(params, mutables, batch, key).jaxpr
    random = uses(program, program.invars[-1])
    no_samples = ("word_vectors", "language_model")  # in what they report
    random |= isinstance(task, Reports) and base.split()[0] not in no_samples
    fields = request_class(type(task), "evaluate_request").__dataclass_fields__
    assert ("seed" in fields) == random
