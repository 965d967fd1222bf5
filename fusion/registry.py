"""The operators that onnx and onnxruntime know: schemas and kernels.

Schemas say which element types an operator takes; kernels say for which of them there is an implementation. Both are
asked of the libraries themselves, so they are right for the versions at hand. Snapshots (written by
`tools/snapshot_kernels.py`) answer where onnxruntime is not installed, or not with a provider.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.resources import files
from typing import Any

from onnx import AttributeProto, TensorProto, defs, helper

FLOATING = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
CUDA = "CUDAExecutionProvider"
NEWEST = 2**31 - 1  # end of the version range of a kernel that has no successor
SNAPSHOT, CUDA_KERNELS = "onnxruntime-cpu.json", "onnxruntime-cuda.json"
DATA = files("fusion") / "data"
_BASELINE = 17  # opset of the standard operators in which a contrib operator is tried out


def type_name(data_type: int) -> str:
    """Return how schemas and kernels write an element type: `tensor(float16)`."""
    return f"tensor({TensorProto.DataType.Name(data_type).lower()})"


_PREFERRED = ("tensor(float)", "tensor(int64)", "tensor(int32)", "tensor(bool)", "tensor(uint8)", "tensor(float16)")
_DATA_TYPES = {type_name(data_type): data_type for data_type in TensorProto.DataType.values()}
_HARMLESS = {"CPUExecutionProvider", "AzureExecutionProvider"}
_ASK = "from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def as ask; ask()"
_FILLERS = {"INT": 1, "FLOAT": 1.0, "STRING": "", "INTS": [1], "FLOATS": [1.0], "STRINGS": [""]}


Types = Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Schema:
    """An operator from one opset on."""

    since: int
    inputs: Sequence[tuple[str, str]]  # name and type of the formal parameters; the type may be a variable
    outputs: Sequence[tuple[str, str]]
    required: int  # how many inputs there must be
    results: int  # and how many outputs
    types: Types  # type variable → the types it may stand for
    deprecated: bool = False
    variadic: bool = False  # the last input repeats
    mixed: bool = False  # and with types of its own, as Loop's does
    defaults: Mapping[str, bytes] = field(default_factory=dict)  # attribute → serialized AttributeProto
    needed: Mapping[str, str] = field(default_factory=dict)  # attributes that must be given → their type
    optional: frozenset[str] | None = None  # further attributes; None: nobody knows which there are

    def takes(self, attribute: str) -> bool:
        """Whether the operator may have the attribute."""
        return self.optional is None or attribute in self.optional | self.defaults.keys() | self.needed.keys()

    def parameter(self, slot: int) -> tuple[str, str] | None:
        """Name and type of the formal parameter of an input slot, None where there is none."""
        if slot < len(self.inputs):
            return self.inputs[slot]
        return self.inputs[-1] if self.variadic else None


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation: for opsets `first` to `last`, and per type variable or formal parameter the types it takes."""

    first: int
    last: int
    types: Types

    def serves(self, schema: Schema) -> bool:
        """Whether onnxruntime takes the kernel for the operator of that opset.

        A kernel without an end serves only the operator it was written for: a newer one may mean something else.
        """
        return self.first == schema.since or (self.first < schema.since <= self.last and self.last != NEWEST)


class Registry:
    """The operators that a library knows.

    Attributes:
        label: what to call the library in a message.
        newest_opset: of the standard operators, that it takes.
        providers: those whose kernels are known.
    """

    label: str
    newest_opset: int
    providers: Sequence[str] = ()

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], dict[int, Schema]] = {}

    def versions(self, op: str, domain: str) -> Mapping[int, Schema]:
        """Return the operator's schemas by the opset they came with."""
        found = self._known.get((domain, op))
        if found is None:
            found = self._known[domain, op] = {schema.since: schema for schema in self._read(op, domain)}
        return found

    def _read(self, op: str, domain: str) -> Iterable[Schema]:
        raise NotImplementedError

    def schema(self, op: str, domain: str, opset: int) -> Schema | None:
        """Return the operator as that opset has it, None where it is not known or not yet."""
        known = self.versions(op, domain)
        since = max((version for version in known if version <= opset), default=None)
        return None if since is None else known[since]

    def kernels(self, op: str, domain: str, provider: str) -> Sequence[Kernel]:
        """Return the provider's kernels for an operator, of all opsets."""
        return ()

    def loads_without_kernel(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], provider: str
    ) -> bool:
        """Whether the runtime loads an operator that has no kernel: by casts, or by expanding its definition."""
        return False


