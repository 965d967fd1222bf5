"""The demonstration: a real BERT export, optimized, verified, timed and compared, before your eyes.

The package ships the export as a structure: every initializer has its name, type and shape, and no data. The weights
are filled in here, the same every time: activations are then of ordinary size, and a wrong scale or mask would show.
"""

from __future__ import annotations

import hashlib
import lzma
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from onnx import ModelProto
from rich.console import Console
from rich.table import Table

from fusion.api import optimize
from fusion.diffing.diff import diff
from fusion.errors import OutputError
from fusion.report import table
from fusion.verifying.runtime import Session
from fusion.verifying.verify import verify

STRUCTURE = "data/bert.onnx.xz"
SPREAD = 0.02  # of the weights; what BERT itself is initialised with
SHAPES = ((1, 32), (1, 128), (8, 128))  # batch, sequence
ROUNDS = 9


def bert() -> ModelProto:
    """Return the export, with weights: BERT base cut to 3 of its 12 layers, TorchScript, opset 14.

    The same name and shape always get the same numbers.
    """
    model: ModelProto = ModelProto.FromString(lzma.decompress(files("fusion").joinpath(STRUCTURE).read_bytes()))
    for tensor in model.graph.initializer:
        seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little")
        values = np.random.default_rng(seed).standard_normal(tuple(tensor.dims), np.float32) * np.float32(SPREAD)
        if tensor.name.endswith("LayerNorm.weight"):
            values += np.float32(1)
        tensor.raw_data = values.tobytes()
    return model


def bert_inputs(batch: int, length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs for `bert`: (batch, length) each, nothing masked."""
    ids = np.random.default_rng(batch * length).integers(0, 30522, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def demonstrate(directory: Path, console: Console) -> bool:
    """Run the whole demonstration and say on `console` what happens.

    Args:
        directory: where the models and the difference are written; it is made if it is not there.
        console: where to print.

    Returns:
        Whether the fused model computes the same as the export.

    Raises:
        OutputError: the directory cannot be written.
        ModelError: nothing here runs the models.
    """
    before, after, page = (directory / name for name in ("bert.onnx", "bert.fused.onnx", "diff.html"))
    console.print("[bold]1. A BERT export[/] (3 layers, 768 wide, 12 heads; TorchScript, opset 14; made-up weights)")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        size = before.write_bytes(bert().SerializeToString())
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error.strerror or error}") from error
    console.print(f"   {before}, {size / 1e6:.0f} MB\n", highlight=False)
    console.print(f"[bold]2. fusion optimize {before} {after}[/]")
    optimize(before, after).print(console)
    console.print(f"\n[bold]3. fusion verify {before} {after}[/]")
    report = verify(before, after)
    report.print(console)
    console.print("\n[bold]4. How fast onnxruntime runs both[/] (its default session; medians of runs taken in turns)")
    console.print(times(before, after))
    console.print(f"\n[bold]5. fusion diff {before} {after} --html {page}[/]")
    diff(before, after).to_html(page, title="BERT, before and after")
    console.print(f"   open {page} to see every rewrite", highlight=False)
    return report.equal


def times(before: Path, after: Path) -> Table:
    """Return a table of how long both models take by input shape, in onnxruntime's default session."""
    shown = table(">batch × length", ">export, ms", ">fused, ms", ">faster")
    sessions = [Session(path, optimized=True, threads=0) for path in (before, after)]
    for batch, length in SHAPES:
        slow, fast = (seconds * 1e3 for seconds in interleaved(sessions, bert_inputs(batch, length), ROUNDS))
        shown.add_row(f"{batch} × {length}", f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.2f}×")
    return shown


def interleaved(sessions: Sequence[Session], feeds: Mapping[str, Any], rounds: int) -> list[float]:
    """Return the median seconds of a run per session; they take turns, so that a drift of the machine hits all."""
    seconds: list[list[float]] = [[] for _ in sessions]
    for turn in range(rounds + 1):
        for session, taken in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(feeds)
            if turn:  # the first run of each allocates
                taken.append(time.perf_counter() - start)
    return [median(taken) for taken in seconds]
