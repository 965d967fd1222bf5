"""Newer opsets: what is converted computes the same, and what is not known to is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import fusion
from fusion.errors import TargetError
from fusion.models.model import Model

MODELS = Path(__file__).parent / "models"


def model(body: str, inputs: str = "float[a, 4, b] x", outputs: str = "y", *, opset: int = 11, weights: str = ""):
    """A model in text form, of which the outputs are floats unless they say otherwise."""
    typed = ", ".join(part if "[" in part or " " in part else f"float {part}" for part in outputs.split("; "))
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({typed}) {weights} {{ {body} }}'
    made = onnx.parser.parse_model(text)
    for output in made.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(made)


def converted(source, opset: int = 23, **options) -> fusion.api.Result:
    return fusion.optimize(source, target="onnx", opset=opset, patterns=[], **options)


def opset_of(proto: onnx.ModelProto) -> int:
    return {imported.domain: imported.version for imported in proto.opset_import}[""]


STEPS = {
    "softmax in the middle": model("y = Softmax<axis=1>(x)"),
    "softmax by default": model("y = Softmax(x)"),
    "softmax at the end": model("y = Softmax<axis=2>(x)"),
    "softmax from the end": model("y = Softmax<axis=-1>(x)"),
    "softmax from the end, in the middle": model("y = Softmax<axis=-2>(x)"),
    "log softmax": model("y = LogSoftmax<axis=1>(x)"),
    "mean": model("y = ReduceMean<axes=[-1]>(x)"),
    "mean without keeping": model("y = ReduceMean<axes=[0,2],keepdims=0>(x)"),
    "mean of all": model("y = ReduceMean(x)"),
    "sum": model("y = ReduceSum<axes=[1],keepdims=0>(x)"),
    "norms": model("a = ReduceL2<axes=[2]>(x) b = ReduceMax<axes=[2]>(x) y = Add(a, b)"),
    "unsqueeze": model("y = Unsqueeze<axes=[0,2]>(x)"),
    "unsqueeze at the end": model("y = Unsqueeze<axes=[-1]>(x)"),
    "squeeze": model("y = Squeeze<axes=[1]>(x)", "float[a, 1, b] x"),
    "squeeze of all": model("y = Squeeze(x)", "float[3, 1, 2] x"),
    "split": model("y, z = Split<axis=1,split=[1,3]>(x)", outputs="y; z"),
    "split in two": model("y, z = Split<axis=1>(x)", outputs="y; z"),
    "split in two at 13": model("y, z = Split<axis=1>(x)", outputs="y; z", opset=13),
    "split by sizes at 13": model("y, z = Split<axis=1>(x, s)", outputs="y; z", opset=13, weights="<int64[2] s={1,3}>"),
    "dropout": model("y = Dropout<ratio=0.3>(x)"),
    "clip": model("y = Clip<min=-0.5,max=0.25>(x)", opset=10),
    "clip by default": model("y = Clip<max=0.25>(x)", opset=10),
    "clip at 11": model("y = Clip(x, low)", weights="<float low={0.}>"),
    "slice": model("y = Slice<starts=[0,1],ends=[9,-1],axes=[0,1]>(x)", opset=9),
    "slice without axes": model("y = Slice<starts=[0,1],ends=[9,3]>(x)", opset=9),
    "top k": model("y, z = TopK<k=2,axis=1>(x)", outputs="y; int64 z", opset=9),
    "batch normalization": model(
        "y = BatchNormalization(x, s, s, s, s)", opset=9, weights="<float[4] s={1.,2.,3.,4.}>"
    ),
    "cast and shape": model("s = Shape(x) y = Cast<to=1>(s)"),
    "pad": model("y = Pad(x, p)", weights="<int64[6] p={0,1,0,0,0,2}>"),
    "erf": model("y = Erf(x)"),
    "average pool": model("y = AveragePool<kernel_shape=[2],ceil_mode=1>(x)", "float[a, 4, 7] x"),
    "gather": model("y = Gather<axis=1>(x, i)", weights="<int64[2] i={0,-1}>"),
    "in a body": model(
        """y = If (c) <then_branch = t () => (float[p, 4, q] v) { v = ReduceMean<axes=[-1]>(x) },
                       else_branch = e () => (float[p, 4, q] w) { w = Softmax<axis=1>(x) }>""",
        "float[a, 4, b] x, bool c",
    ),
}


@pytest.mark.parametrize("opset", [13, 18, 21, 23, 25])
@pytest.mark.parametrize("name", STEPS)
def test_what_is_converted_computes_the_same(name: str, opset: int) -> None:
    source = STEPS[name]
    result = converted(source, opset)
    assert not result.notes
    assert opset_of(result.model) == max(opset, opset_of(source))
    onnx.checker.check_model(result.model, full_check=True)
    report = fusion.verify(source, result.model, runs=4)
    assert report.equal, report.differences


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (model('y = Upsample<mode="nearest">(x, s)', opset=9, weights="<float[3] s={1.,1.,1.5}>"), "Upsample"),
        (model('y = Resize<mode="nearest">(x, s)', opset=10, weights="<float[3] s={1.,1.,1.5}>"), "Resize"),
        (model("y = LayerNormalization(x, s)", "float[a, 4, 4] x", weights="<float[4] s={1.,2.,3.,4.}>"), "LayerNorm"),
        (model("y = Add<axis=0,broadcast=1>(x, s)", opset=6, weights="<float[4] s={1.,2.,3.,4.}>"), "below opset 7"),
        (model("y = Hardmax<axis=1>(x)"), "Hardmax"),
        (model("y = Erf(x)", opset=24), "opset 23 is older"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_to_be_sound_stays(source: onnx.ModelProto, reason: str) -> None:
    result = converted(source)
    assert result.model == source
    assert len(result.notes) == 1
    assert result.notes[0].startswith(f"the model stays at opset {opset_of(source)}: ")
    assert reason in result.notes[0]


def test_an_opset_that_the_target_does_not_take_is_an_error() -> None:
    with pytest.raises(TargetError, match="opset 999 is newer than onnx takes"):
        converted(STEPS["erf"], 999)


def test_the_opset_a_model_has_changes_nothing() -> None:
    assert converted(STEPS["erf"], 11).model == STEPS["erf"]


def test_other_domains_names_and_metadata_stay() -> None:
    source = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 11, "com.microsoft": 1]>
        g (float[a, 4, b] x) => (float[a, 4, 1] y)
        { z = com.microsoft.FastGelu(x) y = ReduceMean<axes=[-1]>(z) }""")
    source.graph.node[1].name = "mean"
    source.graph.node[1].metadata_props.add(key="from", value="here")
    made = converted(source).model
    assert made.graph.node[0] == source.graph.node[0]
    assert (made.graph.node[1].name, made.graph.node[1].metadata_props[0].value) == ("mean", "here")
    assert {i.domain: i.version for i in made.opset_import} == {"": 23, "com.microsoft": 1}


