"""Targets: where a fused model must run, and which operators that allows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from onnx import defs

from fusion import registry
from fusion.errors import TargetError
from fusion.registry import Kernel, Registry, Schema

_CPU = "CPUExecutionProvider"
_ORT = {"ort-cpu": _CPU, "ort-cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Target:
    """Where a model must run.

    Attributes:
        name: "onnx", "ort-cpu", ….
        provider: the onnxruntime execution provider, None for the ONNX standard itself.
    """

    name: str
    provider: str | None
    _registry: Callable[[], Registry]

    @property
    def providers(self) -> list[str]:
        """What to give to onnxruntime's InferenceSession; the standard itself runs anywhere, so on the CPU."""
        return [self.provider or _CPU] if self.provider in (None, _CPU) else [str(self.provider), _CPU]

    @property
    def newest_opset(self) -> int:
        """The newest opset of the standard operators that the target takes."""
        return defs.onnx_opset_version() if self.provider is None else self._registry().newest_opset

    def refuses(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], output: int | None = None
    ) -> str | None:
        """Return why a node would not run, in one sentence; None where it does.

        Args:
            op, domain: the operator.
            opset: the version of `domain` that the model imports.
            inputs: element type per input slot (TensorProto.DataType), None where it is left out or not known.
            output: element type of the first output, None where it is not known.
        """
        return self._decide(op, domain, opset, tuple(inputs), output)[1]

    def route(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], output: int | None = None
    ) -> str | None:
        """Return how a node runs, None where it does not.

        "kernel": there is one for these types. "expanded": the runtime loads the node without one, by casts to float32
        or by writing out the operator's definition, so that fusing to it saves no time. "standard": the ONNX standard
        defines it, whatever runs it.
        """
        return self._decide(op, domain, opset, tuple(inputs), output)[0]

    def _decide(
        self, op: str, domain: str, opset: int, inputs: tuple[int | None, ...], output: int | None
    ) -> tuple[str | None, str | None]:
        if self.provider is None:
            reason = _breaks_standard(op, domain, opset, inputs, output)
            return (None, reason) if reason else ("standard", None)
        return _on_runtime(self._registry(), self.provider, op, domain, opset, inputs, output)


def target_named(name: str) -> Target:
    """Return a target by its name.

    Raises:
        TargetError: there is none of that name; the message lists those that there are.
    """
    known = target_names()
    if name in known:
        return Target(name, _ORT.get(name), registry.current)
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise TargetError(f"the target {name!r} is unknown: {hint}There are {', '.join(known)}")


def target_names() -> list[str]:
    """Return the names of all targets: the standard, and the providers whose kernels are known."""
    providers = registry.current().providers
    return ["onnx", *(name for name, provider in _ORT.items() if provider in providers)]


def runtime_version() -> str | None:
    """Return the version of the installed onnxruntime, None where there is none."""
    found = registry.current()
    return found.version if isinstance(found, registry.Installed) else None


# -- the standard -----------------------------------------------------------------------------------------------------


@cache
def _breaks_standard(
    op: str, domain: str, opset: int, inputs: tuple[int | None, ...], output: int | None
) -> str | None:
    if domain not in ("", "ai.onnx"):
        return f"{domain}::{op} is no standard ONNX operator"
    if opset > defs.onnx_opset_version():
        return f"opset {opset} is newer than the installed onnx, which ends at {defs.onnx_opset_version()}"
    try:
        standard = defs.get_schema(op, opset, "")
    except defs.SchemaError:
        return _too_old(op, opset, _first_opset(op))
    if standard.deprecated:
        return f"{op} is deprecated at opset {opset}"
    return _wrong_types(op, _as_schema(standard), inputs, output)


def _first_opset(op: str) -> int | None:
    versions = [schema.since_version for schema in _history() if schema.name == op and not schema.domain]
    return min(versions, default=None)


@cache
def _history() -> list[defs.OpSchema]:
    return list(defs.get_all_schemas_with_history())


def _as_schema(schema: defs.OpSchema) -> Schema:
    return Schema(
        since=schema.since_version,
        deprecated=schema.deprecated,
        inputs=tuple((formal.name, formal.type_str) for formal in schema.inputs),
        outputs=tuple((formal.name, formal.type_str) for formal in schema.outputs),
        required=schema.min_input,
        results=schema.min_output,
        variadic=bool(schema.inputs) and schema.inputs[-1].option == defs.OpSchema.FormalParameterOption.Variadic,
        mixed=bool(schema.inputs) and not schema.inputs[-1].is_homogeneous,
        types={c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
        defaults={},
        needed={},
    )


# -- a runtime --------------------------------------------------------------------------------------------------------


@cache
def _on_runtime(
    found: Registry,
    provider: str,
    op: str,
    domain: str,
    opset: int,
    inputs: tuple[int | None, ...],
    output: int | None,
) -> tuple[str | None, str | None]:
    """Return how the node runs, or why it does not."""
    domain = "" if domain == "ai.onnx" else domain
    runtime = f"onnxruntime {found.version}"
    if not domain and opset > found.newest_opset:
        return None, f"opset {opset} is newer than {runtime} loads, which ends at {found.newest_opset}"
    schema = found.schema(op, domain, opset)
    if schema is None:
        newer = found.schema(op, domain, registry.NEWEST)
        if newer is None:
            return None, f"{runtime} does not know {domain + '::' if domain else ''}{op}"
        return None, _too_old(op, opset, newer.since)
    if schema.deprecated:
        return None, f"{op} is deprecated at opset {opset}"
    wrong = _wrong_types(op, schema, inputs, output)
    if wrong is not None:
        return None, wrong
    kernels = [kernel for kernel in found.kernels(op, domain, provider) if kernel.serves(schema)]
    named = _named_types(schema, inputs, output)
    if any(_takes(kernel, named) for kernel in kernels):
        return "kernel", None
    if found.loads_without_kernel(op, domain, opset, inputs, provider):
        return "expanded", None
    short = provider.removesuffix("ExecutionProvider")
    types = ", ".join(sorted({_short(kind) for _, _, kind in named}))
    return None, f"{runtime} has no {short} kernel for {op} (opset {schema.since}) with {types or 'these types'}"


def _takes(kernel: Kernel, named: list[tuple[str, str, str]]) -> bool:
    """Whether a kernel takes these types; it constrains type variables, or formal parameters."""
    everything: frozenset[str] = frozenset()
    for name, variable, kind in named:
        for constrained in (name, variable):
            allowed = kernel.types.get(constrained, everything)
            if allowed and kind not in allowed:
                return False
    return True


def _wrong_types(op: str, schema: Schema, inputs: tuple[int | None, ...], output: int | None) -> str | None:
    """Return what the schema does not allow: too many inputs or too few, a type, two types for one type variable."""
    if len(inputs) < schema.required:
        return f"{op} needs {schema.required} inputs, not {len(inputs)}"
    if registry.parameter(schema, len(inputs) - 1) is None and inputs:
        return f"{op} (opset {schema.since}) does not take {len(inputs)} inputs"
    bound: dict[str, tuple[str, str]] = {}
    for name, variable, kind in _named_types(schema, inputs, output):
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
        formal = registry.parameter(schema, slot)
        if data_type is not None and formal is not None:
            named.append((*formal, registry.type_name(data_type)))
    if output is not None and schema.outputs:
        named.append((*schema.outputs[0], registry.type_name(output)))
    return named


def _short(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind


def _too_old(op: str, opset: int, first: int | None) -> str:
    if first is None:
        return f"{op} is no operator"
    return f"{op} comes with opset {first}, and the model imports {opset}"
