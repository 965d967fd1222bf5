"""Targets: where a fused model must run, and which operators that allows.

A target is a name, data that says which kernels there are, and the emissions of patterns that name it. Those that come
with the package are `onnx`, `ort-cpu` and `ort-cuda`; `add_target` adds another.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fusion import registry
from fusion.errors import TargetError
from fusion.registry import Kernel, Listed, Registry, Schema

PLUGINS = "onnx_fusion.targets"
"""Entry points of this group, in installed packages, are imported where a target is not known: they add theirs."""


@dataclass(frozen=True)
class Target:
    """Where a model must run.

    Attributes:
        name: "onnx", "ort-cpu", ….
        provider: whose kernels they are, such as an onnxruntime execution provider; None for the ONNX standard itself.
        like: name of the target whose emissions it takes where a pattern's own do not hold.
    """

    name: str
    provider: str | None
    _registry: Callable[[], Registry]
    like: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that emissions for it go by, preferred first."""
        return (self.name, *(target_named(self.like).names if self.like else ()))

    @property
    def newest_opset(self) -> int:
        """The newest opset of the standard operators that the target takes."""
        return self._registry().newest_opset

    def refuses(
        self,
        op: str,
        domain: str,
        opset: int,
        inputs: Sequence[int | None],
        output: int | None = None,
        attributes: Iterable[str] = (),
    ) -> str | None:
        """Return why a node would not run, in one sentence; None where it does.

        Args:
            op, domain: the operator.
            opset: the version of `domain` that the model imports.
            inputs: element type per input slot (TensorProto.DataType), None where it is left out or not known.
            output: element type of the first output, None where it is not known.
            attributes: names of those that are given.
        """
        schema = self._registry().schema(op, domain, opset)
        unknown = [name for name in attributes if schema is not None and not schema.takes(name)]
        if unknown:
            return f"{op} of {self._registry().label} has no attribute {', '.join(unknown)}"
        return _decide(self._registry(), self.provider, op, domain, opset, tuple(inputs), output)[1]

    def results(self, op: str, domain: str, opset: int) -> int:
        """Return how many outputs a node must have, read or not; 0 where the operator is unknown."""
        schema = self._registry().schema(op, domain, opset)
        return 0 if schema is None else schema.results

    def route(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], output: int | None = None
    ) -> str | None:
        """Return how a node runs, None where it does not.

        "kernel": there is one for these types. "expanded": the runtime loads the node without one, by casts to float32
        or by writing out the operator's definition, so that fusing to it saves no time. "standard": the ONNX standard
        defines it, whatever runs it.
        """
        return _decide(self._registry(), self.provider, op, domain, opset, tuple(inputs), output)[0]


_targets = {
    target.name: target
    for target in (
        Target("onnx", None, registry.standard),
        Target("ort-cpu", "CPUExecutionProvider", registry.current),
        Target("ort-cuda", registry.CUDA, registry.cuda),
    )
}


def add_target(
    name: str, data: Mapping[str, Any] | str | os.PathLike[str], *, like: str | None = None, provider: str | None = None
) -> Target:
    """Add a target, or replace it; patterns are written for it by emissions that name it.

    Args:
        name: its name.
        data: its kernels, or the JSON file with them (see `registry.Listed`).
        like: a known target whose emissions are taken, after those that name this one.
        provider: what its kernels are called in messages; the name by default.

    Raises:
        TargetError: `like` is unknown, or the data is not what `registry.Listed` wants.
    """
    if like is not None:
        target_named(like)
    try:
        read = data if isinstance(data, Mapping) else json.loads(Path(data).read_text("utf-8"))
        listed = Listed(read, provider or name)
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TargetError(
            f"the kernels of the target {name!r} cannot be read ({type(error).__name__}: {error}): "
            "expected label, newest_opset, and kernels by operator"
        ) from None
    _targets[name] = Target(name, provider or name, lambda: listed, like)
    return _targets[name]


