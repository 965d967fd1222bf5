"""Placement: get a value into the axes a fused node reads, from what stands in the graph or by new nodes.

A wanted layout is first looked up: exporters have usually written the value in those axes somewhere. Only where nothing
stands, Reshape, Transpose and Expand are asked for, and they are shared by every match that wants the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnx import TensorProto

from fusion.dims import Dim, broadcast, divide, lower, stretched
from fusion.layout import Axis, Factor, Layout, merge_neighbours
from fusion.models.graph import Node, Scope, Value
from fusion.radix import digits
from fusion.terms import Ref
from fusion.verdict import Verdict
from fusion.view import View

if TYPE_CHECKING:
    from fusion.writing.emit import Builder
    from fusion.writing.found import New, Operand

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
"""Types in which what is a number elsewhere may be infinite."""
REACH = 48
"""How many rearrangements of one value are looked at; hubs have thousands."""


def standing(view: View, ref: Ref, dtype: int | None, at: Node) -> Value | None:
    """The value computed before `at` that lies exactly as `ref` says, in this dtype; None where there is none."""
    for value, layout in _rearranged(view, ref.value, at):
        if _lies(value, layout, ref) and (dtype is None or view.facts.dtype(value) == dtype):
            return value
    return None


def nearest(view: View, source: Value, wanted: Sequence[Layout], at: Node) -> int | None:
    """Which of these layouts over `source` is that of the nearest value in one of them; None where there is no such."""
    for value, layout in _rearranged(view, source, at):
        for index, own in enumerate(wanted):
            if _lies(value, layout, Ref(source, own)):
                return index
    return None


def _lies(value: Value, layout: Layout, ref: Ref) -> bool:
    """Whether a value, of this layout over the source of `ref`, lies as `ref` says."""
    return _agree(layout, ref.layout) or (value is ref.value and _is_whole(ref.layout))


def _agree(have: Layout, wanted: Layout) -> bool:
    """Whether two layouts over one source are the same map in every run in which they can be broadcast together."""
    if have == wanted or have.offsets != wanted.offsets or len(have.axes) != len(wanted.axes):
        return have == wanted
    for own, other in zip(have.axes, wanted.axes, strict=True):
        if len(own) != len(other) or any(a[:2] != b[:2] for a, b in zip(own, other, strict=True)):
            return False
        sizes = [(a[2], b[2]) for a, b in zip(own, other, strict=True) if a[2] != b[2]]
        if any(broadcast(a, b) != b or stretched(a, b) is not Verdict.NO for a, b in sizes):
            return False
    return True


def _is_whole(layout: Layout) -> bool:
    """Whether the layout is the source as it lies, also where sizes are equal by proof and not by name."""
    return len(layout.axes) == len(layout.source) and all(
        layout.whole(axis) == axis or (not factors and layout.source[axis] == 1)
        for axis, factors in enumerate(layout.axes)
    )


def _rearranged(view: View, source: Value, at: Node) -> Iterator[tuple[Value, Layout]]:
    """The source and what rearranges or repeats it before `at`, each with its layout over the source, nearest first."""
    shape = view.facts.shape(source)
    if shape is None:
        return
    queue: list[tuple[Value, Layout]] = [(source, Layout.identity(shape))]
    seen = {source}
    for value, layout in queue:
        yield value, layout
        if len(seen) > REACH:
            continue
        for node in list(value.uses)[:REACH]:
            for output in node.outputs:
                if output is None or output in seen or not before(output, at):
                    continue
                root = view.root(output)
                step = view.step(output, root.layout) if root is not None else None
                if step is None or step[0] is not value:
                    continue
                composed = step[1].compose(layout)
                if composed is not None:
                    seen.add(output)
                    queue.append((output, composed))


def before(value: Value, at: Node) -> bool:
    """Whether `value` is computed before `at`, in its scope or one around it."""
    scope: Scope | None = at.scope
    inner = at
    while scope is not None:
        if value.scope is scope:
            return value.producer is None or value.producer.position < inner.position
        if scope.owner is not None:
            inner = scope.owner
        scope = scope.parent
    return False


def place(view: View, ref: Ref, dtype: int | None, at: Node, builder: Builder) -> Operand:
    """The operand that lies as `ref` says: standing in the graph, or made by the fewest new nodes.

    Raises:
        Unmet: the layout cannot be written with Slice, Reshape, Transpose and Expand, a size in it is unknown, or the
            value would be cast to a narrower type than the graph ever does, in which it may be infinite.
    """
    actual = view.facts.shape(ref.value) or ()
    if ref.layout.source != actual:
        return _spread_out(view, ref, dtype, actual, builder)
    found = standing(view, ref, dtype, at)
    if found is not None:
        return found
    best: tuple[int, Value, _Steps] | None = None
    lying = list(_rearranged(view, ref.value, at))
    cast = dtype not in NARROW or any(view.facts.dtype(value) == dtype for value, _ in lying)
    if not cast and not view.facts.is_constant(ref.value):
        raise builder.narrow(ref.value)
    for value, layout in lying:
        wanted = _express(ref.layout, layout)
        steps = _plan(wanted) if wanted is not None else None
        if steps is not None and (best is None or steps.count < best[0]):
            best = (steps.count, value, steps)
    if best is None:
        raise builder.unmet(f"{ref.value.name} cannot be rearranged into the axes the fused node reads", ref.value)
    _, value, steps = best
    made = _written(builder, value, view.facts.shape(value) or (), steps)
    given = view.facts.dtype(value)
    if dtype is not None and given != dtype:
        made = builder.shared("Cast", [made], ref.layout.shape, dtype=dtype, to=dtype)
    return made


def rearranged(builder: Builder, operand: Operand, have: Layout, wanted: Layout) -> New | None:
    """An operand that lies as `have` brought into `wanted`, a layout over the same source; None where it cannot be."""
    expressed = _express(wanted, have)
    steps = _plan(expressed) if expressed is not None else None
    made = None if steps is None else _written(builder, operand, have.shape, steps)
    return None if isinstance(made, Value) else made


def _written(builder: Builder, made: Operand, have: tuple[Dim, ...], steps: _Steps) -> Operand:
    for op, target in steps.order:
        if op == "Transpose":
            have = tuple(have[axis] for axis in target)  # type: ignore[index]
            made = builder.shared("Transpose", [made], have, perm=list(target))
        elif op == "Slice":
            axis, start, stop, step = (int(str(number)) for number in target)
            have = (*have[:axis], len(range(start, stop, step)), *have[axis + 1 :])
            made = builder.sliced(made, axis, range(start, stop, step), have)
        elif op == "Unsqueeze":
            have = _inserted(have, target)
            made = builder.unsqueezed(made, [int(str(axis)) for axis in target], have)
        else:
            dims = tuple(target)
            if op == "Expand":
                have = (1,) * (len(dims) - len(have)) + have
            made = builder.shared(op, [made, builder.sizes(dims, have, copy=op == "Reshape")], dims)
            have = dims
    return made


def _spread_out(view: View, ref: Ref, dtype: int | None, actual: tuple[Dim, ...], builder: Builder) -> Operand:
    """A value whose axes are 1 or full, nobody knows which: it is rearranged as it lies, then Expand makes it full."""
    layout = ref.layout
    moved = [axis for axis, dim in enumerate(actual) if layout.source[axis] != dim]
    whole = all(layout.whole(axis) is not None for axis in range(len(layout.axes)) if _reads(layout.axes[axis], moved))
    if whole and (dtype is None or view.facts.dtype(ref.value) == dtype):
        axes = tuple(
            tuple(
                (axis, stride, actual[axis] if axis in moved else size)
                for axis, stride, size in factors
                if axis is not None
            )
            for factors in layout.axes
        )
        narrow = Layout(tuple(map(merge_neighbours, axes)), layout.offsets, actual)
        steps = _plan(narrow) if narrow != Layout.identity(actual) else _Steps()
        if steps is not None:
            made = _written(builder, ref.value, actual, steps)
            return builder.shared("Expand", [made, builder.sizes(layout.shape, narrow.shape, copy=False)], layout.shape)
    raise builder.unmet(f"{ref.value.name} cannot be spread over the axes the fused node reads", ref.value)


def _reads(factors: Axis, axes: list[int]) -> bool:
    return any(axis in axes for axis, _, _ in factors)


def _express(wanted: Layout, have: Layout) -> Layout | None:
    """`wanted` over the value whose layout over the same source is `have`; None where that value lacks a part."""
    if wanted == have:
        return Layout.identity(have.shape)
    if have.is_identity:
        return wanted
    axes = []
    for axis in wanted.axes:
        factors: list[Factor] = []
        for factor in axis:
            parts = [factor] if factor[0] is None else _parts(have, factor)
            if parts is None:
                return None
            factors.extend(parts)
        axes.append(merge_neighbours(factors))
    expressed = Layout(tuple(axes), (0,) * len(have.axes), have.shape)
    return expressed if expressed.compose(have) == wanted else None


def _parts(have: Layout, factor: Factor) -> list[Factor] | None:
    """A digit of the source in the digits of `have`, outermost first: it may lie across several of its axes."""
    source, stride, need = factor
    parts: list[Factor] = []
    while need != 1:
        for index, axis in enumerate(have.axes):
            found = _digit(axis, source, stride)
            size = found and _common(found[1], need)
            if found and size:
                parts.insert(0, (index, found[0], size))
                stride, need = stride * size, divide(need, size) or 1
                break
        else:
            return None
    return parts


def _digit(axis: Axis, source: int | None, stride: Dim) -> tuple[Dim, Dim] | None:
    """Where steps of `stride` along the source lie in this axis: their stride in it, and how many there are."""
    inner: Dim = 1
    for own, step, length in reversed(axis):
        multiple = divide(stride, step) if own == source else None
        count = None if multiple is None else divide(length, multiple)
        if multiple is not None and count is not None and count != 1:
            return inner * multiple, count
        inner = inner * length
    return None


def _common(have: Dim, need: Dim) -> Dim | None:
    """The smaller of two sizes, if it divides the larger."""
    if divide(have, need) is not None:
        return need
    return have if divide(need, have) is not None else None


def _inserted(have: tuple[Dim, ...], axes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    rest = iter(have)
    return tuple(1 if index in axes else next(rest) for index in range(len(have) + len(axes)))


class _Steps:
    """Slice, Reshape, Transpose, Unsqueeze, Expand, Reshape or Unsqueeze, as far as they are needed."""

    def __init__(self) -> None:
        self.order: list[tuple[str, tuple[Dim, ...]]] = []

    @property
    def count(self) -> int:
        return len(self.order)


def _plan(wanted: Layout) -> _Steps | None:
    """The operators that bring a value into `wanted`; None where they cannot."""
    cuts, wanted = _cut(wanted)
    if any(offset != 0 for offset in wanted.offsets):
        return None
    steps = _rearranging(wanted) if not wanted.is_identity else _Steps()
    if steps is not None:
        steps.order[:0] = cuts
    return steps


def _cut(wanted: Layout) -> tuple[list[tuple[str, tuple[Dim, ...]]], Layout]:
    """Slices of the axes of which evenly spaced elements are read, and what is wanted of what they leave."""
    cuts: list[tuple[str, tuple[Dim, ...]]] = []
    for axis, (offset, dim) in enumerate(zip(wanted.offsets, wanted.source, strict=True)):
        own = [factor for factors in wanted.axes for factor in factors if factor[0] == axis]
        _, stride, size = own[0] if own else (axis, 1, 1)
        if len(own) > 1 or (offset, stride, size) == (0, 1, dim) or lower(stride) < 1:
            continue
        if not all(isinstance(number, int) for number in (offset, stride, size)):
            continue
        cuts.append(("Slice", (axis, offset, offset + stride * (size - 1) + 1, stride)))
        axes = tuple(tuple((axis, 1, size) if factor in own else factor for factor in f) for f in wanted.axes)
        offsets = tuple(0 if index == axis else other for index, other in enumerate(wanted.offsets))
        source = tuple(size if index == axis else other for index, other in enumerate(wanted.source))
        wanted = Layout(axes, offsets, source)
    return cuts, wanted


def _rearranging(wanted: Layout) -> _Steps | None:
    """The operators that bring the whole of a value into `wanted`."""
    if _is_aligned(wanted):
        steps = _Steps()
        steps.order.append(("Expand", wanted.shape))
        return steps
    split: list[Factor] = []
    for axis, dim in enumerate(wanted.source):
        own = [factor for factors in wanted.axes for factor in factors if factor[0] == axis]
        ordered = digits(own, dim)
        if ordered is None:
            return None
        split.extend(ordered)
    steps = _Steps()
    if [size for *_, size in split] != list(wanted.source):
        steps.order.append(("Reshape", tuple(size for *_, size in split)))
    flat = [factor for factors in wanted.axes for factor in factors]
    real = [factor for factor in flat if factor[0] is not None]
    order = [split.index(factor) for factor in real]
    if order != sorted(order):
        steps.order.append(("Transpose", tuple(order)))
    current = [size for *_, size in real]
    single = [1 if factor[0] is None else factor[2] for factor in flat]
    missing = tuple(index for index, factor in enumerate(flat) if factor[0] is None)
    if single != [size for *_, size in flat]:
        if missing:
            steps.order.append(("Unsqueeze", missing))
        current = [size for *_, size in flat]
        steps.order.append(("Expand", tuple(current)))
    if current != list(wanted.shape):
        empty = tuple(index for index, axis in enumerate(wanted.axes) if not axis)
        if all(len(axis) <= 1 for axis in wanted.axes):
            steps.order.append(("Unsqueeze", empty))
        else:
            steps.order.append(("Reshape", wanted.shape))
    return steps


def _is_aligned(wanted: Layout) -> bool:
    """Whether numpy broadcasting alone brings the value there: Expand adds leading axes by itself."""
    lead = len(wanted.axes) - len(wanted.source)
    for index, axis in enumerate(wanted.axes):
        own = index - lead
        whole = own >= 0 and axis == ((own, 1, wanted.source[own]),)
        spread = all(factor[0] is None for factor in axis) and (own < 0 or wanted.source[own] == 1)
        if not (whole or spread):
            return False
    return lead >= 0
