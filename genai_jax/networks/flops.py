"""FLOPs of any network, counted from its jaxpr."""

import functools
import math

import jax
import numpy as np


def count_flops(function, *shapes) -> int:
    """FLOPs of the matmuls and convolutions of `function`, from its jaxpr: 2 per multiply-add.

    Loops are counted as often as they run, a branch as its more expensive side. Products above a
    causal diagonal count; those of a convolution with its padding, or with the zeros between the
    rows of a transposed one, do not.

    Raises:
      ValueError: a loop of unknown length.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*shapes).jaxpr)


def _jaxpr_flops(jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in left)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "while":
        if _jaxpr_flops(params["body_jaxpr"].jaxpr):
            raise ValueError("a while loop with matmuls runs an unknown number of times")
        return 0
    if name == "cond":
        return max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
    inner = [p for p in params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
    total = sum(_jaxpr_flops(getattr(p, "jaxpr", p)) for p in inner[:1])
    return total * params["length"] if name == "scan" else total


def _convolution_flops(equation) -> int:
    params = equation.params
    where = params["dimension_numbers"]
    image, kernel = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval
    products = out.size * kernel[where.rhs_spec[1]]
    for axis, (low, _) in enumerate(params["padding"]):
        products *= mean_taps(
            size=kernel[where.rhs_spec[2 + axis]],
            stride=params["window_strides"][axis],
            low=low,
            base=params["lhs_dilation"][axis],
            dilation=params["rhs_dilation"][axis],
            length=image[where.lhs_spec[2 + axis]],
            out=out.shape[where.out_spec[2 + axis]],
        )
    return 2 * round(products)


@functools.cache
def mean_taps(*, size, stride, low, base, dilation, length, out) -> float:
    """Elements of a window that meet an element of the input, on average over the outputs."""
    if size == 1:
        return 1.0
    at = np.arange(out)[:, None] * stride + np.arange(size)[None] * dilation - low
    meets = (at >= 0) & (at <= (length - 1) * base) & (at % base == 0)
    return float(meets.sum() / out)
