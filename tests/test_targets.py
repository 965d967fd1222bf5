"""What a target calls legal loads there, and what it refuses is refused: asked of the runtime itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

import fusion
from fusion import registry, targets
from fusion.errors import TargetError
from fusion.language import erf, pattern
from fusion.registry import NEWEST, Kernel, Schema
from fusion.targets import Target, add_target, target_named, target_names

ort = pytest.importorskip("onnxruntime")

MODELS = Path(__file__).parent / "models"
FLOAT, HALF, DOUBLE, BFLOAT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16
INT32, INT64, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
TYPES = (FLOAT, HALF, DOUBLE, BFLOAT, INT64, INT32, BOOL)

CPU = target_named("ort-cpu")
ONNX = target_named("onnx")
WRITTEN = Target("ort-cpu", "CPUExecutionProvider", registry.snapshot)

X, W = ["b", 4, 8], [8]
# (operator, domain, opset, shape per input with None for one left out, attributes)
OPERATORS: list[tuple[str, str, int, list[list[object] | None], dict[str, object]]] = [
    ("Add", "", 13, [X, X], {}),
    ("Relu", "", 13, [X], {}),
    ("Relu", "", 14, [X], {}),
    ("Erf", "", 13, [X], {}),
    ("Sqrt", "", 13, [X], {}),
    ("Softmax", "", 11, [X], {}),
    ("Softmax", "", 13, [X], {}),
    ("MatMul", "", 13, [["b", 4, 8], ["b", 8, 4]], {}),
    ("Gelu", "", 20, [X], {}),
    ("Gelu", "", 17, [X], {}),
    ("Mish", "", 18, [X], {}),
    ("HardSwish", "", 14, [X], {}),
    ("HardSwish", "", 22, [X], {}),
    ("Swish", "", 24, [X], {}),
    ("LayerNormalization", "", 11, [X, W], {}),
    ("LayerNormalization", "", 17, [X, W, W], {}),
    ("SimplifiedLayerNormalization", "", 11, [X, W], {}),
    ("RMSNormalization", "", 23, [X, W], {}),
    ("RMSNormalization", "", 22, [X, W], {}),
    ("GroupNormalization", "", 21, [["b", 8, 4], W, W], {"num_groups": 2}),
    ("GlobalLpPool", "", 22, [["b", 4, 8, 8]], {}),
    ("GlobalLpPool", "", 21, [["b", 4, 8, 8]], {}),
    ("Attention", "", 23, [["b", 2, 4, 8]] * 3, {}),
    ("Attention", "", 25, [["b", 2, 4, 8]] * 3, {}),
    ("Gelu", "com.microsoft", 1, [X], {}),
    ("FastGelu", "com.microsoft", 1, [X], {}),
    ("FastGelu", "com.microsoft", 1, [X, W], {}),
    ("QuickGelu", "com.microsoft", 1, [X], {}),
    ("BiasGelu", "com.microsoft", 1, [X, W], {}),
    ("FusedMatMul", "com.microsoft", 1, [["b", 4, 8], ["b", 8, 4]], {}),
    ("SkipLayerNormalization", "com.microsoft", 1, [X, X, W], {}),
    ("SkipLayerNormalization", "com.microsoft", 1, [X, X, W, None, W], {}),
    ("SkipSimplifiedLayerNormalization", "com.microsoft", 1, [X, X, W], {}),
    ("MultiHeadAttention", "com.microsoft", 1, [X, X, X], {"num_heads": 2}),
    ("Attention", "com.microsoft", 1, [X, [8, 24], [24]], {"num_heads": 2}),
    ("NoSuchOperator", "com.microsoft", 1, [X], {}),
]


def loads(
    op: str, domain: str, opset: int, data_type: int, shapes: list[list[object] | None], attributes: dict
) -> bool:
    """Whether onnxruntime takes a model of this one node."""
    names = ["" if shape is None else f"in{slot}" for slot, shape in enumerate(shapes)]
    node = helper.make_node(op, names, ["out"], domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(n, data_type, s) for n, s in zip(names, shapes, strict=True) if s is not None
    ]
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info("out")])
    imports = [helper.make_opsetid("", 17 if domain else opset)]
    imports += [helper.make_opsetid(domain, opset)] if domain else []
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


@pytest.mark.parametrize("case", OPERATORS, ids=lambda c: f"{c[1]}{'::' if c[1] else ''}{c[0]}-{c[2]}-{len(c[3])}")
def test_legal_is_what_the_runtime_loads(case: tuple) -> None:
    op, domain, opset, shapes, attributes = case
    for data_type in TYPES:
        inputs = [None if shape is None else data_type for shape in shapes]
        refused = CPU.refuses(op, domain, opset, inputs)
        really = loads(op, domain, opset, data_type, shapes, attributes)
        assert (refused is None) == really, f"{TensorProto.DataType.Name(data_type)}: {refused}"


@pytest.mark.parametrize("case", OPERATORS, ids=lambda c: f"{c[1]}{'::' if c[1] else ''}{c[0]}-{c[2]}-{len(c[3])}")
@pytest.mark.skipif(ort.__version__ != registry.snapshot().version, reason="the snapshot is of another onnxruntime")
def test_the_snapshot_says_what_the_runtime_says(case: tuple) -> None:
    op, domain, opset, shapes, _ = case
    for data_type in TYPES:
        inputs = [None if shape is None else data_type for shape in shapes]
        assert WRITTEN.refuses(op, domain, opset, inputs) == CPU.refuses(op, domain, opset, inputs)
        assert WRITTEN.route(op, domain, opset, inputs) == CPU.route(op, domain, opset, inputs)


@pytest.mark.skipif(ort.__version__ != registry.snapshot().version, reason="the snapshot is of another onnxruntime")
def test_the_snapshot_is_what_its_tool_writes() -> None:
    tool = snapshot_tool()
    assert tool.snapshot(registry.Installed()) == tool.PACKAGED.read_text("utf-8")


def snapshot_tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "snapshot_kernels.py"
    spec = importlib.util.spec_from_file_location("snapshot_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_listed_kernels_say_what_the_provider_says() -> None:
    """Written down and read again, those of the CPU: the same way as those for CUDA."""
    text = snapshot_tool().listed(registry.Installed(), "CPUExecutionProvider")
    listed = Target("listed", "CPUExecutionProvider", lambda: registry.Listed(json.loads(text), "CPUExecutionProvider"))
    for op, domain, opset, shapes, _ in OPERATORS:
        for data_type in TYPES:
            inputs = [None if shape is None else data_type for shape in shapes]
            route = CPU.route(op, domain, opset, inputs)
            assert listed.route(op, domain, opset, inputs) == (route if route == "kernel" else None), (op, data_type)


def test_without_onnxruntime_the_snapshot_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(registry, "import_module", missing)
    registry.current.cache_clear()
    try:
        assert registry.current() is registry.snapshot()
        assert "ort-cpu" in target_names()
        assert target_named("ort-cpu").refuses("BiasGelu", "com.microsoft", 1, [FLOAT, FLOAT]) is None
        skip = registry.current().schema("SkipLayerNormalization", "com.microsoft", 1)
        assert skip is not None
        assert onnx.AttributeProto.FromString(skip.defaults["epsilon"]).f == pytest.approx(1e-12)
    finally:
        registry.current.cache_clear()


# -- how, and why not -------------------------------------------------------------------------------------------------


def test_the_route_says_whether_there_is_a_kernel() -> None:
    assert CPU.route("Gelu", "", 20, [FLOAT]) == "kernel"
    assert CPU.route("Swish", "", 24, [FLOAT]) == "expanded"
    assert CPU.route("FusedMatMul", "com.microsoft", 1, [HALF, HALF]) == "expanded"  # in float32, between casts
    assert CPU.route("Erf", "", 13, [DOUBLE]) is None
    assert ONNX.route("Swish", "", 24, [FLOAT]) == "standard"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (("Gelu", "", 17, [FLOAT]), "Gelu comes with opset 20, and the model imports 17"),
        (("BatchNormalization", "", 0, [FLOAT]), "BatchNormalization comes with opset 1, and the model imports 0"),
        (("Relu", "", 13, [INT64]), "Relu (opset 13) does not take int64 for X, only bfloat16, double, float, float16"),
        (("Add", "", 14, [FLOAT, HALF]), "Add needs one type for A and B, not float and float16"),
        (("Add", "", 14, [FLOAT, FLOAT], HALF), "Add needs one type for A and C, not float and float16"),
        (("Add", "", 14, [FLOAT]), "Add needs 2 inputs, not 1"),
        (("Relu", "", 14, [FLOAT, FLOAT]), "Relu (opset 14) does not take 2 inputs"),
        (("Upsample", "", 10, [FLOAT, FLOAT]), "Upsample is deprecated at opset 10"),
    ],
)
def test_reasons_of_the_schema_are_sentences(asked: tuple, reason: str) -> None:
    assert CPU.refuses(*asked) == reason
    assert ONNX.refuses(*asked) == reason


def test_reasons_of_the_runtime_are_sentences() -> None:
    version = ort.__version__
    assert CPU.refuses("Erf", "", 13, [DOUBLE]) == (
        f"onnxruntime {version} has no CPU kernel for Erf (opset 13) with double"
    )
    assert (
        CPU.refuses("Nope", "com.microsoft", 1, [FLOAT]) == f"onnxruntime {version} does not know com.microsoft::Nope"
    )
    assert "is newer than onnxruntime" in str(CPU.refuses("Relu", "", CPU.newest_opset + 1, [FLOAT]))


def test_the_newest_opset_loads_and_the_next_does_not() -> None:
    assert loads("Identity", "", CPU.newest_opset, FLOAT, [X], {})
    assert not loads("Identity", "", CPU.newest_opset + 1, FLOAT, [X], {})


def test_the_standard_knows_no_runtimes_operators() -> None:
    assert ONNX.refuses("Gelu", "com.microsoft", 1, [FLOAT]) == "the installed onnx does not know com.microsoft::Gelu"
    assert ONNX.refuses("SimplifiedLayerNormalization", "", 17, [FLOAT, FLOAT]) == (
        "the installed onnx does not know SimplifiedLayerNormalization"
    )
    assert ONNX.refuses("LayerNormalization", "", 16, [FLOAT, FLOAT]) is not None
    assert ONNX.refuses("Erf", "", 13, [DOUBLE]) is None
    assert ONNX.newest_opset == onnx.defs.onnx_opset_version()
    assert "is newer than the installed onnx" in str(ONNX.refuses("Relu", "", ONNX.newest_opset + 1, [FLOAT]))


def test_unknown_types_and_inputs_left_out_do_not_matter() -> None:
    assert CPU.refuses("SkipLayerNormalization", "com.microsoft", 1, [FLOAT, None, FLOAT, None, FLOAT]) is None
    assert CPU.refuses("Add", "ai.onnx", 14, [None, None]) is None


def test_inputs_that_repeat_may_be_many_and_of_their_own_types() -> None:
    assert CPU.refuses("Concat", "", 13, [FLOAT] * 9) is None
    assert CPU.refuses("Concat", "", 13, [FLOAT] * 8 + [HALF]) is not None
    assert CPU.refuses("Loop", "", 16, [INT64, BOOL, FLOAT, INT64]) is None


# -- CUDA, as written down ---------------------------------------------------------------------------------------------

CUDA = target_named("ort-cuda")


def test_kernels_for_cuda_are_known_without_cuda() -> None:
    assert CUDA.route("BiasGelu", "com.microsoft", 1, [HALF, HALF]) == "kernel"
    assert CUDA.route("LayerNormalization", "", 17, [HALF, HALF]) == "kernel"
    assert CUDA.route("Attention", "", 24, [BFLOAT] * 3) == "kernel"
    assert "has no CUDA kernel for Swish" in str(CUDA.refuses("Swish", "", 24, [FLOAT]))
    assert "has no CUDA kernel for GroupQueryAttention" in str(
        CUDA.refuses("GroupQueryAttention", "com.microsoft", 1, [FLOAT] * 5 + [INT32] * 2)
    )


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_what_is_written_for_cuda_computes_the_same(path: Path) -> None:
    """On the CPU, by the kernels that the same operators have there."""
    result = fusion.optimize(path, target="ort-cuda")
    assert fusion.verify(path, result.model, runs=2).equal
    written = [operator for match in result.matches for operator in match.operators]
    assert result.counts == fusion.optimize(path).counts, written


def test_a_build_that_crashes_when_asked_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess[bytes]([], -11)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(registry.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ImportError, match="without the libraries"):
        registry.Installed()


# -- targets of others ------------------------------------------------------------------------------------------------

NPU = {
    "label": "the NPU's compiler 2.1",
    "newest_opset": 21,
    "types": ["float float16"],
    "kernels": {
        "LayerNormalization": [[17, 0, {"T": "float"}]],
        "Gelu": [[20, 0, {"T": 0}]],
        "npu::Erf": [[1, 0, {"T": 0}]],
    },
}


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(targets, "_targets", dict(targets._targets))
    return add_target("npu", NPU, like="onnx")


def test_a_target_is_data(npu: Target, tmp_path: Path) -> None:
    assert target_named("npu") is npu
    assert npu.newest_opset == 21
    assert npu.route("LayerNormalization", "", 17, [FLOAT, FLOAT]) == "kernel"
    assert npu.refuses("LayerNormalization", "", 17, [HALF, HALF]) == (
        "the NPU's compiler 2.1 has no npu kernel for LayerNormalization (opset 17) with float16"
    )
    assert npu.refuses("Erf", "npu", 1, [HALF]) is None
    assert npu.refuses("Erf", "npu", 1, [DOUBLE]) is not None
    assert npu.refuses("Tanh", "npu", 1, [HALF]) == "the NPU's compiler 2.1 does not know npu::Tanh"
    (tmp_path / "npu.json").write_text(json.dumps(NPU))
    assert add_target("npu", tmp_path / "npu.json").route("Erf", "npu", 1, [HALF]) == "kernel"


def test_patterns_are_written_for_it(npu: Target) -> None:
    @pattern(x="...")
    def twice(x):
        return erf(erf(x))

    @twice.emit("npu")
    def _(found, op):
        return op.of("npu").Erf(found.x)

    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[n] x) => (float[n] y) { e = Erf(x) y = Erf(e) }""")
    result = fusion.optimize(model, target="npu", patterns=[twice])
    assert [(node.domain, node.op_type) for node in result.model.graph.node] == [("npu", "Erf")]
    assert {opset.domain: opset.version for opset in result.model.opset_import} == {"": 17, "npu": 1}


