"""Finds long sums in half precision in a traced program."""

from collections.abc import Iterator

import jax.numpy as jnp
from jax.extend import core

from tests.tasks.traced import described, programs_of

HALF = (jnp.bfloat16, jnp.float16)
SUMS = {"reduce_sum", "reduce_window_sum", "reduce"}  # long where they shorten an array
ALWAYS = {"scatter-add", "cumsum", "psum", "reduce_scatter"}


def half_sums(program: core.Jaxpr, rows: int, carry: slice = slice(0)) -> Iterator[str]:
    """Describes every long sum in half precision of a program and of the programs inside it.

    A matmul is none: XLA accumulates it in float32 and rounds once. The sum of two cotangents is
    none either, but one of three or more is. Sums of activations are left out: a residual stream
    is kept in half precision, forward and backward. Their sizes are multiples of `rows`, a prime
    number of examples of which no other size is a multiple.

    Args:
      program: with everything that it calls.
      rows: the number of examples.
      carry: the inputs that are results of the same program's last turn in a loop.
    """
    turns = set(program.invars[carry])  # to which something is added over and over
    sums: set = set()
    for equation in program.eqns:
        name, (first, *_) = equation.primitive.name, (*equation.invars, None)
        for out in equation.outvars:
            if getattr(out.aval, "dtype", None) not in HALF:
                continue
            shortens = name in SUMS and first.aval.size > out.aval.size and _adds(equation)
            if shortens or name in ALWAYS:
                yield described(name, equation, out)
            elif name in ("add_any", "add") and out.aval.size % rows:
                added = {v for v in equation.invars if _is_variable(v)}
                if added & turns or (name == "add_any" and added & sums):
                    yield described(name, equation, out)
                sums.add(out)
        carry = slice(0)
        if name == "scan":
            constants, count = equation.params["num_consts"], equation.params["num_carry"]
            carry = slice(constants, constants + count)
        elif name == "while":
            carry = slice(equation.params["body_nconsts"], None)
        for inner in programs_of(equation):
            yield from half_sums(inner, rows, carry)


def _adds(equation) -> bool:
    """Whether a reduction is a sum: `reduce` says so in a program of its own."""
    inner = equation.params.get("jaxpr")
    return inner is None or any(e.primitive.name == "add" for e in inner.eqns)


def _is_variable(value) -> bool:
    return isinstance(value, core.Var)
