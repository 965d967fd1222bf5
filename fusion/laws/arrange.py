"""Layouts written out: the Reshapes, Transposes and Unsqueezes with which exporters bring axes into place."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from fusion.laws.writer import Axes, Group, Writer, Written


def arrange(writer: Writer, value: Written, wanted: Axes) -> Written:
    """Write `value` with these axes: split, permuted, merged, with axes of size 1 where `wanted` has `()`.

    Args:
        wanted: all labels of the value, each once.

    Raises:
        ValueError: the labels differ.
    """
    if sorted(value.labels) != sorted(label for group in wanted for label in group):
        raise ValueError(f"{value.axes} cannot be arranged as {wanted}")
    if value.axes == wanted:
        return value
    if _plain(value.axes) == _plain(wanted):
        return ones(writer, value, wanted)
    units = _units(value.axes, wanted)
    if list(units) != list(_plain(value.axes)):
        value = reshape(writer, value, units)
    elif value.axes != units:
        value = ones(writer, value, units)
    order = [units.index(unit) for group in wanted for unit in _parts(group, units)]
    value = transpose(writer, value, order)
    return value if value.axes == wanted else ones(writer, value, wanted)


def _plain(axes: Axes) -> Axes:
    return tuple(group for group in axes if group)


def _units(axes: Axes, wanted: Axes) -> Axes:
    """The axes, without those of size 1, and split where their labels part ways in `wanted`."""
    units: list[Group] = []
    for group in _plain(axes):
        run: Group = ()
        for label in group:
            if run and not any(_contains(target, (*run, label)) for target in wanted):
                units.append(run)
                run = ()
            run = (*run, label)
        units.append(run)
    return tuple(units)


def _contains(group: Group, run: Group) -> bool:
    return any(group[start : start + len(run)] == run for start in range(len(group)))


def _parts(group: Group, units: Axes) -> list[Group]:
    parts: list[Group] = []
    left = group
    while left:
        unit = next(unit for unit in units if left[: len(unit)] == unit)
        parts.append(unit)
        left = left[len(unit) :]
    return parts


def transpose(writer: Writer, value: Written, order: Sequence[int]) -> Written:
    """Permute axes, now and then in two steps."""
    if list(order) == list(range(len(order))):
        return value
    if len(order) > 2 and writer.draw.chance(6):
        first = writer.draw.shuffled(range(len(order)))
        value = _transpose(writer, value, first)
        order = [first.index(axis) for axis in order]
    return _transpose(writer, value, order)


def _transpose(writer: Writer, value: Written, order: Sequence[int]) -> Written:
    given = list(order)
    backwards = given == list(range(len(given)))[::-1]
    axes = tuple(value.axes[axis] for axis in order)
    # Without `perm` the axes are reversed.
    return writer.node("Transpose", [value], axes, perm=None if backwards and writer.draw.chance(3) else given)


def ones(writer: Writer, value: Written, wanted: Axes) -> Written:
    """The same axes in order, but for axes of size 1 and for merging: by Squeeze and Unsqueeze, or by Reshape."""
    if value.axes == wanted:
        return value
    if _plain(value.axes) != _plain(wanted) or writer.draw.chance(3):
        return reshape(writer, value, wanted)
    kept = _plain(value.axes)
    if len(kept) < len(value.axes):
        dropped = [axis for axis, group in enumerate(value.axes) if not group]
        value = writer.along("Squeeze", value, dropped, kept)
    added = [axis for axis, group in enumerate(wanted) if not group]
    return writer.along("Unsqueeze", value, added, wanted) if added else value


def reshape(writer: Writer, value: Written, wanted: Axes) -> Written:
    """Split and merge axes in order, by a target that is written out, with 0 and -1, or computed from shapes."""
    draw = writer.draw
    if len(wanted) == 2 and draw.chance(3):
        flattened = _flatten(writer, value, wanted)
        if flattened is not None:
            return flattened
    items: list[int | None] = [writer.extent(group) for group in wanted]
    copies = {
        index
        for index, group in enumerate(wanted)
        if index < len(value.axes) and value.axes[index] == group and writer.shape((group,)) != (0,)
    }
    for index in copies:
        if items[index] is None or draw.chance(3):
            items[index] = 0
    unknown = [index for index, item in enumerate(items) if item is None]
    if not unknown and draw.chance(2) and items:
        items[draw.index(len(items))] = -1
    elif len(unknown) == 1 and not draw.chance(4):
        items[unknown[0]] = -1
    computed = {index: writer.size(wanted[index]) for index, item in enumerate(items) if item is None}
    missing = [index for index, name in computed.items() if name is None]
    if len(missing) > 1:
        raise ValueError(f"no input gives the sizes of {[wanted[index] for index in missing]}")
    for index in missing:
        items[index] = -1
        del computed[index]
    if not computed:
        return writer.node("Reshape", [value, writer.integers([item or 0 for item in items])], wanted)
    parts = [computed.get(index) or writer.integers([item or 0]) for index, item in enumerate(items)]
    target = writer.node("Concat", parts, ((),), dtype=TensorProto.INT64, axis=0) if len(parts) > 1 else parts[0]
    return writer.node("Reshape", [value, target], wanted)


def _flatten(writer: Writer, value: Written, wanted: Axes) -> Written | None:
    for axis in range(len(value.axes) + 1):
        front = tuple(label for group in value.axes[:axis] for label in group)
        back = tuple(label for group in value.axes[axis:] for label in group)
        if (front, back) == wanted:
            return writer.node("Flatten", [value], wanted, axis=axis)
    return None


def align(writer: Writer, operands: Sequence[Written], order: Sequence[str]) -> tuple[list[Written], Axes]:
    """Bring operands of an elementwise operator into axes that broadcast; return them and the axes of the result.

    Args:
        order: labels in the order in which a result has them where the operands do not settle it.
    """
    axes = broadcast([operand.axes for operand in operands])
    if axes is not None:
        return list(operands), axes
    frame = frame_of([operand.axes for operand in operands], order)
    arranged = [arrange(writer, operand, within(operand, frame)) for operand in operands]
    result = broadcast([operand.axes for operand in arranged])
    assert result is not None, "operands in one frame broadcast"
    return arranged, result


def broadcast(operands: Sequence[Axes]) -> Axes | None:
    """The axes of an elementwise result as numpy aligns them; None where that would pair axes of different labels."""
    rank = max(len(axes) for axes in operands)
    result: list[Group] = []
    for position in range(rank):
        groups = {axes[position - rank] for axes in operands if len(axes) >= rank - position} - {()}
        if len(groups) > 1:
            return None
        result.append(groups.pop() if groups else ())
    labels = [label for group in result for label in group]
    return tuple(result) if len(set(labels)) == len(labels) else None


def frame_of(operands: Sequence[Axes], order: Sequence[str]) -> Axes:
    """One axis for every label of the operands."""
    present = {label for axes in operands for group in axes for label in group}
    return tuple((label,) for label in order if label in present)


def within(value: Written, frame: Axes) -> Axes:
    """The axes of a value in a frame: size 1 where it lacks the label; leading ones left away."""
    axes = tuple(group if set(group) <= set(value.labels) else () for group in frame)
    first = next((index for index, group in enumerate(axes) if group), len(axes))
    return axes[first:]
