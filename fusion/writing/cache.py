"""Caches: keys and values that are appended to those of the past; the whole of them are outputs of the fused node."""

from __future__ import annotations

from collections.abc import Iterator

from fusion.dims import Dim
from fusion.layout import Layout, merge_neighbours
from fusion.matching.region import Region, asks_sizes
from fusion.models.graph import Node, Value
from fusion.schema import axes as schema_axes
from fusion.terms import Ref
from fusion.writing.found import GAIN, Captured, Found


def split_cache(found: Found, forms: dict[str, str], letter: str, shared: str) -> list[Captured]:
    """See `Builder.split_cache`."""
    state, core, prefix = found.state.copy(), {*found.region.core}, {*found.region.prefix}
    asking = dict.fromkeys(found.region.asking)
    pasts: list[Captured] = []
    lengths: set[Dim] = set()
    for name, form in forms.items():
        captured: Captured = getattr(found, name)
        whole, node = captured.value, captured.value.producer
        axis = form.split().index(letter)
        joined = node is not None and node.key == "Concat" and schema_axes(node, found.facts) == (axis,)
        found.require(joined, f"{name} ({whole.name}) appends nothing to a cache", kind=GAIN)
        assert node is not None
        found.require(node.scope is found.node.scope, f"{whole.name} is computed in another scope")
        found.require(len(node.inputs) == 2, f"{name} ({whole.name}) is not one part appended to another")
        twice = any(ref.value is whole for ref in state.kept.values())
        found.require(not twice, f"{whole.name} is the cache of another capture, too")
        lies = captured.laid(found.unrepeated(captured, shared)[1], form).layout
        found.require(
            lies == Layout.identity(lies.source), f"the cache {whole.name} does not lie as the kernel reads it"
        )
        past, new = (_part(found, captured, value) for value in node.inputs)
        peeled = found.view.peel(new)
        state.bound[name], state.bound[f"past {name}"] = peeled.ref, past
        state.kept[len(state.kept)] = Ref(whole, Layout.identity(lies.source))
        core.add(node)
        prefix.update(peeled.crossed)
        asking.update(dict.fromkeys(_asking(found, whole)))
        lengths.add(past.layout.source[axis])
        pasts.append(Captured(found, name, past))
    inner, outer = (tuple(sorted(nodes, key=lambda node: node.position)) for nodes in (core, prefix - core))
    found.state, found.region = state, Region(inner, outer, tuple(asking))
    found.require(len(lengths) == 1, f"the pasts of {' and '.join(forms)} may differ in length")
    for kept in state.kept.values():
        found.require(found.is_read(kept.value), f"nobody else reads {kept.value.name}")
    return pasts


def _asking(found: Found, whole: Value) -> Iterator[Node]:
    """Who asks for the sizes of a cache, or of what the region makes of it: a mask may be made of them."""
    for reader in whole.uses:
        if reader in found.region.prefix:
            for value in filter(None, reader.outputs):
                yield from _asking(found, value)
        elif asks_sizes(found.view, reader) and reader.scope is found.node.scope:
            yield reader


def _part(found: Found, captured: Captured, value: Value | None) -> Ref:
    """What a capture reads of one part of the cache: the same, but for the size of the axis they are appended along."""
    shape = None if value is None else found.facts.shape(value)
    found.require(shape is not None, f"the rank of a part of {captured.value.name} is unknown")
    assert value is not None
    assert shape is not None
    layout = captured.ref.layout
    axes = tuple(
        merge_neighbours((own, stride, size if own is None else shape[own]) for own, stride, size in factors)
        for factors in layout.axes  # each is an axis of the cache as a whole, for that lies as the kernel reads it
    )
    return Ref(value, Layout(axes, layout.offsets, shape))
