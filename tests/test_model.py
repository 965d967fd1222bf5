"""A model in, the same model out; weights are read and written only when someone asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon
import onnx_ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fusion.errors import ModelError, OutputError
from fusion.models import wire
from fusion.models.model import load, save

MODELS = sorted((Path(__file__).parent / "models").glob("*.onnx"))
FLOAT = TensorProto.FLOAT


def weights(name: str, *shape: int, seed: int = 0) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name)


def model(*initializers: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> ModelProto:
    """x (2, 32) → y, through the given nodes."""
    nodes = nodes or [helper.make_node("Identity", ["x"], ["y"], name="only")]
    infos = [helper.make_tensor_value_info(name, FLOAT, [2, 32]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], initializer=list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def large_and_small() -> ModelProto:
    return model(weights("large", 32, 32), weights("small", 4))


def stored(proto: ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def tensor_without_data(**fields: object) -> bytes:
    data: bytes = TensorProto(**fields).SerializeToString()  # type: ignore[arg-type]
    return data


def with_tensor(content: bytes) -> bytes:
    """A model whose graph has one more initializer, of these bytes."""
    proto = model()
    graph: bytes = proto.graph.SerializeToString() + b"\x2a" + wire.varint(len(content)) + content
    proto.ClearField("graph")
    whole: bytes = proto.SerializeToString() + b"\x3a" + wire.varint(len(graph)) + graph
    return whole


# -- no edit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_without_an_edit_the_file_is_byte_for_byte_the_source(path: Path, tmp_path: Path) -> None:
    save(load(path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def test_odd_bytes_that_mean_the_same_survive(tmp_path: Path) -> None:
    """Elements written one by one, fields out of order and unknown ones: other writers have other habits."""
    elements = b"".join(b"\x25" + np.float32(value).tobytes() for value in range(400))
    content = elements + tensor_without_data(name="w", data_type=FLOAT, dims=[400]) + b"\xc2\x3e\x03abc"
    source = tmp_path / "in.onnx"
    source.write_bytes(with_tensor(content) + b"\xc2\x3e\x02hi")
    loaded = load(source)
    assert list(loaded.array(loaded.proto.graph.initializer[0])) == list(range(400))
    save(loaded, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


def test_a_model_proto_comes_back_equal_and_is_left_alone() -> None:
    proto = large_and_small()
    before = proto.SerializeToString()
    loaded = load(proto)
    loaded.proto.doc_string = "edited"
    assert proto.SerializeToString() == before
    assert load(proto).export() == proto


def test_bytes_come_back_as_they_were() -> None:
    data = large_and_small().SerializeToString()
    assert load(data).export() == data


# -- edits ------------------------------------------------------------------------------------------------------------


def test_an_edit_changes_what_was_edited_and_nothing_else(tmp_path: Path) -> None:
    proto = large_and_small()
    proto.metadata_props.add(key="author", value="someone")
    proto.graph.quantization_annotation.add(tensor_name="large").quant_parameter_tensor_names.add(key="k", value="v")
    proto.graph.doc_string = "a graph"
    proto.training_info.add().algorithm.node.append(helper.make_node("Relu", ["x"], ["z"]))
    values, indices = weights("sparse", 2), numpy_helper.from_array(np.array([1, 3], np.int64), "sparse_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [32]))
    source = tmp_path / "in.onnx"
    source.write_bytes(proto.SerializeToString() + b"\xc2\x3e\x02hi")  # field 1000, which no onnx knows
    loaded = load(source)
    loaded.proto.producer_name = "us"
    save(loaded, tmp_path / "out.onnx")
    expected = onnx.load(source)
    expected.producer_name = "us"
    assert onnx.load(tmp_path / "out.onnx") == expected
    assert b"\xc2\x3e\x02hi" in (tmp_path / "out.onnx").read_bytes()


def test_putting_the_shell_together_again_loses_nothing(tmp_path: Path) -> None:
    for path in MODELS:
        loaded = load(path)
        loaded.unedited = b""
        save(loaded, tmp_path / "out.onnx")
        assert onnx.load(tmp_path / "out.onnx") == onnx.load(path)


def test_weights_that_move_keep_their_data() -> None:
    loaded = load(model(weights("a", 32, 32, seed=1), weights("b", 32, 32, seed=2)))
    initializers = loaded.proto.graph.initializer
    copies = [TensorProto(), TensorProto()]
    for copy, original in zip(copies, reversed(initializers), strict=True):
        copy.CopyFrom(original)
    copies[0].name = "renamed"
    del initializers[:]
    initializers.extend(copies)
    first, second = load(loaded.to_proto()).proto.graph.initializer
    assert (first.name, second.name) == ("renamed", "a")
    complete = loaded.to_proto().graph.initializer
    assert complete[0].raw_data == weights("b", 32, 32, seed=2).raw_data
    assert complete[1].raw_data == weights("a", 32, 32, seed=1).raw_data


def test_weights_of_a_model_that_is_gone_are_not_taken_for_others() -> None:
    loaded = load(large_and_small())
    stray = TensorProto()
    stray.CopyFrom(loaded.proto.graph.initializer[0])
    del loaded
    with pytest.raises(ModelError, match="'large' belongs to a model that is no longer loaded"):
        load(large_and_small()).array(stray)


def test_onnx_own_tools_carry_elided_weights_along() -> None:
    loaded = load(large_and_small())
    loaded.proto.CopyFrom(onnx.version_converter.convert_version(loaded.proto, 21))
    assert loaded.to_proto().graph.initializer[0].raw_data == weights("large", 32, 32).raw_data


# -- the shell --------------------------------------------------------------------------------------------------------


def test_large_payloads_are_not_in_the_shell_and_small_ones_are() -> None:
    large, small = load(large_and_small()).proto.graph.initializer
    assert not large.raw_data
    assert list(large.dims) == [32, 32]
    assert small.raw_data == weights("small", 4).raw_data


def nested(where: str) -> tuple[ModelProto, np.ndarray]:
    """A model with a large tensor in an unusual place."""
    tensor = weights("w", 32, 32)
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    use = helper.make_node("MatMul", ["x", "w"], ["y"])
    if where == "constant":
        return model(nodes=[constant, use]), numpy_helper.to_array(tensor)
    if where == "body":
        out = helper.make_tensor_value_info("y_in", FLOAT, None)
        use.output[0] = "y_in"
        bodies = [helper.make_graph([use], "b", [], [out], initializer=[tensor]) for _ in range(2)]
        test = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
        branch = helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
        return model(nodes=[test, branch]), numpy_helper.to_array(tensor)
    proto = model(nodes=[helper.make_node("F", ["x"], ["y"], domain="own")])
    imports = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("own", "F", ["x"], ["y"], [constant, use], imports))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    return proto, numpy_helper.to_array(tensor)


@pytest.mark.parametrize("where", ["constant", "body", "function"])
def test_weights_are_elided_wherever_they_are(where: str, tmp_path: Path) -> None:
    proto, expected = nested(where)
    loaded = load(stored(proto, tmp_path / "in.onnx"))
    assert loaded.proto.ByteSize() < proto.ByteSize() - expected.nbytes // 2
    loaded.unedited = b""
    save(loaded, tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == proto


BITS = {  # element type → (bytes that repeat, the values they stand for), by the definition of each format
    TensorProto.FLOAT16: (b"\x00\x3c\x00\xc0", [1.0, -2.0]),
    TensorProto.BFLOAT16: (b"\x80\x3f\x00\xc0", [1.0, -2.0]),
    TensorProto.FLOAT8E4M3FN: (b"\x38\xc0", [1.0, -2.0]),
    TensorProto.FLOAT8E5M2: (b"\x3c\xc0", [1.0, -2.0]),
    TensorProto.DOUBLE: (b"\0\0\0\0\0\0\xf0\x3f", [1.0]),
    TensorProto.INT64: (b"\xff" * 8, [-1]),
    TensorProto.BOOL: (b"\x01\x00", [True, False]),
    TensorProto.INT4: (b"\xf1\x28", [1, -1, -8, 2]),
    TensorProto.UINT4: (b"\xf1\x28", [1, 15, 8, 2]),
}


@pytest.mark.parametrize("data_type", BITS, ids=TensorProto.DataType.Name)
def test_arrays_of_every_element_type(data_type: int) -> None:
    pattern, values = BITS[data_type]
    tensor = TensorProto(name="w", data_type=data_type, dims=[512 * len(values)], raw_data=pattern * 512)
    loaded = load(model(tensor))
    assert loaded.proto.graph.initializer[0].raw_data == (b"" if len(pattern) > 2 else tensor.raw_data)
    assert loaded.array(loaded.proto.graph.initializer[0]).astype(np.float64).tolist() == values * 512


def test_arrays_of_typed_fields() -> None:
    floats = TensorProto(name="f", data_type=FLOAT, dims=[500], float_data=[0.5] * 500)
    halves = TensorProto(name="h", data_type=TensorProto.FLOAT16, dims=[900], int32_data=[0x3C00] * 900)
    loaded = load(model(floats, halves))
    assert loaded.proto.graph.initializer[0].ByteSize() < 200
    assert [loaded.array(t).tolist() for t in loaded.proto.graph.initializer] == [[0.5] * 500, [1.0] * 900]
    assert loaded.to_proto() == model(floats, halves)


def test_runs_of_one_field_add_up() -> None:
    """protobuf lets a writer split packed elements, and a reader must put them together."""
    runs = [np.arange(400, dtype=np.float32), np.arange(5, dtype=np.float32)]
    content = b"".join(b"\x22" + wire.varint(run.nbytes) + run.tobytes() for run in runs)
    loaded = load(with_tensor(tensor_without_data(name="w", data_type=FLOAT, dims=[405]) + content))
    assert loaded.array(loaded.proto.graph.initializer[0]).tolist() == [*range(400), *range(5)]


def test_data_that_does_not_fit_the_shape_is_an_error() -> None:
    loaded = load(model(TensorProto(name="w", data_type=FLOAT, dims=[7, 7], raw_data=b"\0" * 1600)))
    with pytest.raises(ModelError, match="data of tensor 'w' cannot be read"):
        loaded.array(loaded.proto.graph.initializer[0])


@st.composite
def tensors(draw: st.DrawFn) -> TensorProto:
    elements = draw(st.sampled_from([0, 1, 255, 256, 257, 300, 5000]))
    name = draw(st.text(max_size=5))
    if draw(st.booleans()):
        return TensorProto(name=name, data_type=FLOAT, dims=[elements], float_data=[1.5] * elements)
    return TensorProto(name=name, data_type=FLOAT, dims=[elements], raw_data=b"\1\2\3\4" * elements, doc_string="d")


@given(st.lists(tensors(), max_size=4), st.lists(tensors(), max_size=2), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_eliding_and_restoring_is_the_identity(
    initializers: list[TensorProto], constants: list[TensorProto], edited: bool
) -> None:
    proto = model(*initializers)
    proto.graph.node.extend(helper.make_node("Constant", [], [f"c{i}"], value=t) for i, t in enumerate(constants))
    loaded = load(proto, validate=False)
    if edited:
        loaded.unedited = b""
    assert loaded.to_proto() == proto


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from fusion.models.model import load, save
from fusion.models.graph import Graph
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(sys.argv[1])
Graph(model)
save(model, sys.argv[2])
model.proto.graph.initializer.append(model.derive("packed", list(model.proto.graph.initializer)[:2]))
save(model, sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    size = 300 << 20
    content = tensor_without_data(name="w", data_type=FLOAT, dims=[size // 4]) + b"\x4a" + wire.varint(size)
    # The lengths around the tensor must count its data, which is a hole in the file: so they are written by hand.
    proto = model(weights("q", 64, 64), weights("k", 64, 64))
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    inner = b"\x2a" + wire.varint(len(content) + size) + content
    start = proto.SerializeToString() + b"\x3a" + wire.varint(len(inner) + size + len(graph)) + graph + inner
    source = tmp_path / "in.onnx"
    with open(source, "wb") as file:
        file.write(start)
        file.truncate(len(start) + size)
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out.onnx")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 60, f"{grown} MB more for a graph of one node and 300 MB of weights"
    assert (tmp_path / "out.onnx").stat().st_size > size


# -- derived initializers ---------------------------------------------------------------------------------------------


def packed(tmp_path: Path, **arguments: object) -> np.ndarray:
    """Pack q, k, v, remove them, save, and read what was written."""
    loaded = load(stored(model(*(weights(n, 32, 32, seed=i) for i, n in enumerate("qkv"))), tmp_path / "in.onnx"))
    initializers = loaded.proto.graph.initializer
    tensor = loaded.derive("packed", list(initializers), **arguments)  # type: ignore[arg-type]
    del initializers[:]
    initializers.append(tensor)
    save(loaded, tmp_path / "out.onnx")
    (written,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert loaded.to_proto().graph.initializer[0] == written
    assert np.array_equal(loaded.array(tensor), numpy_helper.to_array(written))
    return numpy_helper.to_array(written)


def parts() -> list[np.ndarray]:
    return [numpy_helper.to_array(weights(name, 32, 32, seed=i)) for i, name in enumerate("qkv")]


def test_packed_weights_are_concatenated(tmp_path: Path) -> None:
    q, k, v = parts()
    assert np.array_equal(packed(tmp_path, axis=1), np.hstack([q, k, v]))
    assert np.array_equal(packed(tmp_path, axis=-2), np.vstack([q, k, v]))


def test_packed_weights_are_transposed_first(tmp_path: Path) -> None:
    q, k, v = parts()
    assert np.array_equal(packed(tmp_path, axis=1, transpose=[[1, 0], None, [1, 0]]), np.hstack([q.T, k, v.T]))


def test_small_parts_and_derived_parts() -> None:
    loaded = load(model(weights("a", 8), weights("b", 400)))
    first, second = loaded.proto.graph.initializer
    twice = loaded.derive("twice", [loaded.derive("once", [first, second]), first])
    expected = [numpy_helper.to_array(weights(*shape)) for shape in (("a", 8), ("b", 400), ("a", 8))]
    assert np.array_equal(loaded.array(twice), np.concatenate(expected))


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["a", "b"], {"axis": 1}, "differ beside axis 1"),
        (["a", "c"], {}, "one element type"),
        (["a", "d"], {}, "differ"),
        (["a"], {"axis": 2}, "axis 2 of tensors of rank 2"),
        (["a"], {"transpose": [[0, 0]]}, "no permutation"),
        ([], {}, "0 parts"),
    ],
)
def test_parts_that_do_not_fit_are_refused(names: list[str], arguments: dict[str, object], message: str) -> None:
    tensors = {t.name: t for t in (weights("a", 2, 4), weights("b", 4, 4), weights("d", 4))}
    tensors["c"] = numpy_helper.from_array(np.zeros((2, 4), np.int64), "c")
    with pytest.raises(ValueError, match=message):
        load(model()).derive("n", [tensors[name] for name in names], **arguments)  # type: ignore[arg-type]


# -- other kinds ------------------------------------------------------------------------------------------------------


def test_a_graphsurgeon_graph_comes_back_as_one() -> None:
    surgeon = onnx_graphsurgeon.import_onnx(model(weights("w", 32, 32), nodes=[matmul()]))
    loaded = load(surgeon)
    assert not loaded.proto.graph.initializer[0].raw_data
    result = loaded.export()
    assert isinstance(result, onnx_graphsurgeon.Graph)
    assert np.array_equal(result.nodes[0].inputs[1].values, numpy_helper.to_array(weights("w", 32, 32)))


def test_an_ir_model_comes_back_as_one() -> None:
    result = load(onnx_ir.from_proto(model(weights("w", 32, 32), nodes=[matmul()]))).export()
    assert isinstance(result, onnx_ir.Model)
    value = result.graph.initializers["w"].const_value
    assert value is not None
    assert np.array_equal(value.numpy(), numpy_helper.to_array(weights("w", 32, 32)))


def matmul() -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "w"], ["y"])


def test_anything_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not int"):
        load(5)


# -- destinations -----------------------------------------------------------------------------------------------------


def test_source_and_destination_may_be_one_file(tmp_path: Path) -> None:
    source = stored(large_and_small(), tmp_path / "m.onnx")
    loaded = load(source)
    loaded.proto.doc_string = "edited"
    save(loaded, source)
    save(loaded, source)  # the weights are still those of the file that was replaced
    expected = large_and_small()
    expected.doc_string = "edited"
    assert onnx.load(source) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("destination", [".", "missing/out.onnx", "file.txt/out.onnx"])
def test_a_destination_that_cannot_be_written_is_named(destination: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(OutputError, match=str(tmp_path)):
        save(load(model()), tmp_path / destination)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(OutputError, match="no regular file"):
        save(load(model()), "/dev/null")


def test_a_failure_leaves_the_destination_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(stored(large_and_small(), tmp_path / "in.onnx"))
    (tmp_path / "out.onnx").write_text("the one before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusion.models.store.write", full)
    with pytest.raises(OutputError, match=r"out\.onnx cannot be written: No space left on device"):
        save(loaded, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_a_source_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    source = stored(large_and_small(), tmp_path / "in.onnx")
    loaded = load(source)
    loaded.unedited = b""
    with open(source, "r+b") as file:
        file.truncate(200)
    with pytest.raises(ModelError, match="changed meanwhile"):
        save(loaded, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_the_destination_keeps_its_permissions(tmp_path: Path) -> None:
    destination = stored(model(), tmp_path / "out.onnx")
    destination.chmod(0o640)
    save(load(large_and_small()), destination)
    assert destination.stat().st_mode & 0o777 == 0o640
