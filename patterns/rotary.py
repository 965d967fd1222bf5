"""Rotary position embedding: of halves, of neighbours, and of a part of each head."""

import numpy as np

from fusion.language import concat, join, pattern, pieces


def _rotated(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@pattern(x="... (K P)", cos="... P", sin="... P")
def rotary(x, cos, sin):
    """Pairs of numbers turned by an angle (Su et al. 2021, eq. 34); a pair lies in the two halves, as in GPT-NeoX."""
    first, second = pieces(x, "... (K P) -> K ... P", 2)
    return join(_rotated(first, second, cos, sin), "K ... P -> ... (K P)")


@pattern(x="... (P K)", cos="... P", sin="... P")
def rotary_interleaved(x, cos, sin):
    """Pairs of neighbours turned by an angle (Su et al. 2021, eq. 34)."""
    first, second = pieces(x, "... (P K) -> K ... P", 2)
    return join(_rotated(first, second, cos, sin), "K ... P -> ... (P K)")


@pattern(x="... (K P)", passed="... T", cos="... P", sin="... P")
def partial_rotary(x, passed, cos, sin):
    """The first numbers of each head turned, the others passed on (Black et al. 2022, section 2.1)."""
    return concat((rotary(x, cos, sin), passed), "... D")


@pattern(x="... (P K)", passed="... T", cos="... P", sin="... P")
def partial_rotary_interleaved(x, passed, cos, sin):
    """The first numbers of each head turned in pairs of neighbours, the others passed on (Wang & Komatsuzaki 2021)."""
    return concat((rotary_interleaved(x, cos, sin), passed), "... D")


def _axes(found):
    """The axes of the sequence and of the heads, and whether positions differ within a batch."""
    read = {axis for axis in range(found.rank - 1) if found.cos.depends(axis) or found.sin.depends(axis)}
    found.require(found.rank in (3, 4), "the kernel takes (B, S, D) or (B, N, S, D)")
    sequence, heads = (1, 2) if found.rank == 3 or (1 in read and 2 not in read) else (2, 1)
    found.require(heads not in read, "cos and sin are not the same for all heads")
    return sequence, heads, 0 in read


def _rotate(found, op, build):
    """`build(x, num_heads)` on (B, N, S, D), or on (B, S, N D) where the heads lie inside."""
    _, heads, _ = _axes(found)
    last, shape = found.rank - 1, found.shape
    inside = heads == 2
    count = 1 if heads == last else shape[heads]
    parts = [capture for name in ("x", "passed") if (capture := getattr(found, name, None)) is not None]
    partial = len(parts) == 2
    if inside or partial:
        found.require(isinstance(count, int), "the number of heads is not known")
    axes = (0, 1, (2, 3)) if inside and found.rank == 4 else tuple(range(found.rank))
    whole = parts[0].appended(parts[1]) if partial else parts[0]
    if whole is not None:
        x = op.arranged(whole.axes(*axes))
    else:
        x = op.Concat(*(op.arranged(part) for part in parts), axis=-1)
        x = x if len(axes) == found.rank else op.Reshape(x, op.constant(np.array([0, 0, -1])))
    given = {"num_heads": count} if inside or partial else {}
    if partial:
        given["rotary_embedding_dim"] = found.x.shape[-1]
    rotated = build(x, given)
    if len(axes) == found.rank:
        return rotated
    return op.Reshape(rotated, op.sizes(shape, (*shape[:2], shape[2] * shape[3]), copy=True))


def _standard(interleaved):
    """RotaryEmbedding of opset 23, with caches (B, S, P) and no positions."""

    def build(found, op):
        found.require_one_dtype()
        sequence, _, _ = _axes(found)
        cos, sin = (op.arranged(cache.axes(0, sequence, found.rank - 1)) for cache in (found.cos, found.sin))
        return _rotate(
            found, op, lambda x, given: op.RotaryEmbedding(x, cos, sin, interleaved=interleaved, **given)
        )

    return build


def _microsoft(interleaved):
    """RotaryEmbedding of com.microsoft, with caches (S, P) from position 0 on, or (B S, P) with a position for each.

    The caches are rows already gathered, not the table and the model's positions: Gather counts a negative position
    from the end, and the kernel does not.
    """

    def build(found, op):
        found.require_one_dtype()
        sequence, _, batched = _axes(found)
        last, width = found.rank - 1, found.cos.shape[-1]
        found.require(isinstance(width, int), "the width of the caches is not known")
        axes = (0, sequence, last) if batched else (sequence, last)
        cos, sin = (op.arranged(cache.axes(*axes)) for cache in (found.cos, found.sin))
        positions = op.constant(np.array([0]))
        if batched:
            positions = op.numbered(cos, 2)
            cos, sin = (op.shared("Reshape", [cache, op.constant(np.array([-1, width]))], None) for cache in (cos, sin))
        return _rotate(
            found,
            op,
            lambda x, given: op.microsoft.RotaryEmbedding(x, positions, cos, sin, interleaved=interleaved, **given),
        )

    return build


for _pattern, _order in ((rotary, 0), (rotary_interleaved, 1), (partial_rotary, 0), (partial_rotary_interleaved, 1)):
    _pattern.emit("onnx", "ort-cpu")(_standard(_order))
    _pattern.emit("ort-cpu")(_microsoft(_order))
