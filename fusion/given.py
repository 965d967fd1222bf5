"""Inputs that the caller gives: from a file or at hand, checked against what the model declares."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from fusion.errors import ModelError
from fusion.feeds import Feed, Input, Values

Inputs = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def given_feeds(inputs: Inputs, model: ModelProto, names: Sequence[str]) -> Iterator[Feed]:
    """Yield what the caller gives.

    Args:
        inputs: path of an .npz file, the values by name, or several of the latter.
        model: the model that declares the inputs.
        names: the inputs it has to be fed.

    Raises:
        ModelError: the file cannot be read, an input is missing, or has another type or shape than is declared.
    """
    if isinstance(inputs, str | os.PathLike):
        label = os.fspath(inputs)
        yield Feed(label, _take(_read_npz(Path(inputs)), model, names, label))
        return
    several = [inputs] if isinstance(inputs, Mapping) else inputs
    for number, values in enumerate(several):
        label = "given inputs" if len(several) == 1 else f"given inputs {number}"
        yield Feed(label, _take(values, model, names, label))


def _read_npz(path: Path) -> Values:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not an .npz file of inputs ({error})") from error


def _take(values: Mapping[str, Any], model: ModelProto, names: Sequence[str], label: str) -> Values:
    if missing := [name for name in names if name not in values]:
        raise ModelError(f"{label}: input {missing[0]!r} is missing; there are {', '.join(values) or 'none'}")
    taken = {name: np.asarray(values[name]) if np.isscalar(values[name]) else values[name] for name in names}
    for info in model.graph.input:
        value = taken.get(info.name)
        if isinstance(value, np.ndarray) and info.type.HasField("tensor_type"):
            _fits(value, Input.declared(info), label)
    return taken


def _fits(value: np.ndarray[Any, Any], declared: Input, label: str) -> None:
    if value.dtype != declared.dtype and declared.dtype.kind != "O":
        raise ModelError(f"{label}: input {declared.name!r} is {value.dtype}, the model takes {declared.dtype}")
    shape = declared.shape
    if shape is None:
        return
    fixed = zip(value.shape, shape, strict=False)
    if value.ndim != len(shape) or any(isinstance(d, int) and d != size for size, d in fixed):
        wanted = f"[{', '.join(map(str, shape))}]"
        raise ModelError(f"{label}: input {declared.name!r} has shape {list(value.shape)}, the model takes {wanted}")
