"""Inputs that the caller gives: from a file or at hand, checked against what the model declares."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from onnx import ModelProto

from fusion.errors import ModelError
from fusion.verifying.feeds import Feed, Input, Values

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
        sets = {os.fspath(inputs): _read_npz(Path(inputs))}
    elif isinstance(inputs, Mapping):
        sets = {"given inputs": inputs}
    else:
        sets = {f"given inputs {number}": values for number, values in enumerate(inputs)}
    if not sets:
        raise ModelError("no inputs were given: an empty list holds none")
    for label, values in sets.items():
        yield Feed(label, _take(values, model, names, label))


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (EOFError, ValueError, TypeError, BadZipFile):  # what numpy says of them is about pickles
        raise ModelError(f"{path} is not an .npz file of inputs: write it with numpy.savez") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None


def _take(values: Mapping[str, Any], model: ModelProto, names: Sequence[str], label: str) -> Values:
    if missing := [name for name in names if name not in values]:
        raise ModelError(f"{label}: input {missing[0]!r} is missing; there are {', '.join(values) or 'none'}")
    taken = {name: np.asarray(values[name]) if np.isscalar(values[name]) else values[name] for name in names}
    for info in model.graph.input:
        value = taken.get(info.name)
        if not isinstance(value, np.ndarray) or not info.type.tensor_type.elem_type:
            continue
        declared, place = Input.declared(info), f"{label}: input {info.name!r}"
        if value.dtype != declared.dtype and declared.dtype.kind != "O":
            raise ModelError(f"{place} is {value.dtype}, the model takes {declared.dtype}")
        shape = declared.shape
        if shape is not None and (
            value.ndim != len(shape)
            or any(isinstance(d, int) and d != size for size, d in zip(value.shape, shape, strict=True))
        ):
            raise ModelError(f"{place} has shape {list(value.shape)}, the model takes [{', '.join(map(str, shape))}]")
    return taken
