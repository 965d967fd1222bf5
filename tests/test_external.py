"""Weights in files beside the model: they stay there, are found again, and are never overwritten by mistake."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fusion.errors import ModelError, OutputError
from fusion.models.model import Model, load, save

FLOAT = TensorProto.FLOAT
SHAPE = [32, 32]
VALUES = np.arange(1024, dtype=np.float32).reshape(SHAPE)


def model(**entries: object) -> ModelProto:
    """y = x @ w, with w outside, where the entries say."""
    infos = [helper.make_tensor_value_info(name, FLOAT, [2, 32]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", infos[:1], infos[1:])
    tensor = graph.initializer.add(name="w", data_type=FLOAT, dims=SHAPE, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def stored(folder: Path, name: str = "m.onnx", data: str = "w.bin", values: np.ndarray = VALUES) -> Path:
    """A model in a folder, its weights 16 bytes into their file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / data).parent.mkdir(parents=True, exist_ok=True)
    (folder / data).write_bytes(b"sixteen bytes ->" + values.tobytes())
    proto = model(location=data, offset=16, length=values.nbytes)
    (folder / name).write_bytes(proto.SerializeToString())
    return folder / name


def weights(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def edited(path: Path) -> Model:
    loaded = load(path)
    loaded.proto.doc_string = "edited"
    return loaded


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- reading ----------------------------------------------------------------------------------------------------------


def test_an_external_array_is_read_and_the_shell_stays_without_it(tmp_path: Path) -> None:
    loaded = load(stored(tmp_path))
    tensor = loaded.proto.graph.initializer[0]
    assert np.array_equal(loaded.array(tensor), VALUES)
    assert not tensor.raw_data


def test_a_length_that_is_left_out_follows_from_the_shape(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(VALUES.tobytes())
    (tmp_path / "m.onnx").write_bytes(model(location="w.bin").SerializeToString())
    loaded = load(tmp_path / "m.onnx")
    assert np.array_equal(loaded.array(loaded.proto.graph.initializer[0]), VALUES)


def test_a_model_in_memory_has_no_folder() -> None:
    loaded = load(model(location="w.bin"))
    with pytest.raises(ModelError, match=r"lies in the file 'w\.bin', and a model in memory has no folder"):
        loaded.array(loaded.proto.graph.initializer[0])


def error(path: Path, **entries: object) -> str:
    path.write_bytes(model(**entries).SerializeToString())
    with pytest.raises(ModelError) as caught:
        load(path)
    return str(caught.value)


def test_missing_and_short_data_is_found_on_loading(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert error(path, location="w.bin") == (
        f"{tmp_path}/w.bin is missing: tensor 'w' has its data there; put the file beside the model"
    )
    (tmp_path / "w.bin").write_bytes(bytes(4000))
    assert error(path, location="w.bin") == (
        f"{tmp_path}/w.bin is too short: tensor 'w' has bytes 0 to 4096, the file ends at 4000; "
        "fetch or export it again"
    )
    assert "is too short" in error(path, location="w.bin", offset=100, length=3901)
    assert "is too short" in error(path, location="w.bin", offset=-8, length=8)
    (tmp_path / "folder").mkdir()
    assert "is no regular file" in error(path, location="folder")


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin", ""])
def test_data_outside_the_models_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(5000))
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "m.onnx"
    message = error(path, location=location)
    assert message.startswith(f"{path}: tensor 'w' keeps its data in")


def test_a_position_that_is_no_number(tmp_path: Path) -> None:
    assert "has no readable position" in error(tmp_path / "m.onnx", location="w.bin", offset="here")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_in_the_same_folder_the_reference_stays(tmp_path: Path) -> None:
    source = stored(tmp_path)
    save(edited(source), tmp_path / "out.onnx")
    assert names(tmp_path) == ["m.onnx", "out.onnx", "w.bin"]
    assert np.array_equal(weights(tmp_path / "out.onnx"), VALUES)
    before = (tmp_path / "w.bin").stat()
    save(edited(source), source)
    assert (tmp_path / "w.bin").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("data", ["w.bin", "weights/layer/w.bin"])
def test_in_another_folder_the_data_goes_along(data: str, tmp_path: Path) -> None:
    source = stored(tmp_path / "in", data=data)
    (tmp_path / "out").mkdir()
    save(load(source), tmp_path / "out" / "new.onnx")
    assert names(tmp_path / "out") == sorted(["new.onnx", data])
    assert (tmp_path / "out" / "new.onnx").read_bytes() == source.read_bytes()
    assert (tmp_path / "out" / data).read_bytes() == (tmp_path / "in" / data).read_bytes()
    assert not (tmp_path / "out" / data).samefile(tmp_path / "in" / data)


def test_a_model_may_have_more_data_files_than_a_process_can_open(tmp_path: Path) -> None:
    proto = model(location="w0.bin")
    for index in range(1, 60):
        tensor = proto.graph.initializer.add()
        tensor.CopyFrom(proto.graph.initializer[0])
        tensor.name, tensor.external_data[0].value = f"w{index}", f"w{index}.bin"
    for index in range(60):
        (tmp_path / f"w{index}.bin").write_bytes(VALUES.tobytes())
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "out").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, limits[1]))
    try:
        save(load(tmp_path / "m.onnx"), tmp_path / "out" / "m.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(names(tmp_path / "out")) == 61


def test_the_folder_may_be_reached_by_another_way(tmp_path: Path) -> None:
    source = stored(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(edited(source), tmp_path / "link" / "out.onnx")
    assert np.array_equal(weights(tmp_path / "real" / "out.onnx"), VALUES)


def test_somebody_elses_weights_are_not_overwritten(tmp_path: Path) -> None:
    source = stored(tmp_path / "in")
    other = stored(tmp_path / "out", name="other.onnx", values=-VALUES)
    with pytest.raises(OutputError, match=r"w\.bin exists with other content"):
        save(load(source), tmp_path / "out" / "new.onnx")
    assert names(tmp_path / "out") == ["other.onnx", "w.bin"]
    assert np.array_equal(weights(other), -VALUES)


def test_data_that_is_there_already_serves(tmp_path: Path) -> None:
    source = stored(tmp_path / "in")
    stored(tmp_path / "out", name="other.onnx")
    save(load(source), tmp_path / "out" / "new.onnx")
    assert np.array_equal(weights(tmp_path / "out" / "new.onnx"), VALUES)


def test_a_model_is_replaced_together_with_its_data(tmp_path: Path) -> None:
    source = stored(tmp_path / "in")
    destination = stored(tmp_path / "out", values=-VALUES)
    save(load(source), destination)
    assert np.array_equal(weights(destination), VALUES)
    assert names(tmp_path / "out") == ["m.onnx", "w.bin"]


def test_a_model_is_not_written_over_its_weights(tmp_path: Path) -> None:
    source = stored(tmp_path)
    with pytest.raises(OutputError, match="holds the model's own weights"):
        save(edited(source), tmp_path / "w.bin")
    assert np.array_equal(weights(source), VALUES)


def test_a_failure_leaves_no_data_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(tmp_path / "in", data="sub/w.bin")
    (tmp_path / "out").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusion.models.store.write", full)
    with pytest.raises(OutputError, match="No space left"):
        save(load(source), tmp_path / "out" / "new.onnx")
    assert list((tmp_path / "out").iterdir()) == []


# -- derived weights --------------------------------------------------------------------------------------------------


def deriving(source: Path) -> Model:
    loaded = load(source)
    tensor = loaded.proto.graph.initializer[0]
    loaded.proto.graph.initializer.append(loaded.derive("twice", [tensor, tensor], axis=1))
    return loaded


def derived(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.load(path).graph.initializer[1])


def test_new_weights_go_outside_as_the_old_ones_are(tmp_path: Path) -> None:
    source = stored(tmp_path)
    save(deriving(source), tmp_path / "out.onnx")
    assert names(tmp_path) == ["m.onnx", "out.onnx", "out.onnx.fused.data", "w.bin"]
    assert np.array_equal(derived(tmp_path / "out.onnx"), np.hstack([VALUES, VALUES]))
    assert (tmp_path / "out.onnx").stat().st_size < 1000


def test_new_weights_never_replace_those_they_are_made_of(tmp_path: Path) -> None:
    save(deriving(stored(tmp_path)), tmp_path / "out.onnx")
    again = load(tmp_path / "out.onnx")
    tensors = again.proto.graph.initializer
    tensors.append(again.derive("thrice", [tensors[1], tensors[0]], axis=1))
    save(again, tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert np.array_equal(numpy_helper.to_array(written[1]), np.hstack([VALUES] * 2))
    assert np.array_equal(numpy_helper.to_array(written[2]), np.hstack([VALUES] * 3))


def test_saving_twice_replaces_the_own_new_weights(tmp_path: Path) -> None:
    source = stored(tmp_path)
    save(deriving(source), tmp_path / "out.onnx")
    save(deriving(source), tmp_path / "out.onnx")
    assert names(tmp_path) == ["m.onnx", "out.onnx", "out.onnx.fused.data", "w.bin"]


def test_a_foreign_file_with_the_name_of_the_new_weights_stays(tmp_path: Path) -> None:
    source = stored(tmp_path)
    (tmp_path / "out.onnx.fused.data").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"):
        save(deriving(source), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.fused.data").read_text() == "mine"
    assert names(tmp_path) == ["m.onnx", "out.onnx.fused.data", "w.bin"]


def test_a_model_that_outgrows_protobuf_puts_its_new_weights_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = model(location="w.bin")
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(VALUES, "w"))
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    monkeypatch.setattr("fusion.models.output.LARGEST", 8000)  # 4 KB of weights and 8 KB of new ones
    save(deriving(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert names(tmp_path) == ["in.onnx", "out.onnx", "out.onnx.fused.data"]
    assert np.array_equal(derived(tmp_path / "out.onnx"), np.hstack([VALUES, VALUES]))
    monkeypatch.setattr("fusion.models.output.LARGEST", 3000)
    with pytest.raises(OutputError, match="protobuf stops at 2 GB"):
        save(deriving(tmp_path / "in.onnx"), tmp_path / "larger.onnx")
    assert "larger" not in "".join(names(tmp_path))


def test_derived_weights_of_external_ones_are_complete_in_memory(tmp_path: Path) -> None:
    proto = deriving(stored(tmp_path)).to_proto()
    assert proto.graph.initializer[0].external_data[0].value == "w.bin"
    assert np.array_equal(numpy_helper.to_array(proto.graph.initializer[1]), np.hstack([VALUES, VALUES]))
