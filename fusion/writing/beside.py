"""What stands beside scores, written again: masks and biases as one tensor to add, guards around the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper

from fusion.dims import Dim
from fusion.layout import Layout
from fusion.matching.state import Entry
from fusion.matching.state import entries as entries_of
from fusion.terms import Ref
from fusion.writing.found import Found, New, Operand, Unmet
from fusion.writing.masks import ABSORBED, ABSORBING, Halves, Line, keeps_a_key, read
from fusion.writing.sizes import int64

if TYPE_CHECKING:
    from fusion.writing.emit import Builder


def additive(op: Builder, found: Found, entries: tuple[Entry, ...]) -> Operand:
    """See `Builder.additive`."""
    bias: Operand = None
    for entry in reversed(entries):
        if _is_idle(found, entry):
            continue
        if entry.kind == "clamp":
            if entry.fill > _smallest(found):
                raise Unmet(f"scores are clamped to {entry.fill:g}", place=found.root.name)
            if bias is not None:
                bias = op.shared("Max", [bias, op.scalar(entry.fill)], None)
            continue
        if entry.kind == "term" and found.adds_wide:
            same = found.facts.dtype(entry.ref.value) == found.dtype and abs(entry.coef) <= 1.0
            found.require(same, f"{entry.ref.value.name} is added in a wider dtype than the result's", kind="dtype")
        ref, placed = _beside(op, found, entry, keep=2 if bias is None else 0)
        if entry.kind == "term":
            term = placed
            if entry.coef != 1.0:
                term = op.shared("Mul", [term, op.scalar(entry.coef)], ref.layout.shape)
            bias = term if bias is None else op.shared("Add", [bias, term], ref.layout.shape)
            continue
        fill = _hiding(found, entry, entries)
        if fill is None:
            raise Unmet(
                f"scores are masked with {entry.fill:g}, which does not absorb them: adding it is another function "
                "in rows masked everywhere",
                place=entry.ref.value.name,
            )
        kept, hidden = op.scalar(0.0) if bias is None else bias, op.scalar(fill)
        choices = [kept, hidden] if entry.keep else [hidden, kept]
        bias = op.shared("Where", [placed, *choices], ref.layout.shape, dtype=found.dtype)
    return bias


def is_causal(found: Found, entries: tuple[Entry, ...], past: Dim) -> bool:
    """See `Builder.is_causal`."""
    masks = [entry for entry in entries if not (_is_idle(found, entry) or _is_low(found, entry))]
    if len(masks) != 1:
        return False
    rows, columns = masks[0].ref.layout.shape[-2:]
    halves = _added(found, masks[0])
    if halves is None or halves.line != Line(-1, 1, -past) or halves.inside != 0.0 or rows + past != columns:
        return False
    # Every row keeps a key, so what is hidden needs no more than to hide.
    return halves.outside <= ABSORBING and _is_proved(found, masks[0])


def _is_idle(found: Found, entry: Entry) -> bool:
    """Whether a part does nothing to scores: a mask that provably hides none, a sum with 0.

    What is put on the probabilities does neither; see `guarded`.
    """
    if entry.kind == "zero":
        return True
    halves = _added(found, entry)
    return halves is not None and halves[:2] == (None, 0.0) and _is_proved(found, entry)


def _is_low(found: Found, entry: Entry) -> bool:
    """Whether a part keeps scores from falling below the smallest number."""
    return entry.kind == "clamp" and entry.fill <= _smallest(found)


def _is_proved(found: Found, entry: Entry) -> bool:
    """Note that what is written relies on how a part is computed, so that nobody runs it with other numbers."""
    found.state.proved[entry.ref.value] = ()
    return True


def _smallest(found: Found) -> float:
    """What absorbs every score when it is added; -inf in half precision, where kernels compute in float."""
    if found.dtype not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return -np.inf
    return 0.999 * float(np.finfo(helper.tensor_dtype_to_np_dtype(found.dtype)).min)


def _absorbs(found: Found, fill: float) -> bool:
    """Whether scores vanish when a number is added to them."""
    return fill <= (ABSORBED if np.isfinite(_smallest(found)) else -np.inf)


def _added(found: Found, entry: Entry) -> Halves | None:
    """What a mask or a term adds to scores, or as good as adds; None where nobody knows."""
    halves = None if entry.kind == "clamp" else read(found.view, entry.ref)
    if halves is None or entry.kind == "term":
        return halves and Halves(halves.line, entry.coef * halves.inside, entry.coef * halves.outside)
    sides = (0.0 if bool(side) == entry.keep else entry.fill for side in halves[1:])
    return Halves(halves.line, *sides)


def _hiding(found: Found, entry: Entry, entries: tuple[Entry, ...]) -> float | None:
    """What is added where a mask hides keys, so that it is as if the scores there were the mask's number.

    That is the number where it absorbs every score. Where a smaller one does and the mask is all there is beside the
    scores, it is the smaller one: beside a key that is kept both hide, in a row without any both make all scores equal.
    None absorbs in half precision: there each row must keep a key, or be 0 in the end.
    """
    if _absorbs(found, entry.fill):
        return entry.fill
    alone = all(other is entry or _is_idle(found, other) or _is_low(found, other) for other in entries)
    if not alone or entry.fill > ABSORBING:
        return None
    if _absorbs(found, ABSORBED):
        return ABSORBED
    cleared = any(other.kind == "zero" and (other.ref, other.keep) == (entry.ref, entry.keep) for other in entries)
    return entry.fill if cleared or keeps_a_key(found.view, entry.ref, entry.keep) else None


def _beside(op: Builder, found: Found, entry: Entry, keep: int) -> tuple[Ref, Operand]:
    """What stands beside the scores, as small as it can be had: broadcast axes as 1, else as they lie."""
    dtype = found.dtype if entry.kind == "term" else None
    refused: Unmet | None = None
    for full in ((), (0,), (1,), (0, 1)):
        ref = _spread(entry.ref, keep, full)
        try:
            return ref, op.placed(ref, dtype)
        except Unmet as unmet:
            refused = refused or unmet
    assert refused is not None
    raise refused


def guarded(op: Builder, found: Found, result: New) -> New:
    """See `Builder.guarded`."""
    rest = [entry for bound in found.state.bound.values() for entry in entries_of(bound)]
    for entry in rest:
        if entry.kind == "zero":
            masks = [m for m in rest if m.kind == "mask" and (m.ref, m.keep) == (entry.ref, entry.keep)]
            found.require(bool(masks), f"probabilities are set to 0 by {entry.ref.value.name}, which masks no score")
            result = op.Where(_keeps(op, found, entry), result, op.scalar(0.0), dtype=result.dtype)
    if not any(node.key == "IsNaN" for node in found.region.core):
        return result
    zero = op.scalar(0.0)
    return op.Where(op.IsNaN(result, dtype=TensorProto.BOOL), zero, result, dtype=result.dtype)  # type: ignore[no-any-return]


def _keeps(op: Builder, found: Found, entry: Entry) -> New:
    """Whether a mask (B, H, S, T) keeps a key, by row: (B, S, 1)."""
    ref = _spread(entry.ref, keep=0)
    found.require(not ref.layout.depends(1), f"{entry.ref.value.name} masks probabilities head by head")
    mask = op.shared("Cast", [op.placed(ref, None)], ref.layout.shape, dtype=TensorProto.INT32, to=TensorProto.INT32)
    reduction = "ReduceMax" if entry.keep else "ReduceMin"
    if found.opset >= 18:
        kept = op.shared(reduction, [mask, op.constant(int64([1, 3]), "axes")], None, keepdims=0)
    else:
        kept = op.shared(reduction, [mask], None, axes=[1, 3], keepdims=0)
    column = op.unsqueezed(kept, [2], (ref.layout.shape[0], ref.layout.shape[2], 1))
    truth = op.shared("Cast", [column], column.shape, dtype=TensorProto.BOOL, to=TensorProto.BOOL)
    return truth if entry.keep else op.shared("Not", [truth], column.shape)


def _spread(ref: Ref, keep: int, full: Sequence[int] = ()) -> Ref:
    """Make broadcast axes size 1, but for the last `keep`, which are to be written out, and those in `full`."""
    layout = ref.layout
    count = len(layout.axes) - keep
    axes = tuple(
        () if index < count and index not in full and all(source is None for source, *_ in axis) else axis
        for index, axis in enumerate(layout.axes)
    )
    return Ref(ref.value, Layout(axes, layout.offsets, layout.source))
