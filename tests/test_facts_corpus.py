"""Every fact against a real run: shapes, small integers, uniform numbers, element types, layouts, over real exports.

All intermediate values become graph outputs, onnxruntime runs the model without optimizations, and every fact has to
agree with what came out. The inputs bind the symbols of the model, its first use binds a symbol of the engine's own.

The corpus lies beside the repository or where FUSION_CORPUS says. A sample runs unless FUSION_CORPUS_ALL is 1.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fusion.dims import Poly, atom_of, evaluate, symbol, symbols
from fusion.facts import Facts
from fusion.models.graph import Graph, Value
from fusion.models.model import load

ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parent.parent
CORPUS = Path(os.environ.get("FUSION_CORPUS", ROOT.parent / "shared" / "corpus"))
ALL = os.environ.get("FUSION_CORPUS_ALL") == "1"


def models() -> list[Path]:
    """Models with inputs beside them: tests/models, and the corpus or an even sample of it."""
    own = sorted((ROOT / "tests" / "models").glob("*.onnx"))
    tiny = sorted((CORPUS / "tiny").glob("*.onnx"))
    chosen = tiny if ALL else tiny[::6]
    return [path for path in own + chosen if path.with_suffix(".npz").exists()]


@dataclass
class Report:
    """What was compared, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def run_everything(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The value of every output of every node of the main graph."""
    proto = onnx.load(path)
    names = {info.name for info in proto.graph.output}
    for node in proto.graph.node:
        for name in node.output:
            if name and name not in names:
                names.add(name)
                proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    values = dict(zip(outputs, session.run(outputs, feeds), strict=True))
    for tensor in proto.graph.initializer:
        values.setdefault(tensor.name, numpy_helper.to_array(tensor))
    return {**values, **feeds}


def is_own(dim: int | Poly) -> bool:
    """Whether the engine had to make up a symbol for `dim`."""
    atom = atom_of(dim)
    return atom is not None and atom.kind == "own"


def bind(binding: dict[Poly, int], dim: int | Poly, actual: int) -> bool:
    """Whether `dim` is `actual`; a symbol nobody bound yet is bound if it stands alone."""
    if isinstance(dim, Poly) and dim not in binding and symbols(dim) == [dim]:
        binding[dim] = actual
    return evaluate(dim, binding) == actual


def compare(facts: Facts, values: dict[str, np.ndarray], feeds: dict[str, np.ndarray], report: Report) -> None:
    """Hold every fact about the main graph against the values of a run."""
    scope = facts.graph.scopes[0]
    binding: dict[Poly, int] = {}
    for value in scope.values.values():
        if value.info is not None and value.name in feeds:
            for dim, actual in zip(value.info.type.tensor_type.shape.dim, feeds[value.name].shape, strict=False):
                if dim.dim_param:
                    binding[symbol(dim.dim_param)] = actual
    for value in scope.values.values():
        actual = values.get(value.name)
        if not isinstance(actual, np.ndarray):
            continue
        place = f"{value.producer.op if value.producer else 'input'} {value.name}"
        shape = facts.shape(value)
        if shape is None:
            report.counts["rank unknown"] += 1
        elif len(shape) != actual.ndim:
            report.wrong.append(f"{place}: shape {shape}, was {actual.shape}")
        else:
            report.counts["own symbols"] += any(is_own(dim) for dim in shape)
            if all(map(partial(bind, binding), shape, actual.shape)):
                report.counts["shapes"] += 1
            else:
                report.wrong.append(f"{place}: shape {shape}, was {actual.shape}")
        dtype = facts.dtype(value)
        if dtype is None:
            report.counts["element type unknown"] += 1
        elif dtype != helper.np_dtype_to_tensor_dtype(actual.dtype):
            report.wrong.append(f"{place}: {TensorProto.DataType.Name(dtype)}, was {actual.dtype}")
        integers = facts.integers(value)
        if integers is not None:
            found = [evaluate(i, binding) if isinstance(i, Poly) else i for i in integers.items]
            known = [(i, a) for i, a in zip(found, actual.reshape(-1).tolist(), strict=False) if i is not None]
            if integers.shape != actual.shape or any(i != a for i, a in known):
                report.wrong.append(f"{place}: integers {integers.items}, was {actual.tolist()}")
            report.counts["integers"] += 1
        number = facts.number(value)
        if number is not None and actual.size:
            report.counts["numbers"] += 1
            if not np.allclose(actual.astype(np.float64), number, rtol=1e-6, atol=0):
                report.wrong.append(f"{place}: number {number}, was {actual.reshape(-1)[:4]}")
        compare_layout(facts, value, values, binding, place, report)


def compare_layout(
    facts: Facts, value: Value, values: dict[str, np.ndarray], binding: dict[Poly, int], place: str, report: Report
) -> None:
    """Gather the elements of the source as the layout says, and compare."""
    through = facts.through(value)
    if through is None:
        return
    source, layout = through
    array, actual = values.get(source.name), values[value.name]
    if array is None or actual.size == 0 or actual.size > 20000:
        return
    factors = [factor for axis in layout.axes for factor in axis]
    sizes = [evaluate(size, binding) for _, _, size in factors]
    indices = [np.full(sizes, evaluate(offset, binding), dtype=np.int64) for offset in layout.offsets]
    for position, (axis, stride, _) in enumerate(factors):
        if axis is not None:
            steps = np.arange(sizes[position]).reshape([-1 if i == position else 1 for i in range(len(sizes))])
            indices[axis] = indices[axis] + evaluate(stride, binding) * steps
    read = array[tuple(indices)] if indices else np.broadcast_to(array, sizes)
    report.counts["layouts"] += 1
    if not np.array_equal(read.reshape(-1), actual.reshape(-1), equal_nan=actual.dtype.kind == "f"):
        report.wrong.append(f"{place}: layout {layout}")


def check(path: Path, report: Report) -> None:
    """Compare before and after learning equalities."""
    wanted = {info.name for info in onnx.load(path, load_external_data=False).graph.input}
    feeds = {name: array for name, array in np.load(path.with_suffix(".npz")).items() if name in wanted}
    values = run_everything(path, feeds)
    facts = Facts(Graph(load(path)))
    for _ in range(3):
        compare(facts, values, feeds, report)
        facts.learn()


@pytest.mark.skipif(not models(), reason=f"no models under tests/models, and no corpus at {CORPUS}")
@pytest.mark.parametrize("path", models(), ids=lambda path: path.stem)
def test_every_fact_holds_in_a_run(path):
    report = Report()
    try:
        check(path, report)
    except Exception as error:
        if "onnxruntime" in type(error).__module__:
            pytest.skip(f"onnxruntime does not run it: {str(error)[:80]}")
        raise
    assert not report.wrong, "\n".join(report.wrong[:10])
    assert report.counts["shapes"]