class Standard(Registry):
    """The installed onnx."""

    label = "the installed onnx"
    newest_opset = defs.onnx_opset_version()

    def _read(self, op: str, domain: str) -> Iterator[Schema]:
        before = NEWEST
        with suppress(defs.SchemaError, TypeError):  # TypeError: a name that is no UTF-8 text comes as bytes
            while True:
                schema = _converted(defs.get_schema(op, before, domain))
                yield schema
                before = schema.since - 1


class Installed(Registry):
    """The onnxruntime of this environment. Raises ImportError where there is none, or it cannot be asked."""

    def __init__(self) -> None:
        super().__init__()
        self._runtime = import_module("onnxruntime")
        # A build with a provider whose libraries are absent (TensorRT's, say) does not fail when asked: it crashes.
        if set(self._runtime.get_available_providers()) - _HARMLESS:
            asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, check=False)
            if asked.returncode:
                raise ImportError("this onnxruntime cannot list its kernels without the libraries of its providers")
        state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        self.version: str = self._runtime.__version__
        self.label = f"onnxruntime {self.version}"
        self._tried: dict[bytes, bool] = {}
        self._schemas: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for schema in state.get_all_operator_schema():
            self._schemas[schema.domain, schema.name].append(schema)
        self._kernels: dict[tuple[str, str, str], list[Kernel]] = defaultdict(list)
        for kernel in state.get_all_opkernel_def():
            types = {name: frozenset(types) for name, types in kernel.type_constraints.items()}
            first, last = kernel.version_range
            self._kernels[kernel.domain, kernel.op_name, kernel.provider].append(Kernel(first, last, types))
        self.providers = sorted({provider for _, _, provider in self._kernels})

    def operators(self) -> list[tuple[str, str]]:
        """Return (domain, operator) of every schema."""
        return sorted(self._schemas)

    def kernels(self, op: str, domain: str, provider: str) -> Sequence[Kernel]:
        return self._kernels.get((domain, op, provider), ())

    @cached_property
    def newest_opset(self) -> int:  # type: ignore[override]
        newest = max(schema.since_version for found in self._schemas.values() for schema in found if not schema.domain)
        return next(
            opset
            for opset in range(newest, 0, -1)
            if self._loads(_single("Identity", "", opset, ["tensor(float)"], 1, {}))
        )

    def _read(self, op: str, domain: str) -> Iterable[Schema]:
        return map(_converted, self._schemas.get((domain, op), ()))

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
        super().__init__()
        data = json.loads(text)
        self.version: str = data["version"]
        self.label = f"onnxruntime {self.version}"
        self.newest_opset = data["newest_opset"]
        self._types: list[frozenset[str]] = [frozenset(types) for types in data["types"]]
        self._operators: dict[str, Any] = data["operators"]
        self.providers = sorted({name for entry in self._operators.values() for name in entry.get("kernels", ())})

    def _entry(self, op: str, domain: str, kind: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._operators.get(f"{domain}::{op}", {}).get(kind, {})
        return found

    def _read(self, op: str, domain: str) -> Iterator[Schema]:
        for since, fields in self._entry(op, domain, "schemas").items():
            read = {
                "inputs": [(name, kind) for name, kind in fields["inputs"]],
                "outputs": [(name, kind) for name, kind in fields["outputs"]],
                "types": self._named(fields["types"]),
                "defaults": {name: bytes.fromhex(value) for name, value in fields.get("defaults", {}).items()},
                "optional": frozenset(fields.get("optional", ())),
            }
            yield Schema(int(since), **{**fields, **read})

    def kernels(self, op: str, domain: str, provider: str) -> Sequence[Kernel]:
        found = self._entry(op, domain, "kernels").get(provider, ())
        return [Kernel(first, last or NEWEST, self._named(types)) for first, last, types in found]

    def loads_without_kernel(
        self, op: str, domain: str, opset: int, inputs: Sequence[int | None], provider: str
    ) -> bool:
        floating = {data_type for data_type in inputs if data_type in FLOATING}
        ranges = self._entry(op, domain, "loads").get(str(floating.pop()), ()) if len(floating) == 1 else ()
        return any(first <= opset <= last for first, last in ranges)

    def _named(self, types: Mapping[str, int]) -> Types:
        return {name: self._types[index] for name, index in types.items()}


class Listed(Registry):
    """Kernels that are written down: of a provider that is not installed, or of a runtime of the user's.

    Schemas are those of the libraries at hand. An operator that they do not know takes what its kernels take.

    Args:
        data: `label`, what to call it; `newest_opset`; `kernels`: operator, as in `com.microsoft::Gelu`, → a list of
            [first opset, last or 0 where there is none yet, {type variable or parameter: types}], the types as in
            "float float16", or as an index into a list `types`.
        provider: whose kernels they are.
    """

    def __init__(self, data: Mapping[str, Any], provider: str) -> None:
        super().__init__()
        self.label, self.newest_opset, self.providers = data["label"], data["newest_opset"], (provider,)
        sets = data.get("types", ())
        self._kernels = {
            operator.removeprefix("ai.onnx::"): [
                Kernel(
                    first,
                    last or NEWEST,
                    {name: _named(sets[t] if isinstance(t, int) else t) for name, t in own.items()},
                )
                for first, last, own in found
            ]
            for operator, found in data["kernels"].items()
        }

    def _read(self, op: str, domain: str) -> Iterable[Schema]:
        for known in (current(), standard()):
            if found := known.versions(op, domain):
                return found.values()
        anything = {"T": frozenset(_DATA_TYPES)}
        return [
            Schema(kernel.first, [("input", "T")], [("output", "T")], 0, 1, anything, variadic=True, mixed=True)
            for kernel in self.kernels(op, domain, "")
        ]

    def kernels(self, op: str, domain: str, provider: str) -> Sequence[Kernel]:
        return self._kernels.get(f"{domain}::{op}" if domain else op, ())


def _named(types: str) -> frozenset[str]:
    return frozenset(f"tensor({name})" for name in types.split())


def completed(schema: Schema, inputs: Sequence[int | None]) -> list[str]:
    """Return a type per input slot, "" for one that is left out; a required one of unknown type gets a likely one."""
    given = ["" if data_type is None else type_name(data_type) for data_type in inputs]
    # All of them, for onnxruntime aborts on definitions that read an optional input beyond the last one given.
    given += [""] * (max(len(schema.inputs) - schema.variadic, schema.required) - len(given))
    bound: dict[str, str] = {}
    for slot, kind in enumerate(given):
        formal = schema.parameter(slot)
        if kind and formal is not None:
            bound.setdefault(formal[1], kind)
    for slot in range(schema.required):
        formal = schema.parameter(slot)
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
def standard() -> Registry:
    """Return the registry of the installed onnx."""
    return Standard()


@cache
def current() -> Installed | Snapshot:
    """Return the installed onnxruntime's registry, the snapshot's where there is none."""
    try:
        return Installed()
    except ImportError:
        return snapshot()


@cache
def snapshot() -> Snapshot:
    """Return the registry that comes with this package."""
    return Snapshot((DATA / SNAPSHOT).read_text("utf-8"))


@cache
def cuda() -> Registry:
    """Return the registry with the kernels for CUDA: of the installed onnxruntime, else those written down."""
    if CUDA in current().providers:
        return current()
    return cuda_snapshot()


@cache
def cuda_snapshot() -> Listed:
    """Return the kernels for CUDA that come with this package."""
    return Listed(json.loads((DATA / CUDA_KERNELS).read_text("utf-8")), CUDA)


def _converted(schema: Any) -> Schema:
    """Return a schema as onnx or onnxruntime binds it, which call two things by other names, as ours."""

    def formal(parameters: Iterable[Any]) -> list[tuple[str, str]]:
        return [(each.name, each.type_str if hasattr(each, "type_str") else each.typeStr) for each in parameters]

    last = schema.inputs[-1] if schema.inputs else None
    encoded = {name: attribute._default_value for name, attribute in schema.attributes.items()}
    defaults = {name: value for name, value in encoded.items() if AttributeProto.FromString(value).name}
    return Schema(
        since=schema.since_version,
        inputs=formal(schema.inputs),
        outputs=formal(schema.outputs),
        required=schema.min_input,
        results=schema.min_output,
        types={each.type_param_str: frozenset(each.allowed_type_strs) for each in schema.type_constraints},
        deprecated=schema.deprecated,
        variadic=last is not None and last.option.name == "Variadic",
        mixed=last is not None and not getattr(last, "is_homogeneous", getattr(last, "isHomogeneous", True)),
        defaults=defaults,
        needed={k: a.type.name for k, a in schema.attributes.items() if a.required and k not in defaults},
        optional=frozenset(k for k, a in schema.attributes.items() if not a.required and k not in defaults),
    )
