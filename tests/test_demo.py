"""The demonstration: its model, and the whole of it once."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from fusion import demo
from fusion.errors import OutputError


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return demo.bert()


def test_the_export_is_bert_base_cut_to_three_layers(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model)
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    assert shapes["model.embeddings.word_embeddings.weight"] == [30522, 768]
    assert [n.op_type for n in model.graph.node].count("Softmax") == 3
    assert [n.op_type for n in model.graph.node].count("Erf") == 3
    assert model.opset_import[0].version == 14


def test_weights_are_of_the_size_that_training_starts_with(model: onnx.ModelProto) -> None:
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert all(a.dtype == np.float32 for a in arrays.values())
    table = arrays["model.embeddings.word_embeddings.weight"]
    assert table.std() == pytest.approx(0.02, rel=1e-2)
    assert abs(table.mean()) < 1e-4
    norms = [a for name, a in arrays.items() if name.endswith("LayerNorm.weight")]
    assert len(norms) == 7
    assert all(abs(a.mean() - 1) < 0.01 for a in norms)


def test_weights_are_the_same_every_time(model: onnx.ModelProto) -> None:
    again = {t.name: t.raw_data for t in demo.bert().graph.initializer}
    assert all(t.raw_data == again[t.name] for t in model.graph.initializer)
    assert len(set(again.values())) == len(again)


@pytest.mark.filterwarnings("error")
def test_the_demonstration_fuses_verifies_times_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHAPES", ((1, 8),))
    monkeypatch.setattr(demo, "ROUNDS", 1)
    console = Console(file=io.StringIO(), width=120)
    assert demo.demonstrate(tmp_path / "out", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "equal: 2 outputs, 8 input sets" in text
    assert "1 × 8" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bert.fused.onnx", "bert.onnx", "diff.html"]
    operators = [n.op_type for n in onnx.load(tmp_path / "out" / "bert.fused.onnx").graph.node]
    assert operators.count("LayerNormalization") + operators.count("SkipLayerNormalization") == 7
    assert "Erf" not in operators
    assert "Softmax" not in operators


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file cannot be written"):
        demo.demonstrate(tmp_path / "file", Console(file=io.StringIO()))
