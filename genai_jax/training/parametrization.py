"""Maximal-update parametrization: what of a parameter's learning rate depends on the width.

Yang et al. 2022 ("Tensor Programs V"), in the form of table 8, which also holds for an embedding
that is both read from and written to. All widths grow in the proportions of a base shape, at which
it is the standard parametrization; `growth` says how much, logical axis by logical axis. A network
takes what is not a learning rate from the same growth:

              initial variance   multiplier   SGD        Adam, Lion   Muon
    vector    as standard        1            out        1            1 (Adam)
    input     as standard        1            out        1            1 (Adam)
    hidden    as standard        1            out / in   1 / in       sqrt(out / in / max(in, out))
    output    in x standard      1 / in       in         1            1 (Adam)

where `in` and `out` are the growth of what a matrix contracts and of what it makes, and standard
variances are 1 / fan-in, but constant for embeddings. The scores of attention are those of
1 / head_dim (definition 4.1), equal to 1 / sqrt(head_dim) at the base shape.

Muon's column is not of that paper. Its update is an orthogonal matrix times sqrt(max(in, out))
(Liu et al. 2025, section 2.2), and its spectral norm has to grow as sqrt(out / in) (Yang, Simon,
Bernstein 2023, condition 1). Decoupled weight decay does not follow these factors: a step shrinks a
matrix by the same share at every width (Wang and Aitchison 2024). The epsilon of Adam is not scaled
either: it has to stay far below gradients, which fall as 1 / width.
"""

import math
from collections.abc import Mapping

from genai_jax.config import ConfigError

RULES = ("sgd", "adam", "muon")
STACKED = ("layers", "experts")  # axes of many parameters in one array
_WIDTHS = ("embed", "heads", "kv_heads", "head_dim", "mlp")
_COUNTS = ("vocabulary", None)  # of things that are not made more of as the network gets wider


def fans(axes: tuple) -> tuple[tuple, tuple]:
    """The axes that a matrix contracts, and those that it makes; a scale or bias contracts none.

    A matrix has the residual stream ("embed") on one side, what it contracts comes first, and an
    embedding contracts its rows.

    Args:
      axes: logical axes of a parameter, as the sharding table names them.

    Raises:
      ConfigError: axes of which no rule here speaks.
    """
    inner = tuple(axis for axis in axes if axis not in STACKED)
    if not {*inner} <= {*_WIDTHS, *_COUNTS}:
        raise ConfigError(f"no maximal-update parametrization for a parameter of axes {axes}")
    if len(inner) < 2 or "embed" not in inner:
        return (), inner
    if inner[-1] == "embed":
        return inner[:-1], inner[-1:]
    return inner[:1], inner[1:]


def kind(axes: tuple) -> str:
    """ "vector", "input", "hidden" or "output": which sides of a parameter grow with the width."""
    into, out = fans(axes)
    if not into:
        return "vector"
    if not {*into} & {*_WIDTHS}:
        return "input"
    return "hidden" if {*out} & {*_WIDTHS} else "output"


def learning_rate_factor(axes: tuple, growth: Mapping[str, float], rule: str) -> float:
    """What the learning rate of a parameter is multiplied by.

    Args:
      axes: logical axes of the parameter.
      growth: logical axis -> its size relative to the base shape; 1 where it is not named.
      rule: "sgd" for updates in proportion to the gradient, "adam" for those whose size does not
        depend on it, "muon" for those made orthogonal, with "adam" for all but hidden matrices.

    Returns:
      A number, 1 at the base shape.
    """
    into, out = (math.prod(growth.get(axis, 1.0) for axis in side) for side in fans(axes))
    which = kind(axes)
    if rule == "sgd":
        return into if which == "output" else out / into
    if which != "hidden":
        return 1.0
    return 1 / into if rule == "adam" else math.sqrt(out / into / max(into, out))