def test_functions_are_converted_with_the_model() -> None:
    source = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 12, "own": 1]>
        g (float[a, 4, b] x) => (float[a, 4, b] y) { y = own.soft(x) }
        <domain: "own", opset_import: ["": 12]> soft (x) => (y) { m = ReduceMean<axes=[-1]>(x) y = Sub(x, m) }""")
    made = converted(source, 18).model
    assert [i.version for i in made.functions[0].opset_import if not i.domain] == [18]
    assert not made.functions[0].node[-2].attribute
    assert fusion.verify(source, made, runs=3).equal


def test_attributes_that_are_parameters_are_not_converted() -> None:
    source = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 12, "own": 1]>
        g (float[a, 4, b] x) => (float[a, 4, c] y) { y = own.mean<axes=[2]>(x) }
        <domain: "own", opset_import: ["": 12]> mean <axes> (x) => (y) { y = ReduceMean<axes: ints = @axes>(x) }""")
    assert "parameters of a function" in converted(source, 18).notes[0]


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = onnx.numpy_helper.from_array(np.arange(4096, dtype=np.float32).reshape(4, 1024), "w")
    source = model("m = MatMul(x, w) y = ReduceMean<axes=[-1]>(m)", "float[a, 4] x")
    source.graph.initializer.append(rows)
    onnx.save(source, tmp_path / "in.onnx")
    array = Model.array
    read: list[str] = []
    monkeypatch.setattr(Model, "array", lambda self, tensor: read.append(tensor.name) or array(self, tensor))
    converted(tmp_path / "in.onnx", destination=tmp_path / "out.onnx")
    assert "w" not in read
    assert onnx.load(tmp_path / "out.onnx").graph.initializer[0] == rows
    assert fusion.verify(tmp_path / "in.onnx", tmp_path / "out.onnx", runs=2).equal


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_exports_are_converted(path: Path) -> None:
    result = converted(path)
    assert opset_of(result.model) == 23
    assert fusion.verify(path, result.model, runs=2).equal


def test_a_newer_opset_lets_operators_of_the_standard_be_fused() -> None:
    path = MODELS / "whisper_encoder__ts17_eager.onnx"
    assert fusion.optimize(path, target="onnx").counts == {}
    result = fusion.optimize(path, target="onnx", opset=23)
    assert result.counts == {"gelu": 4, "multi_head_attention": 2}
    assert fusion.verify(path, result.model, runs=2).equal
