"""What onnxruntime registers: operator schemas and kernels, read from the installed one, else from a snapshot.

Schemas say which element types an operator takes; kernels say for which of them there is an implementation. Both are
asked of the runtime itself, so they are right for the version at hand. The snapshot (written by
`tools/snapshot_kernels.py`) answers where onnxruntime is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.resources import files
from typing import Any

from onnx import AttributeProto, TensorProto, helper

FLOATING = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
NEWEST = 2**31 - 1  # end of the version range of a kernel that has no successor
SNAPSHOT = "onnxruntime-cpu.json"
_BASELINE = 17  # opset of the standard operators in which a contrib operator is tried out


def type_name(data_type: int) -> str:
    """Return how schemas and kernels write an element type: `tensor(float16)`."""
    return f"tensor({TensorProto.DataType.Name(data_type).lower()})"


_PREFERRED = ("tensor(float)", "tensor(int64)", "tensor(int32)", "tensor(bool)", "tensor(uint8)", "tensor(float16)")
_DATA_TYPES = {type_name(data_type): data_type for data_type in TensorProto.DataType.values()}
_FILLERS = {"INT": 1, "FLOAT": 1.0, "STRING": "", "INTS": [1], "FLOATS": [1.0], "STRINGS": [""]}


@dataclass(frozen=True, slots=True)
class Schema:
    """An operator from one opset on.

    Attributes:
        since: that opset.
        deprecated: whether it may no longer be used.
        inputs, outputs: names of the formal parameters with their types, a type variable or a type.
        required, results: how many inputs and outputs there must be.
        variadic: whether the last input repeats.
        mixed: whether it repeats with types of its own, as Loop's does.
        types: type variable → the types it may stand for.
        defaults: attribute → its default, as a serialized AttributeProto.
        needed: attributes without a default that must be given → their type.
    """

    since: int
    deprecated: bool
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    required: int
    results: int
    variadic: bool
    mixed: bool
    types: Mapping[str, frozenset[str]]
    defaults: Mapping[str, bytes]
    needed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation: for opsets `first` to `last`, and per type variable or formal parameter the types it takes."""

    first: int
    last: int
    types: Mapping[str, frozenset[str]]

    def serves(self, schema: Schema) -> bool:
        """Whether onnxruntime takes the kernel for the operator of that opset.

        A kernel without an end serves only the operator it was written for: a newer one may mean something else.
        """
        return self.first == schema.since or (self.first < schema.since <= self.last and self.last != NEWEST)


class Registry:
    """The schemas and kernels of one onnxruntime."""

    version: str

    def schema(self, op: str, domain: str, opset: int) -> Schema | None:
        """Return the operator as that opset has it, None where it is not known or not yet."""
        known = self.versions(op, domain)
        since = max((version for version in known if version <= opset), default=None)
        return None if since is None else known[since]

    def kernels(self, op: str, domain: str, provider: str) -> Sequence[Kernel]:
        """Return the provider's kernels for an operator, of all opsets."""
        raise NotImplementedError

    @property
    def newest_opset(self) -> int:
        """The newest opset of the standard operators that the runtime loads."""
        raise NotImplementedError

    @property
    def providers(self) -> Sequence[str]:
        """The providers whose kernels are known."""
        raise NotImplementedError

    def loads_without_kernel(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], provider: str
    ) -> bool:
        """Whether the runtime loads an operator that has no kernel: by casts, or by expanding its definition."""
        raise NotImplementedError

    def versions(self, op: str, domain: str) -> Mapping[int, Schema]:
        """Return the operator's schemas by the opset they came with."""
        raise NotImplementedError


