"""Bad models: one sentence that names the file and the place; and models that only look bad."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from fusion.errors import ModelError
from fusion.models import wire
from fusion.models.model import load, save

FLOAT = TensorProto.FLOAT
GOOD = Path(__file__).parent / "models" / "distilbert__ts11_eager.onnx"


def model(*nodes: NodeProto, opset: int = 17, **imports: int) -> ModelProto:
    """x → y through the nodes."""
    infos = [helper.make_tensor_value_info(name, FLOAT, [2, 3]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", infos[:1], infos[1:])
    opsets = [helper.make_opsetid(domain, version) for domain, version in {"": opset, **imports}.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def node(op: str, inputs: str, outputs: str, domain: str = "", **attributes: object) -> NodeProto:
    name = f"{op.lower()}_{outputs.split()[0]}"
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, domain=domain, **attributes)


def error(source: object) -> str:
    with pytest.raises(ModelError) as caught:
        load(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- files that are no model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"hello, I am a text file, and quite a long one", "is not an ONNX file: give a binary .onnx model"),
        (b'{"irVersion": "8"}', "is not an ONNX file"),
        (bytes(range(255, 0, -1)) * 20, "is not an ONNX file"),
        (bytes(100), "is not an ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x18\x00\x00\x00ORTM" + bytes(100), "onnxruntime's own format"),
        (ModelProto(ir_version=8, producer_name="nobody").SerializeToString(), "is damaged: its fields do not decode"),
    ],
)
def test_a_file_that_is_no_model_is_told_apart(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{path} .*{expected}"):
        load(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert error(tmp_path / "none.onnx") == f"{tmp_path}/none.onnx cannot be read: No such file or directory"
    assert error(tmp_path).startswith(f"{tmp_path} is a folder: give the path of the .onnx file")


def test_a_truncated_file_is_called_truncated_wherever_it_ends(tmp_path: Path) -> None:
    whole = GOOD.read_bytes()
    path = tmp_path / "cut.onnx"
    for end in (len(whole) - 1, len(whole) // 2, len(whole) // 10, 60):
        path.write_bytes(whole[:end])
        message = error(path)
        assert message.startswith(f"{path} is truncated: at byte ")
        assert message.endswith("fetch or export it again")


def test_damaged_bytes_raise_nothing_but_model_errors() -> None:
    whole = GOOD.read_bytes()
    generator = random.Random(3)
    rejected = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 4, 30])):
            damaged[generator.randrange(len(damaged) if generator.random() < 0.5 else 4000)] = generator.randrange(256)
        try:
            load(bytes(damaged))
        except ModelError:
            rejected += 1
    assert 0 < rejected < 150


def test_nesting_beyond_protobufs_limit_is_damage(tmp_path: Path) -> None:
    content = b"\x52" + wire.varint(2000) + bytes(2000)  # a doc string, long enough to be looked into
    for _ in range(60):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # graph of an attribute, of a node, of a graph
            content = tag + wire.varint(len(content)) + content
    path = tmp_path / "deep.onnx"
    path.write_bytes(b"\x08\x08\x3a" + wire.varint(len(content)) + content)
    assert "is damaged: at byte" in error(path)


# -- models that the checker rejects ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        (model(node("Relv", "x", "y")), "No Op registered for Relv with domain_version of 17 (node 'relv_y', Relv)"),
        (model(node("Gelu", "x", "y")), "No Op registered for Gelu"),
        (model(node("Softmax", "x", "y", axis="last")), "Mismatched attribute type"),
        (model(node("Softmax", "x", "y", invented=1)), "Unrecognized attribute: invented"),
        (model(node("Concat", "x x", "y")), "Required attribute 'axis' is missing"),
        (model(node("Relu", "x x", "y")), "(node 'relu_y', Relu)"),
        (model(node("Relu", "x", "y"), node("Neg", "x", "y")), "single static assignment"),
    ],
)
def test_what_the_checker_says_becomes_one_sentence_with_the_place(proto: ModelProto, expected: str) -> None:
    message = error(proto)
    assert message.startswith("the model: onnx's checker rejects the model: ")
    assert expected in message


def test_a_value_that_nothing_defines() -> None:
    assert error(model(node("Add", "x nowhere", "y"))) == (
        "the model: graph: node 'add_y' reads 'nowhere', which no node, input or initializer defines"
    )


def test_an_opset_that_cannot_be(tmp_path: Path) -> None:
    assert "imports version -3" in error(model(node("Relu", "x", "y"), opset=-3))


def test_invalid_models_load_if_nobody_asks(tmp_path: Path) -> None:
    assert load(model(node("Relv", "x", "y")), validate=False).proto.graph.node[0].op_type == "Relv"


# -- order ------------------------------------------------------------------------------------------------------------


def test_a_cycle_is_named_node_by_node() -> None:
    ring = [node("Add", "x c", "a"), node("Relu", "a", "b"), node("Neg", "b", "c"), node("Abs", "c", "y")]
    assert error(model(*ring)) == (
        "the model: graph: the nodes form a cycle: 'add_a' → 'relu_b' → 'neg_c' → 'add_a'; "
        "no ONNX graph may, so export the model again"
    )


def test_a_cycle_of_one_node_without_a_name() -> None:
    loop = helper.make_node("Add", ["x", "y"], ["y"])
    assert "cycle: Add -> 'y' → Add -> 'y'" in error(model(loop))


def test_a_cycle_in_a_body_is_placed() -> None:
    body = helper.make_graph(
        [node("Add", "x q", "p"), node("Relu", "p", "q")], "b", [], [helper.make_tensor_value_info("q", FLOAT, None)]
    )
    test = node("Constant", "", "c", value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    branch = node("If", "c", "y", then_branch=body, else_branch=body)
    assert "body of 'if_y': the nodes form a cycle: 'add_p' → 'relu_q'" in error(model(test, branch))


def shuffled() -> ModelProto:
    return model(node("Neg", "c", "y"), node("Relu", "x", "b"), node("Abs", "b", "c"))


def test_nodes_out_of_order_are_put_in_order_and_mentioned() -> None:
    loaded = load(shuffled())
    assert [n.op_type for n in loaded.proto.graph.node] == ["Relu", "Abs", "Neg"]
    assert loaded.notes == ["its nodes were not in topological order: they were sorted"]
    onnx.checker.check_model(loaded.proto)


def test_nodes_out_of_order_stay_so_where_nothing_is_edited(tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(shuffled(), source)
    loaded = load(source)
    save(loaded, out)
    assert out.read_bytes() == source.read_bytes()
    loaded.proto.doc_string = "edited"
    save(loaded, out)
    assert [n.op_type for n in onnx.load(out).graph.node] == ["Relu", "Abs", "Neg"]


def test_a_node_moves_only_as_far_as_it_must() -> None:
    loose = [node("Relu", "x", f"r{i}") for i in range(3)]
    loaded = load(model(loose[0], node("Neg", "m", "y"), loose[1], node("Abs", "r1", "m"), loose[2]))
    assert [n.output[0] for n in loaded.proto.graph.node] == ["r0", "r1", "m", "y", "r2"]


def test_a_body_that_captures_a_later_value_moves_behind_it() -> None:
    body = helper.make_graph([node("Neg", "late", "o")], "b", [], [helper.make_tensor_value_info("o", FLOAT, None)])
    test = node("Constant", "", "c", value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    branch = node("If", "c", "y", then_branch=body, else_branch=body)
    loaded = load(model(test, branch, node("Relu", "x", "late")))
    assert [n.op_type for n in loaded.proto.graph.node] == ["Constant", "Relu", "If"]


def test_the_nodes_of_a_function_are_put_in_order() -> None:
    proto = model(node("F", "x", "y", domain="own"), own=1)
    nodes = [node("Neg", "b", "y"), node("Relu", "x", "b")]
    proto.functions.append(helper.make_function("own", "F", ["x"], ["y"], nodes, [helper.make_opsetid("", 17)]))
    assert [n.op_type for n in load(proto).proto.functions[0].node] == ["Relu", "Neg"]


# -- models that only look bad ----------------------------------------------------------------------------------------


def no_shape() -> ModelProto:
    proto = model(node("Relu", "x", "y"))
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    return proto


def no_types() -> ModelProto:
    proto = model(node("Relu", "x", "z"), node("Neg", "z", "y"))
    proto.graph.output[0].ClearField("type")
    proto.graph.value_info.add(name="z")
    return proto


def newer_format() -> ModelProto:
    proto = model(node("Relu", "x", "y"))
    proto.ir_version = 99
    return proto


@pytest.mark.parametrize(
    "proto",
    [
        model(node("SimplifiedLayerNormalization", "x x", "y")),
        model(node("LayerNormalization", "x x", "y"), opset=13),
        model(node("FastGelu", "x", "y", domain="com.microsoft"), **{"com.microsoft": 1}),
        model(node("FastGelu", "x", "y", domain="com.microsoft")),
        model(node("Custom", "x", "y", domain="somebody.else"), **{"somebody.else": 3}),
        no_shape(),
        no_types(),
        newer_format(),
    ],
    ids=["runtime operator", "early", "contrib", "no import", "custom", "no shape", "no types", "newer format"],
)
def test_what_runtimes_accept_is_accepted(proto: ModelProto) -> None:
    loaded = load(proto)
    assert loaded.notes == []
    assert loaded.proto == proto


def test_elided_weights_are_no_fault() -> None:
    proto = model(node("MatMul", "x w", "y"))
    proto.graph.initializer.append(helper.make_tensor("w", FLOAT, [3, 1000], bytes(12000), raw=True))
    assert load(proto).notes == []


def test_a_tensor_without_data_is_a_fault() -> None:
    proto = model(node("MatMul", "x w", "y"))
    proto.graph.initializer.add(name="w", data_type=FLOAT, dims=[3, 1000])
    assert "TensorProto (tensor name: w) should contain" in error(proto)
    assert load(proto, validate=False).proto == proto
