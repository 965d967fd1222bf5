"""Run a model: onnxruntime, or onnx's reference implementation where onnxruntime is not there or refuses the model."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, helper
from onnx.reference import ReferenceEvaluator

from fusion.errors import ModelError

ONNXRUNTIME, REFERENCE = "onnxruntime", "onnx reference"
QUIET = 4  # onnxruntime's severity "fatal": what it refuses is raised, and said by us in one sentence
OPAQUE = re.compile(r"tensor\((bfloat16|float8.*|u?int4|float4.*)\)")
"""Types numpy has no name for: onnxruntime takes and gives them only as its own values."""


class Refused(ModelError):
    """The runtime does not take this model, or these inputs; the message is the runtime's, in one line."""


class Session:
    """A model that can be run.

    Attributes:
        inputs: names of the inputs that have to be fed.
        outputs: names of the outputs, in order.
        engine: `ONNXRUNTIME` or `REFERENCE`.
        refusal: why onnxruntime did not take the model; empty where it did, or was not asked.
    """

    def __init__(
        self, source: Path | ModelProto, *, optimized: bool = False, threads: int = 1, reference: bool = False
    ) -> None:
        """Load `source`.

        Args:
            source: a file (its external data lies beside it), or a model with its weights inside.
            optimized: let onnxruntime rewrite the graph as it does by default; otherwise it runs what is written.
            threads: threads within an operator, 0 for as many as onnxruntime likes; one gives the same sums in every
                run.
            reference: use the reference implementation at once.

        Raises:
            Refused: neither onnxruntime nor the reference implementation loads the model.
        """
        self.refusal = ""
        self._native: Any = None
        try:
            if not reference:
                self._native = _onnxruntime(source, optimized, threads)
        except ImportError:
            pass
        except Exception as error:  # onnxruntime raises a family of its own without a common base
            self.refusal = one_line(error)
        if self._native is not None:
            self.engine = ONNXRUNTIME
            self.inputs = [i.name for i in self._native.get_inputs()]
            self.outputs = [o.name for o in self._native.get_outputs()]
            self._opaque = any(OPAQUE.fullmatch(o.type) for o in self._native.get_outputs())
            return
        try:
            self._reference = ReferenceEvaluator(str(source) if isinstance(source, Path) else source)
        except Exception as error:  # whatever a broken model makes the evaluator raise
            raise Refused(self.refusal or one_line(error)) from error
        self.engine = REFERENCE
        weights = {t.name for t in self._reference.proto_.graph.initializer}
        self.inputs = [name for name in self._reference.input_names if name not in weights]
        self.outputs = list(self._reference.output_names)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return every output by name.

        Raises:
            Refused: the runtime does not take these inputs.
        """
        try:
            if self._native is None:
                with np.errstate(all="ignore"):
                    results = self._reference.run(None, dict(feeds))
            elif self._opaque or any(_is_opaque(value) for value in feeds.values()):
                values = {name: _ort_value(np.ascontiguousarray(value)) for name, value in feeds.items()}
                results = [_array(value) for value in self._native.run_with_ort_values(None, values)]
            else:
                results = self._native.run(None, dict(feeds))
        except Exception as error:  # see __init__
            raise Refused(one_line(error)) from error
        return dict(zip(self.outputs, results, strict=True))


def one_line(error: BaseException) -> str:
    """Return an exception's message as one short line, without the runtime's status codes and source places."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"\S+\.(cc|h):\d+ (\S+ onnxruntime::[\w:]+\(.*?\) )?", "", text)
    text = re.sub(r"onnxruntime::[\w:]+\([^()]*\) (\[ONNXRuntimeError\] : \d+ : \w+ : )?", "", text)
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


def _ort_value(array: np.ndarray[Any, Any]) -> Any:
    from onnxruntime import OrtValue

    if not _is_opaque(array):
        return OrtValue.ortvalue_from_numpy(array)
    raw = array.view(np.uint16 if array.itemsize == 2 else np.uint8)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(raw, helper.np_dtype_to_tensor_dtype(array.dtype))


def _array(value: Any) -> Any:
    if not OPAQUE.fullmatch(value.data_type()):
        return value.numpy()
    dtype = helper.tensor_dtype_to_np_dtype(value.element_type())
    shape = tuple(value.shape())
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)