class Installed(Registry):
    """The onnxruntime of this environment. Raises ImportError where there is none."""

    def __init__(self) -> None:
        self._runtime = import_module("onnxruntime")
        self._state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        self.version = self._runtime.__version__
        self._tried: dict[bytes, bool] = {}
        self._converted: dict[tuple[str, str], dict[int, Schema]] = {}

    @cached_property
    def _schemas(self) -> dict[tuple[str, str], list[Any]]:
        table: dict[tuple[str, str], list[Any]] = {}
        for schema in self._state.get_all_operator_schema():
            table.setdefault((schema.domain, schema.name), []).append(schema)
        return table

    @cached_property
    def _kernels(self) -> dict[tuple[str, str, str], list[Kernel]]:
        table: dict[tuple[str, str, str], list[Kernel]] = {}
        for kernel in self._state.get_all_opkernel_def():
            types = {name: frozenset(types) for name, types in kernel.type_constraints.items()}
            key = kernel.domain, kernel.op_name, kernel.provider
            first, last = kernel.version_range
            table.setdefault(key, []).append(Kernel(first, last, types))
        return table

    def operators(self) -> list[tuple[str, str]]:
        """Return (domain, operator) of every schema."""
        return sorted(self._schemas)

    def kernels(self, op: str, domain: str, provider: str) -> Sequence[Kernel]:
        return self._kernels.get((domain, op, provider), ())

    @property
    def providers(self) -> Sequence[str]:
        return sorted({provider for _, _, provider in self._kernels})

    @cached_property
    def newest_opset(self) -> int:
        newest = max(
            schema.since_version for (domain, _), found in self._schemas.items() if not domain for schema in found
        )
        return next(
            opset
            for opset in range(newest, 0, -1)
            if self._loads(_single("Identity", "", opset, ["tensor(float)"], 1, {}))
        )

    def versions(self, op: str, domain: str) -> Mapping[int, Schema]:
        found = self._converted.get((domain, op))
        if found is None:
            found = {schema.since_version: _converted(schema) for schema in self._schemas.get((domain, op), ())}
            self._converted[domain, op] = found
        return found

    def loads_without_kernel(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], provider: str
    ) -> bool:
        schema = self.schema(op, domain, opset)
        if schema is None or provider != "CPUExecutionProvider":  # another provider would need its device
            return False
        types = completed(schema, inputs)
        if any(kind and kind not in _DATA_TYPES for kind in types) or set(schema.needed.values()) - _FILLERS.keys():
            return False  # sequences and graphs: nothing that a fusion emits
        return self._loads(_single(op, domain, opset, types, schema.results, schema.needed))

    def _loads(self, model: bytes) -> bool:
        if model not in self._tried:
            options = self._runtime.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            try:
                self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
                self._tried[model] = True
            except Exception:  # its classes for "no such kernel" and "invalid" have no common base of their own
                self._tried[model] = False
        return self._tried[model]


class Snapshot(Registry):
    """An onnxruntime as it was once written down."""

    def __init__(self, text: str) -> None:
        data = json.loads(text)
        self.version = data["version"]
        self._newest_opset: int = data["newest_opset"]
        self._types: list[frozenset[str]] = [frozenset(types) for types in data["types"]]
        self._operators: dict[str, Any] = data["operators"]

    @property
    def newest_opset(self) -> int:
        return self._newest_opset

    @property
    def providers(self) -> Sequence[str]:
        return sorted({provider for entry in self._operators.values() for provider in entry.get("kernels", ())})

    def kernels(self, op: str, domain: str, provider: str) -> Sequence[Kernel]:
        found = self._operators.get(f"{domain}::{op}", {}).get("kernels", {}).get(provider, ())
        return [Kernel(first, last or NEWEST, self._named(types)) for first, last, types in found]

    def loads_without_kernel(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], provider: str
    ) -> bool:
        tried = self._operators.get(f"{domain}::{op}", {}).get("loads", {})
        floating = {data_type for data_type in inputs if data_type in FLOATING}
        ranges = tried.get(str(floating.pop()), ()) if len(floating) == 1 else ()
        return any(first <= opset <= last for first, last in ranges)

    def versions(self, op: str, domain: str) -> Mapping[int, Schema]:
        found = self._operators.get(f"{domain}::{op}", {}).get("schemas", {})
        return {int(since): self._schema(int(since), fields) for since, fields in found.items()}

    def _schema(self, since: int, fields: Mapping[str, Any]) -> Schema:
        return Schema(
            since=since,
            deprecated=fields.get("deprecated", False),
            inputs=tuple((name, kind) for name, kind in fields["inputs"]),
            outputs=tuple((name, kind) for name, kind in fields["outputs"]),
            required=fields["required"],
            results=fields["results"],
            variadic=fields.get("variadic", False),
            mixed=fields.get("mixed", False),
            types=self._named(fields["types"]),
            defaults={name: bytes.fromhex(value) for name, value in fields.get("defaults", {}).items()},
            needed=fields.get("needed", {}),
        )

    def _named(self, types: Mapping[str, int]) -> dict[str, frozenset[str]]:
        return {name: self._types[index] for name, index in types.items()}


