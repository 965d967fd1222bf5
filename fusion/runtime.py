"""Run a model: onnxruntime, or onnx's reference implementation where onnxruntime is not there or refuses the model."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fusion.errors import ModelError

ONNXRUNTIME, REFERENCE = "onnxruntime", "onnx reference"
QUIET = 4  # onnxruntime's severity "fatal": what it refuses is raised, and said by us in one sentence


class Refused(ModelError):
    """The runtime does not take this model, or these inputs; the message is the runtime's, in one line."""


class Session:
    """A model that can be run.

    Attributes:
        inputs: names of the inputs that have to be fed.
        outputs: names of the outputs, in order.
        engine: `ONNXRUNTIME` or `REFERENCE`.
    """

    def __init__(
        self, source: Path | ModelProto, *, optimized: bool = False, threads: int = 1, reference: bool = False
    ) -> None:
        """Load `source`.

        Args:
            source: a file (its external data lies beside it), or a model with its weights inside.
            optimized: let onnxruntime rewrite the graph as it does by default; otherwise it runs what is written.
            threads: threads within an operator; one gives the same sums in every run.
            reference: use the reference implementation at once.

        Raises:
            Refused: neither onnxruntime nor the reference implementation loads the model.
        """
        self._native: Any = None
        self._reference: ReferenceEvaluator | None = None
        if reference:
            self._load_reference(source, "")
            return
        try:
            self._native = _onnxruntime(source, optimized, threads)
            self.engine = ONNXRUNTIME
            self.inputs = [i.name for i in self._native.get_inputs()]
            self.outputs = [o.name for o in self._native.get_outputs()]
        except ImportError:
            self._load_reference(source, "")
        except Exception as error:  # onnxruntime raises a family of its own without a common base
            self._load_reference(source, one_line(error))

    def _load_reference(self, source: Path | ModelProto, refusal: str) -> None:
        try:
            self._reference = ReferenceEvaluator(str(source) if isinstance(source, Path) else source)
        except Exception as error:  # whatever a broken model makes the evaluator raise
            raise Refused(refusal or one_line(error)) from error
        self.engine, self.refusal = REFERENCE, refusal
        weights = {t.name for t in getattr(self._reference.proto_, "graph", self._reference.proto_).initializer}
        self.inputs = [name for name in self._reference.input_names if name not in weights]
        self.outputs = list(self._reference.output_names)

    refusal: str = ""
    """Why onnxruntime did not take the model; empty where it did, or where it is not installed."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return every output by name.

        Raises:
            Refused: the runtime does not take these inputs.
        """
        try:
            if self._reference is not None:
                with np.errstate(all="ignore"):
                    results = self._reference.run(None, dict(feeds))
            elif any(_is_opaque(value) for value in feeds.values()) or self._has_opaque_outputs():
                results = self._run_opaque(feeds)
            else:
                results = self._native.run(None, dict(feeds))
        except Exception as error:  # see __init__
            raise Refused(one_line(error)) from error
        return dict(zip(self.outputs, results, strict=True))

    def _has_opaque_outputs(self) -> bool:
        return any(
            re.fullmatch(r"tensor\((bfloat16|float8.*|u?int4|float4.*)\)", o.type) for o in self._native.get_outputs()
        )

    def _run_opaque(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Run with types numpy has no name for: onnxruntime takes and gives them only as its own values."""
        from onnxruntime import OrtValue

        values = {}
        for name, value in feeds.items():
            array = np.ascontiguousarray(value)
            if _is_opaque(array):
                code = helper.np_dtype_to_tensor_dtype(array.dtype)
                raw = array.view(np.uint16 if array.itemsize == 2 else np.uint8)
                values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(raw, code)
            else:
                values[name] = OrtValue.ortvalue_from_numpy(array)
        return [_array(value) for value in self._native.run_with_ort_values(None, values)]


def one_line(error: BaseException) -> str:
    """Return an exception's message as one short line, without the runtime's status codes and source places."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"\S+\.(cc|h):\d+ (\S+ onnxruntime::[\w:]+\(.*?\) )?", "", text)
    return text if len(text) <= 300 else text[:297] + "..."


def _onnxruntime(source: Path | ModelProto, optimized: bool, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    model = str(source) if isinstance(source, Path) else source.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _is_opaque(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "V"


def _array(value: Any) -> Any:
    code = value.element_type() if value.is_tensor() else TensorProto.UNDEFINED
    if code in (TensorProto.UNDEFINED, TensorProto.STRING):
        return value.numpy()
    dtype = helper.tensor_dtype_to_np_dtype(code)
    if dtype.kind != "V":
        return value.numpy()
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    data = ctypes.string_at(value.data_ptr(), count * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)
