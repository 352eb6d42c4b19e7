"""Finds calls of LAPACK for several matrices in a traced program."""

from collections.abc import Iterator

from jax.extend import core

from tests.tasks.traced import described, programs_of

FACTORIZATIONS = {
    "cholesky", "eig", "eigh", "geqrf", "householder_product", "lu", "qr", "schur", "svd",
    "triangular_solve", "tridiagonal", "tridiagonal_solve",
}  # fmt: skip


def batched_factorizations(program: core.Jaxpr) -> Iterator[str]:
    """Describes each call of LAPACK for several matrices, of a program and those inside it.

    On a CPU, jax 0.10 gives such calls to the same few threads on which they wait, so that two at
    once can wait forever.
    """
    for equation in program.eqns:
        if equation.primitive.name in FACTORIZATIONS and equation.invars[0].aval.ndim > 2:
            yield described(equation.primitive.name, equation, equation.outvars[0])
        for inner in programs_of(equation):
            yield from batched_factorizations(inner)