def parameter(schema: Schema, slot: int) -> tuple[str, str] | None:
    """Return name and type of the formal parameter of an input slot, None where there is none."""
    if slot < len(schema.inputs):
        return schema.inputs[slot]
    return schema.inputs[-1] if schema.variadic else None


def completed(schema: Schema, inputs: Sequence[int | None]) -> list[str]:
    """Return a type per input slot, "" for one that is left out; a required one of unknown type gets a likely one."""
    given = ["" if data_type is None else type_name(data_type) for data_type in inputs]
    # All of them, for onnxruntime aborts on definitions that read an optional input beyond the last one given.
    given += [""] * (len(schema.inputs) - schema.variadic - len(given))
    given += [""] * (schema.required - len(given))
    bound: dict[str, str] = {}
    for slot, kind in enumerate(given):
        formal = parameter(schema, slot)
        if kind and formal is not None:
            bound.setdefault(formal[1], kind)
    for slot in range(schema.required):
        formal = parameter(schema, slot)
        if not given[slot] and formal is not None:
            allowed = schema.types.get(formal[1], frozenset({formal[1]}))
            likely = next((kind for kind in _PREFERRED if kind in allowed), min(allowed))
            given[slot] = bound.setdefault(formal[1], likely)
    return given


def _single(op: str, domain: str, opset: int, inputs: Sequence[str], results: int, needed: Mapping[str, str]) -> bytes:
    """Return a serialized model of one node, of unknown shapes."""
    attributes = {name: _FILLERS[kind] for name, kind in needed.items()}
    names = [f"in{slot}" if kind else "" for slot, kind in enumerate(inputs)]
    outputs = [f"out{slot}" for slot in range(results)]
    node = helper.make_node(op, names, outputs, domain=domain)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    infos = [
        helper.make_tensor_value_info(name, _DATA_TYPES[kind], None)
        for name, kind in zip(names, inputs, strict=True)
        if kind
    ]
    graph = helper.make_graph([node], "one", infos, [helper.make_empty_tensor_value_info(name) for name in outputs])
    imports = [helper.make_opsetid("", _BASELINE if domain else opset)]
    if domain:
        imports.append(helper.make_opsetid(domain, opset))
    model: bytes = helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    return model


@cache
def current() -> Registry:
    """Return the installed onnxruntime's registry, the snapshot's where there is none."""
    try:
        return Installed()
    except ImportError:
        return snapshot()


@cache
def snapshot() -> Registry:
    """Return the registry that comes with this package."""
    return Snapshot((files("fusion") / "data" / SNAPSHOT).read_text("utf-8"))


def defaults(op: str, domain: str, version: int) -> dict[str, AttributeProto]:
    """Return the default of every attribute that has one; empty where the runtime does not know the operator."""
    schema = current().schema(op, domain, version)
    return {} if schema is None else {k: AttributeProto.FromString(v) for k, v in schema.defaults.items()}


def knows(op: str, domain: str, version: int) -> bool:
    """Whether the runtime has a schema for the operator at this opset."""
    return current().schema(op, domain, version) is not None


def _converted(schema: Any) -> Schema:
    """Return a schema of onnxruntime's binding as ours."""
    attributes = schema.attributes
    encoded = {name: attribute._default_value for name, attribute in attributes.items()}
    defaults = {name: value for name, value in encoded.items() if AttributeProto.FromString(value).name}
    return Schema(
        since=schema.since_version,
        deprecated=schema.deprecated,
        inputs=tuple((parameter.name, parameter.typeStr) for parameter in schema.inputs),
        outputs=tuple((parameter.name, parameter.typeStr) for parameter in schema.outputs),
        required=schema.min_input,
        results=schema.min_output,
        variadic=bool(schema.inputs) and schema.inputs[-1].option.name == "Variadic",
        mixed=bool(schema.inputs) and not schema.inputs[-1].isHomogeneous,
        types={c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
        defaults=defaults,
        needed={k: a.type.name for k, a in attributes.items() if a.required and k not in defaults},
    )
