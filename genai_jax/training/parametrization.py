"""Maximal-update parametrization: how the learning rate of a parameter scales with the width.

Yang et al. 2022 ("Tensor Programs V"), in the form of table 8, which also holds for an embedding
that is shared with the output. At a base shape it equals the standard parametrization; `growth` is
the size of each logical axis relative to that shape, and all widths grow in proportion. Networks
scale their initialization and multipliers by the same growth:

              initial variance   multiplier   SGD        Adam, Lion   Muon
    vector    as standard        1            out        1            1 (Adam)
    input     as standard        1            out        1            1 (Adam)
    hidden    as standard        1            out / in   1 / in       sqrt(out / in / max(in, out))
    output    in x standard      1 / in       in         1            1 (Adam)

where `in` and `out` are the growth of a matrix's input and output axes, and standard variances are
1 / fan-in, but constant for embeddings. Attention scores are scaled by 1 / head_dim (definition
4.1), times a constant that makes it 1 / sqrt(head_dim) at the base shape.

The column for Muon is not from that paper. Its update is an orthogonal matrix times
sqrt(max(in, out)) (Liu et al. 2025, section 2.2), and its spectral norm has to grow as
sqrt(out / in) (Yang, Simon, Bernstein 2023, condition 1). Decoupled weight decay is not scaled by
these factors: a step shrinks a matrix by the same fraction at every width (Wang and Aitchison
2024). Adam's epsilon is not scaled either: it has to stay far below the gradients, which fall as
1 / width.
"""

import math
from collections.abc import Mapping

from genai_jax.config import ConfigError

RULES = ("sgd", "adam", "muon")
STACKED = ("layers", "experts")  # axes that stack many parameters in one array
_WIDTHS = ("embed", "heads", "kv_heads", "head_dim", "mlp", "inner", "latent")
STREAMS = ("embed", "inner", "latent")  # what hidden matrices read or write
_COUNTS = ("vocabulary", None)  # axes that do not grow with the width of the network


def fans(axes: tuple) -> tuple[tuple, tuple]:
    """The input axes of a parameter, which it contracts, and its output axes.

    A matrix has the residual stream ("embed"), or else the inside of a mixer ("inner", "latent"),
    on one side and its input axes first. The input axis of an embedding is the vocabulary; a scale
    or bias has no input axes.

    Args:
      axes: logical axes of a parameter, as the sharding table names them.

    Raises:
      ConfigError: axes without a rule.
    """
    inner = tuple(axis for axis in axes if axis not in STACKED)
    if not {*inner} <= {*_WIDTHS, *_COUNTS}:
        raise ConfigError(
            f"maximal-update parametrization has no rule for a parameter with axes {axes}"
        )
    stream = next((axis for axis in STREAMS if axis in inner), None)
    if len(inner) < 2 or stream is None:
        return (), inner
    if inner[-1] == stream:
        return inner[:-1], inner[-1:]
    return inner[:1], inner[1:]


def kind(axes: tuple) -> str:
    """ "vector", "input", "hidden", or "output", by the sides that grow with the width."""
    into, out = fans(axes)
    if not into:
        return "vector"
    if not {*into} & {*_WIDTHS}:
        return "input"
    return "hidden" if {*out} & {*_WIDTHS} else "output"


def learning_rate_factor(axes: tuple, growth: Mapping[str, float], rule: str) -> float:
    """The factor on the learning rate of a parameter, 1 at the base shape.

    Args:
      axes: logical axes of the parameter.
      growth: logical axis -> its size relative to the base shape; axes left out have 1.
      rule: "sgd" for updates proportional to the gradient, "adam" for updates whose size does not
        depend on it, "muon" for orthogonal updates of hidden matrices and "adam" elsewhere.
    """
    into, out = (math.prod(growth.get(axis, 1.0) for axis in side) for side in fans(axes))
    which = kind(axes)
    if rule == "sgd":
        return into if which == "output" else out / into
    if which != "hidden":
        return 1.0
    return 1 / into if rule == "adam" else math.sqrt(out / into / max(into, out))