def target_named(name: str) -> Target:
    """Return a target by its name.

    Raises:
        TargetError: there is none of that name; the message lists those that there are.
    """
    if name not in _targets:
        for plugin in entry_points(group=PLUGINS):
            plugin.load()
    if name in _targets:
        return _targets[name]
    close = difflib.get_close_matches(name, _targets, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise TargetError(f"the target {name!r} is unknown{hint} There are {', '.join(_targets)}")


def target_names() -> list[str]:
    """Return the names of all targets."""
    return list(_targets)


@cache
def _decide(
    found: Registry,
    provider: str | None,
    op: str,
    domain: str,
    opset: int,
    inputs: tuple[int | None, ...],
    output: int | None,
) -> tuple[str | None, str | None]:
    """Return how the node runs, or why it does not."""
    domain = "" if domain == "ai.onnx" else domain
    if not domain and opset > found.newest_opset:
        return None, f"opset {opset} is newer than {found.label} takes, which ends at {found.newest_opset}"
    versions = found.versions(op, domain)
    if not versions:
        return None, f"{found.label} does not know {domain + '::' if domain else ''}{op}"
    schema = found.schema(op, domain, opset)
    if schema is None:
        return None, f"{op} comes with opset {min(versions)}, and the model imports {opset}"
    if schema.deprecated:
        return None, f"{op} is deprecated at opset {opset}"
    named = _named_types(schema, inputs, output)
    wrong = _wrong_types(op, schema, len(inputs), named)
    if wrong is not None:
        return None, wrong
    if provider is None:
        return "standard", None
    if any(kernel.serves(schema) and _takes(kernel, named) for kernel in found.kernels(op, domain, provider)):
        return "kernel", None
    if found.loads_without_kernel(op, domain, opset, inputs, provider):
        return "expanded", None
    short = provider.removesuffix("ExecutionProvider")
    types = ", ".join(sorted({_short(kind) for _, _, kind in named}))
    return None, f"{found.label} has no {short} kernel for {op} (opset {schema.since}) with {types or 'these types'}"


def _takes(kernel: Kernel, named: list[tuple[str, str, str]]) -> bool:
    """Whether a kernel takes these types; it constrains type variables, or formal parameters."""
    return all(
        kind in (kernel.types.get(constrained) or (kind,))
        for *constraints, kind in named
        for constrained in constraints
    )


def _wrong_types(op: str, schema: Schema, count: int, named: list[tuple[str, str, str]]) -> str | None:
    """Return what the schema does not allow: too many inputs or too few, a type, two types for one type variable."""
    if count < schema.required:
        return f"{op} needs {schema.required} inputs, not {count}"
    if count and schema.parameter(count - 1) is None:
        return f"{op} (opset {schema.since}) does not take {count} inputs"
    bound: dict[str, tuple[str, str]] = {}
    for name, variable, kind in named:
        allowed = schema.types.get(variable, frozenset({variable}))
        if kind not in allowed:
            listed = ", ".join(sorted(_short(other) for other in allowed if "(" in other and "(" not in _short(other)))
            return f"{op} (opset {schema.since}) does not take {_short(kind)} for {name}, only {listed}"
        first, before = bound.setdefault(variable, (name, kind))
        if before != kind and variable in schema.types and not (schema.mixed and name == schema.inputs[-1][0]):
            return f"{op} needs one type for {first} and {name}, not {_short(before)} and {_short(kind)}"
    return None


def _named_types(schema: Schema, inputs: tuple[int | None, ...], output: int | None) -> list[tuple[str, str, str]]:
    """Return (formal parameter, type variable, type) of every value whose type is known."""
    named = []
    for slot, data_type in enumerate(inputs):
        formal = schema.parameter(slot)
        if data_type is not None and formal is not None:
            named.append((*formal, registry.type_name(data_type)))
    if output is not None and schema.outputs:
        named.append((*schema.outputs[0], registry.type_name(output)))
    return named


def _short(kind: str) -> str:
    return kind[len("tensor(") : -1] if kind.startswith("tensor(") else kind
