"""Small models written node by node, and what must hold of every rewritten model.

    b = Build(opset=17)
    x = b.input("x", ["B", 4])
    model = b.model(b.mul(b.relu(x), 0.5))
    result = same(model, {"x": array})

`same` optimizes, and fails where the new model is not well formed, has another interface, is refused by onnxruntime, or
computes another thing than the old one; whether something was fused is for the test to say.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import fusion
from fusion.api import Result, library

FLOAT, HALF, DOUBLE, INT64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.BOOL,
)
FLOATS = {FLOAT: np.float32, HALF: np.float16, DOUBLE: np.float64}
TOLERANCE = {np.dtype(np.float16): 1e-2, np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-7}


class Build:
    """A graph under construction: every method adds a node and returns the name of its first output.

    A number or array as an operand becomes an initializer; `b.softmax(x, axis=-1)` adds a Softmax. An operator of
    com.microsoft is written with `domain="com.microsoft"`.

    Args:
        opset: of the standard operators.
        dtype: element type of numbers that stand as operands.
        names: "unique", "none" or "same" node names.
        prefix: before every value name; bodies need names of their own.
    """

    def __init__(self, opset: int = 17, dtype: int = FLOAT, *, names: str = "unique", prefix: str = "") -> None:
        self.opset, self.dtype, self.names, self.prefix = opset, dtype, names, prefix
        self.inputs: list[onnx.ValueInfoProto] = []
        self.tensors: list[TensorProto] = []
        self.nodes: list[NodeProto] = []
        self.count = 0

    def input(self, name: str, shape, dtype: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.dtype if dtype is None else dtype, shape))
        return name

    def constant(self, array, name: str | None = None) -> str:
        """An initializer; numbers and lists of floats take the element type of the graph."""
        if not isinstance(array, np.ndarray | np.generic):
            array = np.array(array)
            array = array.astype(FLOATS[self.dtype]) if array.dtype == np.float64 else array
        name = name or self.fresh("c")
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def number(self, value: float, shape=()) -> str:
        return self.constant(np.full(shape, value, FLOATS[self.dtype]))

    def fresh(self, hint: str) -> str:
        self.count += 1
        return f"{self.prefix}{hint}{self.count}"

    def node(self, op: str, *operands, output: str | None = None, outputs: int = 1, domain: str = "", **attributes):
        names = [self.operand(operand) for operand in operands]
        made = [output or self.fresh(op.lower())] + [self.fresh(op.lower()) for _ in range(outputs - 1)]
        label = {"unique": f"{op}_{made[0]}", "none": "", "same": "node"}[self.names]
        self.nodes.append(helper.make_node(op, names, made, name=label, domain=domain, **attributes))
        return made[0] if outputs == 1 else tuple(made)

    def operand(self, operand) -> str:
        if isinstance(operand, str):
            return operand
        if isinstance(operand, float | int):
            return self.number(float(operand))
        return self.constant(operand)

    def __getattr__(self, op: str):
        if op.startswith("_"):
            raise AttributeError(op)
        return lambda *operands, **attributes: self.node(OPERATORS[op], *operands, **attributes)

    # Operators whose form depends on the opset ------------------------------------------------------------------

    def mean(self, x: str, axes=(-1,), keepdims: int = 1) -> str:
        return self._reduce("ReduceMean", x, axes, keepdims, since=18)

    def sum(self, x: str, axes=(-1,), keepdims: int = 1) -> str:
        return self._reduce("ReduceSum", x, axes, keepdims, since=13)

    def max_over(self, x: str, axes=(-1,), keepdims: int = 1) -> str:
        return self._reduce("ReduceMax", x, axes, keepdims, since=18)

    def _reduce(self, op: str, x: str, axes, keepdims: int, since: int) -> str:
        if axes is None:
            return self.node(op, x, keepdims=keepdims)
        if self.opset >= since:
            return self.node(op, x, np.array(axes, np.int64), keepdims=keepdims)
        return self.node(op, x, axes=list(axes), keepdims=keepdims)

    def unsqueeze(self, x: str, axes) -> str:
        if self.opset >= 13:
            return self.node("Unsqueeze", x, np.array(axes, np.int64))
        return self.node("Unsqueeze", x, axes=list(axes))

    def reshape(self, x: str, dims) -> str:
        return self.node("Reshape", x, np.array(dims, np.int64))

    # Models -----------------------------------------------------------------------------------------------------

    def graph(self, *outputs, name: str = "g") -> GraphProto:
        """The graph; an output is a name, or (name, dtype, shape)."""
        made = []
        for output in outputs:
            name_, dtype, shape = output if isinstance(output, tuple) else (output, None, None)
            dtype = self.dtype if dtype is None else dtype
            made.append(helper.make_tensor_value_info(name_, dtype, shape))
        return helper.make_graph(self.nodes, name, self.inputs, made, self.tensors)

    def model(self, *outputs, functions=(), domains=()) -> ModelProto:
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in domains]
        model = helper.make_model(self.graph(*outputs), opset_imports=imports, functions=functions)
        model.ir_version = 10
        return model


WORDS = """
Add Sub Mul Div Neg Pow Sqrt Reciprocal Erf Tanh Sigmoid Relu MatMul Gemm Softmax Transpose Where IsNaN Cast Identity
Dropout Shape Max Min Expand Tile Gather Concat Slice Gelu Sum Abs Not Split Equal If Squeeze
"""
OPERATORS = {name.lower(): name for name in WORDS.split()}

# What must hold of every rewritten model --------------------------------------------------------------------------


def run(model: ModelProto, feeds) -> dict[str, np.ndarray]:
    """What onnxruntime computes, without rewrites of its own.

    The reference implementation stands in for kernels that onnxruntime lacks (Erf of doubles), which fusion cannot.
    """
    try:
        return _run(model, feeds)
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        evaluator = ReferenceEvaluator(model)
        return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def _run(model: ModelProto, feeds) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def well_formed(model: ModelProto) -> None:
    """Every name has one definition, before its uses; node names are unique where the model gave them."""
    check_graph(model.graph, set())
    for function in model.functions:
        check_nodes(function.node, set(function.input), set(function.output))
    imports = [opset.domain for opset in model.opset_import]
    assert len(imports) == len(set(imports)), "a domain is imported twice"
    used = {node.domain for node in model.graph.node}
    assert used <= {"", *imports}, f"{used} are used, {imports} imported"


def check_graph(graph: GraphProto, seen: set[str]) -> None:
    own = [value.name for value in graph.input]
    own += [tensor.name for tensor in graph.initializer if tensor.name not in own]
    assert len(own) == len(set(own)), "an input or initializer is there twice"
    tensors = [tensor.name for tensor in graph.initializer]
    assert len(tensors) == len(set(tensors)), "an initializer is there twice"
    check_nodes(graph.node, {*seen, *own}, {value.name for value in graph.output})


def check_nodes(nodes, defined: set[str], outputs: set[str]) -> None:
    for node in nodes:
        missing = [name for name in node.input if name and name not in defined]
        assert not missing, f"{node.op_type} {node.name!r} reads {missing} before it is there"
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                check_graph(attribute.g, defined)
        again = [name for name in node.output if name and name in defined]
        assert not again, f"{again} defined twice"
        defined |= {name for name in node.output if name}
    assert outputs <= defined, f"outputs without a producer: {outputs - defined}"


def same_interface(before: ModelProto, after: ModelProto) -> None:
    """Inputs and outputs have the same names, types and shapes in the same order."""
    for kind in ("input", "output"):
        old = [value.SerializeToString() for value in getattr(before.graph, kind)]
        new = [value.SerializeToString() for value in getattr(after.graph, kind)]
        assert old == new, f"another {kind}"


def equal(expected, got, tolerance: float | None = None) -> None:
    """Equal up to rounding, NaN and infinities at the same places."""
    assert expected.shape == got.shape
    assert expected.dtype == got.dtype
    bound = TOLERANCE.get(expected.dtype, 0.0) if tolerance is None else tolerance
    wide = expected.astype(np.float64) if expected.dtype.kind == "f" else expected
    finite = wide[np.isfinite(wide)] if wide.dtype.kind == "f" else wide.ravel()
    size = float(np.max(np.abs(finite))) if finite.size and wide.dtype.kind != "b" else 0.0
    np.testing.assert_allclose(got.astype(wide.dtype), wide, rtol=bound, atol=bound * max(size, 1e-3), equal_nan=True)


def same(model: ModelProto, feeds, *, tolerance: float | None = None, **options) -> Result:
    """Fuse, and check that the model that comes out is sound and computes the same on every feed.

    Simplified as well, the model must still compute the same, bit for bit; what is returned is fused alone.
    """
    feeds = feeds if isinstance(feeds, list) else [feeds]
    original = model.SerializeToString(deterministic=True)
    chosen = options.pop("patterns", None)
    fusions = [p for p in library().values() if options.get("target", "ort-cpu") in p.targets]
    result = fusion.optimize(model, patterns=fusions if chosen is None else chosen, **options)
    assert model.SerializeToString(deterministic=True) == original, "the model that came in was changed"
    well_formed(result.model)
    same_interface(model, result.model)
    computed = []
    for feed in feeds:
        before, after = run(model, feed), run(result.model, feed)
        assert list(before) == list(after)
        for name, expected in before.items():
            equal(expected, after[name], tolerance)
        computed.append(after)
    if not result.matches:
        assert result.model.SerializeToString(deterministic=True) == original, "nothing was fused, yet it changed"
    if chosen is None:
        whole = fusion.optimize(model, **options)
        assert whole.counts.items() >= result.counts.items(), "simplifying cost a fusion"
        simplified(model, whole.model, **options)
        for feed, expected in zip(feeds, computed, strict=True):
            bits(expected, run(whole.model, feed))
    return result


def simplified(before: ModelProto, after: ModelProto, **options) -> None:
    """A simplified model is well formed, has the same interface, and nothing more is done to it."""
    well_formed(after)
    same_interface(before, after)
    again = fusion.optimize(after, **options)
    assert again.counts == again.simplifications == {}
    assert again.model.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)


def bits(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
    """The same outputs, bit for bit."""
    assert list(expected) == list(got)
    for name, array in expected.items():
        assert (array.shape, array.dtype) == (got[name].shape, got[name].dtype)
        assert array.tobytes() == got[name].tobytes(), f"{name} differs"


def operators(model: ModelProto) -> Counter[str]:
    """How often each operator stands in the main graph."""
    return Counter(node.op_type for node in model.graph.node)


def numbers(*shape: int, seed: int = 0, dtype: int = FLOAT, scale: float = 1.0) -> np.ndarray:
    """Numbers around 0."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, FLOATS[dtype])


# Formulas ---------------------------------------------------------------------------------------------------------


def gelu(b: Build, x: str, output: str | None = None) -> str:
    """x / 2 (1 + erf(x / √2))."""
    inner = b.add(b.erf(b.div(x, 2.0**0.5)), 1.0)
    return b.mul(b.mul(x, inner), 0.5, **({"output": output} if output else {}))


def layer_norm(b: Build, x: str, scale=None, bias=None, eps: float = 1e-5, axes=(-1,)) -> str:
    """Layer normalization written out."""
    centred = b.sub(x, b.mean(x, axes))
    deviation = b.sqrt(b.add(b.mean(b.pow(centred, 2.0), axes), eps))
    result = b.div(centred, deviation)
    result = result if scale is None else b.mul(result, scale)
    return result if bias is None else b.add(result, bias)


def misses(result: Result, pattern: str) -> list[tuple[str, str]]:
    """Kind and sentence of what kept a pattern from being written."""
    return [(miss.kind, miss.text) for near in result.near_misses if near.pattern == pattern for miss in near.misses]
