"""Rotary position embedding: of halves, of neighbours, and of a part of each head."""

import numpy as np

from fusion.dims import product
from fusion.language import concat, join, pattern, pieces


@pattern(x="... (K P)", cos="... P", sin="... P")
def rotary(x, cos, sin):
    """Pairs of numbers turned by an angle (Su et al. 2021, eq. 34); a pair lies in the two halves, as in GPT-NeoX."""
    first, second = pieces(x, "... (K P) -> K ... P", 2)
    return join((first * cos - second * sin, second * cos + first * sin), "K ... P -> ... (K P)")


@pattern(x="... (P K)", cos="... P", sin="... P")
def rotary_interleaved(x, cos, sin):
    """Pairs of neighbours turned by an angle (Su et al. 2021, eq. 34)."""
    first, second = pieces(x, "... (P K) -> K ... P", 2)
    return join((first * cos - second * sin, second * cos + first * sin), "K ... P -> ... (P K)")


@pattern(x="... (K P)", passed="... T", cos="... P", sin="... P")
def partial_rotary(x, passed, cos, sin):
    """The first numbers of each head turned, the others passed on (Black et al. 2022, section 2.1)."""
    return concat((rotary(x, cos, sin), passed), "... D")


@pattern(x="... (P K)", passed="... T", cos="... P", sin="... P")
def partial_rotary_interleaved(x, passed, cos, sin):
    """The first numbers of each head turned in pairs of neighbours, the others passed on (Wang & Komatsuzaki 2021)."""
    return concat((rotary_interleaved(x, cos, sin), passed), "... D")


def _lying(found):
    """The axes in which a kernel reads x, those of the caches, and whether each sequence has its own positions.

    The kernels take (B, N, S, D), and (B, S, N D) where the heads lie inside the sequence.
    """
    last = found.rank - 1
    if last < 2:
        alone = ((), 0 if last else (), last)
        return alone, alone, False
    read = {axis for axis in range(last) if found.cos.depends(axis) or found.sin.depends(axis)}
    sequence = 1 if 1 in read or last == 2 else last - 1
    found.require(read <= {0, sequence}, "cos and sin are not the same for all heads")
    inside = (0, 1, tuple(range(2, last + 1)))
    apart = (0, tuple(range(1, sequence)), sequence, last)
    return inside if sequence == 1 else apart, (0, sequence, last), 0 in read


def _rotated(found, op, build):
    """What `build(x, attributes)` makes of x, or of x and what is passed on, in the axes of the result."""
    found.require_one_dtype()
    lying, (_, sequence, last), _ = _lying(found)
    have = found.shape
    wanted = tuple(product(have[axis] for axis in ((group,) if isinstance(group, int) else group)) for group in lying)
    heads = product(have[axis] for axis in range(1, last) if axis != sequence)
    parts = [capture for name in ("x", "passed") if (capture := getattr(found, name, None)) is not None]
    whole = parts[0] if len(parts) == 1 else parts[0].appended(parts[1])
    if whole is not None:
        x = op.arranged(whole.axes(*lying))
    else:
        x = op.reshaped(op.Concat(*map(op.arranged, parts), axis=-1), have, wanted)
    attributes = {"rotary_embedding_dim": found.x.shape[-1]} if len(parts) == 2 else {}
    if attributes or len(lying) == 3:
        found.require(isinstance(heads, int), "the number of heads is not known")
        attributes["num_heads"] = heads
    return op.reshaped(build(x, attributes), wanted, have)


def _standard(interleaved):
    """RotaryEmbedding of opset 23: caches (B, S, P), no positions."""

    def emit(found, op):
        _, axes, _ = _lying(found)
        caches = [op.arranged(cache.axes(*axes)) for cache in (found.cos, found.sin)]
        return _rotated(
            found, op, lambda x, attributes: op.RotaryEmbedding(x, *caches, interleaved=interleaved, **attributes)
        )

    return emit


def _microsoft(interleaved):
    """RotaryEmbedding of com.microsoft: caches (S, P) read from position 0 on, or (B S, P) and a position for each.

    The caches are rows already gathered, not the table and the model's positions: Gather counts a negative position
    from the end, the kernel refuses it.
    """

    def emit(found, op):
        _, axes, own = _lying(found)
        caches = [op.arranged(cache.axes(*(axes if own else axes[1:]))) for cache in (found.cos, found.sin)]
        positions = op.numbered(caches[0], 2) if own else op.constant(np.array([0]))
        if own:
            caches = [op.flattened(cache, found.cos.shape[-1]) for cache in caches]
        return _rotated(
            found,
            op,
            lambda x, attributes: op.microsoft.RotaryEmbedding(
                x, positions, *caches, interleaved=interleaved, **attributes
            ),
        )

    return emit


for _pattern, _order in ((rotary, 0), (rotary_interleaved, 1), (partial_rotary, 0), (partial_rotary_interleaved, 1)):
    _pattern.emit("onnx", "ort-cpu", "ort-cuda")(_standard(_order))
    _pattern.emit("ort-cpu", "ort-cuda")(_microsoft(_order))
