"""Chooses the backend of a call: by name, or by the first rule that holds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType

from . import device
from .spec import Unsupported


@dataclass(frozen=True)
class Backend:
    """`check(*call)` raises Unsupported(reason) if `run` cannot run the call.

    chips: substrings of the names of the devices that it compiles for.
    """

    run: Any
    platforms: tuple[str, ...] | None = None  # None: all
    check: Callable = lambda *call: None
    chips: tuple[str, ...] | None = None  # None: all devices of the platforms


@dataclass(frozen=True)
class Rule:
    """`auto` takes `backend` if `when(*call, platform)` holds, because of `reason`."""

    backend: str
    reason: str
    when: Callable = lambda *call: True


def lazily(module: str, name: str) -> Callable:
    """The function `name` of a module of this package, imported on its first call: the kernel
    languages take a second to import."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(*args, **kwargs)

    return call


def kernels(operation: type, module: str, platform: str, chips=None) -> Backend:
    """The backend in a module of this package, which has a function for each field of `operation`
    and a `check`."""
    run = operation(*(lazily(module, name) for name in operation._fields))
    return Backend(run, (platform,), lazily(module, "check"), chips)


def backends(table: Mapping[str, Backend], platform: str | None = None) -> tuple[str, ...]:
    """The backends in `table` that `platform` ("cpu", "gpu", "tpu"; None: this one) can run."""
    platform = platform or device.platform()
    return tuple(n for n, b in table.items() if b.platforms is None or platform in b.platforms)


def choose(
    backend: str, table: Mapping[str, Backend], rules: tuple[Rule, ...], *call
) -> tuple[str, str]:
    """(name, reason). ValueError if a backend requested by name cannot run the call."""
    platform = device.platform()
    here = backends(table, platform)
    if backend == "auto":
        return _first(table, rules, here, platform, call)
    if backend not in here:
        what = "is not available on" if backend in table else "is unknown; for"
        raise ValueError(f"backend {backend!r} {what} {platform}: allowed: auto, {', '.join(here)}")
    try:
        _check(table[backend], call)
    except Unsupported as error:
        raise ValueError(f"backend {backend!r} cannot run this call: {error}") from None
    return backend, "requested"


def _check(backend: Backend, call):
    if backend.chips is not None:
        kind = device.device_kind()
        if not any(chip in kind for chip in backend.chips):
            raise Unsupported(f"device {kind}; allowed: {', '.join(backend.chips)}")
    backend.check(*call)


def check_not_split():
    """Raises Unsupported if the mesh in use may split the arrays: the compiler's partitioner does
    not look into kernels. Inside a `jax.shard_map` over all mesh axes, arrays are whole."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [f"{n}={mesh.shape[n]}" for n, kind in kinds if kind != AxisType.Manual]
    if any(not axis.endswith("=1") for axis in free):
        raise Unsupported(f"a mesh of {', '.join(free)}; allowed: inside jax.shard_map over it")


def _first(table, rules, here, platform, call) -> tuple[str, str]:
    passed = []
    for rule in rules:
        if rule.backend not in here or not rule.when(*call, platform):
            continue
        try:
            _check(table[rule.backend], call)
        except Unsupported as error:
            passed.append(f"; not {rule.backend}: {error}")
            continue
        return rule.backend, rule.reason + "".join(passed)
    raise ValueError(f"no backend of {platform} can run this call" + "".join(passed))