def test_it_takes_the_emissions_of_the_target_it_is_like(npu: Target) -> None:
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]> g (float[n] x) => (float[n] y)
        <float root = {1.41421356}, float one = {1}, float half = {0.5}>
        { d = Div (x, root) e = Erf (d) a = Add (e, one) m = Mul (x, a) y = Mul (m, half) }""")
    assert fusion.optimize(model, target="npu").matches[0].operators == ("Gelu",)


def test_a_target_may_come_with_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_targets", dict(targets._targets))
    plugin = SimpleNamespace(load=lambda: add_target("npu", NPU))
    monkeypatch.setattr(targets, "entry_points", lambda group: [plugin] if group == targets.PLUGINS else [])
    assert target_named("npu").name == "npu"


@pytest.mark.parametrize(
    "data", [{}, {**NPU, "kernels": {"Erf": [[1]]}}, {**NPU, "kernels": {"Erf": [[1, 0, {"T": 7}]]}}]
)
def test_data_that_cannot_be_read_is_refused(data: dict) -> None:
    with pytest.raises(TargetError, match="the kernels of the target 'broken' cannot be read"):
        add_target("broken", data)
    with pytest.raises(TargetError, match="'ort-cup' is unknown"):
        add_target("broken", NPU, like="ort-cup")


# -- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_target_is_answered_with_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"'ort-cup' is unknown; did you mean 'ort-cpu'\? There are onnx, ort-cpu"):
        target_named("ort-cup")
    with pytest.raises(TargetError, match=r"'zzz' is unknown\. There are onnx"):
        target_named("zzz")


# -- versions of kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "since", "expected"),
    [(7, 12, 7, True), (7, 12, 9, True), (7, 12, 13, False), (13, NEWEST, 13, True), (13, NEWEST, 14, False)],
)
def test_a_kernel_without_an_end_serves_only_its_own_opset(first: int, last: int, since: int, expected: bool) -> None:
    schema = Schema(since, (), (), 0, 0, {})
    assert Kernel(first, last, {}).serves(schema) == expected
