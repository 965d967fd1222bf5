"""Rotary position embedding: every spelling computes the rotation, and what is not one is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from building import DOUBLE, FLOATS, HALF, INT64, Build, misses, numbers, operators, run, same
from onnx import TensorProto

import fusion
from fusion.targets import target_named

NEWEST = target_named("ort-cpu").newest_opset
LARGE = np.iinfo(np.int64).max
BASE = 100.0


def rotation(x, cos, sin, interleaved=False):
    """The first 2 P numbers turned, in doubles: the definition, pair by pair; cos and sin are (…, P)."""
    x, cos, sin = x.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64)
    turned, pairs = x.copy(), cos.shape[-1]
    for pair in range(pairs):
        real, imaginary = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        c, s = cos[..., pair], sin[..., pair]
        turned[..., real] = x[..., real] * c - x[..., imaginary] * s
        turned[..., imaginary] = x[..., imaginary] * c + x[..., real] * s
    return turned


def frequencies(pairs: int) -> np.ndarray:
    return (BASE ** (-np.arange(pairs) / pairs)).astype(np.float32)


# Spellings ----------------------------------------------------------------------------------------------------------


def cut(b: Build, x: str, start: int, end: int, step: int = 1, axis: int = -1) -> str:
    return b.slice(x, *(np.array([number], np.int64) for number in (start, end, axis, step)))


def parted(b: Build, x: str, sizes) -> tuple[str, ...]:
    lengths = {"split": list(sizes)} if b.opset < 13 else {}
    given = () if lengths else (np.array(sizes, np.int64),)
    return b.node("Split", x, *given, outputs=len(sizes), axis=-1, **lengths)


def stacked(b: Build, parts, shape) -> str:
    """Side by side along a new last axis, which is then merged."""
    return b.reshape(b.concat(*(b.unsqueeze(part, [-1]) for part in parts), axis=-1), shape)


def half_full(b, x, cos, sin, pairs, shape):
    """x cos + concat(-x₂, x₁) sin, with halves cut by Slice."""
    rotated = b.concat(b.neg(cut(b, x, pairs, LARGE)), cut(b, x, 0, pairs), axis=-1)
    return b.add(b.mul(x, b.concat(cos, cos, axis=-1)), b.mul(rotated, b.concat(sin, sin, axis=-1)))


def half_split(b, x, cos, sin, pairs, shape):
    """The same with halves cut by Split, and -1 times the second."""
    first, second = parted(b, x, [pairs, pairs])
    rotated = b.concat(b.mul(second, -1.0), first, axis=-1)
    return b.add(b.mul(rotated, b.concat(sin, sin, axis=-1)), b.mul(b.concat(cos, cos, axis=-1), x))


def half_negated(b, x, cos, sin, pairs, shape):
    """The same with the halves of -x."""
    rotated = b.concat(cut(b, b.neg(x), pairs, LARGE), cut(b, x, 0, pairs), axis=-1)
    return b.add(b.mul(x, b.tile(cos, repeats(len(shape)))), b.mul(rotated, b.tile(sin, repeats(len(shape)))))


def half_pieces(b, x, cos, sin, pairs, shape):
    """concat(x₁ cos - x₂ sin, x₂ cos + x₁ sin)."""
    first, second = parted(b, x, [pairs, pairs])
    turned = b.sub(b.mul(first, cos), b.mul(second, sin)), b.add(b.mul(first, sin), b.mul(second, cos))
    return b.concat(*turned, axis=-1)


def neighbours_full(b, x, cos, sin, pairs, shape):
    """x repeat(cos) + stack(-x₂, x₁) repeat(sin)."""
    rotated = stacked(b, (b.neg(cut(b, x, 1, LARGE, 2)), cut(b, x, 0, LARGE, 2)), shape)
    wide = [stacked(b, (cache, cache), [0] * (len(shape) - 1) + [-1]) for cache in (cos, sin)]
    return b.add(b.mul(x, wide[0]), b.mul(rotated, wide[1]))


def neighbours_pieces(b, x, cos, sin, pairs, shape):
    """stack(x₁ cos - x₂ sin, x₂ cos + x₁ sin), pairs cut by Reshape and Gather."""
    paired = b.reshape(x, [*[0] * (len(shape) - 1), pairs, 2])
    first, second = (b.gather(paired, np.array(index, np.int64), axis=-1) for index in (0, 1))
    turned = b.sub(b.mul(first, cos), b.mul(second, sin)), b.add(b.mul(second, cos), b.mul(first, sin))
    return stacked(b, turned, shape)


def repeats(rank):
    return np.array([1] * (rank - 1) + [2], np.int64)


HALVES = {f.__name__: f for f in (half_full, half_split, half_negated, half_pieces)}
NEIGHBOURS = {f.__name__: f for f in (neighbours_full, neighbours_pieces)}
SPELLINGS = HALVES | NEIGHBOURS

# Where cos and sin come from, each as (B or 1, S, P) ------------------------------------------------------------------


def from_positions(b, sizes, pairs):
    """Positions of each sequence times frequencies."""
    positions = b.node("Cast", b.input("positions", [*sizes], INT64), to=b.dtype)
    angles = b.mul(b.unsqueeze(positions, [-1]), frequencies(pairs).astype(FLOATS[b.dtype]))
    return b.node("Cos", angles), b.node("Sin", angles)


def from_table(b, sizes, pairs):
    """Rows of a table, gathered by the positions of each sequence."""
    positions = b.input("positions", [*sizes], INT64)
    angles = np.arange(12)[:, None] * frequencies(pairs)
    return [b.gather(f(angles).astype(FLOATS[b.dtype]), positions, axis=0) for f in (np.cos, np.sin)]


def from_start(b, sizes, pairs):
    """The first rows of a table, the same for every sequence."""
    angles = np.arange(12)[:, None] * frequencies(pairs)
    length = np.array([sizes[1]], np.int64)
    zero, axis = np.array([0], np.int64), np.array([0], np.int64)
    tables = (f(angles).astype(FLOATS[b.dtype]) for f in (np.cos, np.sin))
    return [b.unsqueeze(b.slice(b.constant(table), zero, length, axis), [0]) for table in tables]


SOURCES = {f.__name__: f for f in (from_positions, from_table, from_start)}
AXES = {"B N S D": (0, 2, 1, 3), "B S N D": None, "B S D": None}


def model(spelling, source, *, axes="B N S D", sizes=(2, 5, 3), pairs=4, passed=0, opset=17, dtype=TensorProto.FLOAT):
    """(model, feeds, expected) of one rotation of x (B, S, N, D)."""
    b = Build(opset=opset, dtype=dtype)
    batch, length, heads = sizes
    width = 2 * pairs + passed
    shape = {"B N S D": [batch, heads, length, width], "B S N D": [batch, length, heads, width]}.get(
        axes, [batch, length, width]
    )
    x = given = b.input("x", [batch, length, width] if axes == "B S D" else [batch, length, heads, width])
    if axes == "B N S D":
        x = b.transpose(x, perm=[0, 2, 1, 3])
    cos, sin = SOURCES[source](b, (batch, length), pairs)
    at = {"B N S D": [1], "B S N D": [2]}.get(axes)
    if at:
        cos, sin = b.unsqueeze(cos, at), b.unsqueeze(sin, at)
    turned, rest = (cut(b, x, 0, 2 * pairs), cut(b, x, 2 * pairs, LARGE)) if passed else (x, None)
    result = SPELLINGS[spelling](b, turned, cos, sin, pairs, [*shape[:-1], 2 * pairs])
    if rest is not None:
        result = b.concat(result, rest, axis=-1)
    feeds = {
        given: numbers(*([batch, length, width] if axes == "B S D" else [batch, length, heads, width]), dtype=dtype)
    }
    positions = np.broadcast_to(np.arange(length), (batch, length))
    if source != "from_start":
        positions = feeds["positions"] = np.random.default_rng(1).integers(0, 12, (batch, length))
    angles = positions[..., None] * frequencies(pairs)
    table = np.cos(angles), np.sin(angles)
    laid = feeds["x"].transpose(0, 2, 1, 3) if axes == "B N S D" else feeds["x"]
    if at:
        table = tuple(np.expand_dims(cache, at[0]) for cache in table)
    expected = rotation(laid, *table, interleaved=spelling in NEIGHBOURS)
    return b.model(result), feeds, expected


def name_of(spelling: str, passed: int) -> str:
    return ("partial_" if passed else "") + "rotary" + ("_interleaved" if spelling in NEIGHBOURS else "")


def check(model_, feeds, expected, name, *, tolerance=1e-5, **options):
    result = same(model_, feeds, tolerance=tolerance, **options)
    assert result.counts == {name: 1}
    assert operators(result.model)["RotaryEmbedding"] == 1
    (got,) = run(result.model, feeds).values()
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    return result


@pytest.mark.parametrize("opset", [13, 17, NEWEST])
@pytest.mark.parametrize("passed", [0, 3])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_computes_the_rotation(spelling, source, passed, opset):
    built = model(spelling, source, passed=passed, opset=opset)
    result = check(*built, name_of(spelling, passed))
    (node,) = (node for node in result.model.graph.node if node.op_type == "RotaryEmbedding")
    assert node.domain == ("" if opset >= 23 else "com.microsoft")


@pytest.mark.parametrize("opset", [17, NEWEST])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("spelling", ["half_full", "neighbours_pieces"])
@pytest.mark.parametrize("passed", [0, 2])
def test_heads_before_or_after_the_sequence_or_none(spelling, passed, axes, opset):
    for source in SOURCES:
        check(*model(spelling, source, axes=axes, passed=passed, opset=opset), name_of(spelling, passed))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (3, 1, 2), (2, 3, 1), (2, 2, 2), (4, 4, 4)])
@pytest.mark.parametrize("pairs", [1, 2, 4])
@pytest.mark.parametrize("axes", AXES)
def test_sizes_of_one_and_equal_sizes(sizes, pairs, axes):
    for spelling in ("half_full", "neighbours_full"):
        for opset in (17, NEWEST):
            built = model(spelling, "from_positions", sizes=sizes, pairs=pairs, axes=axes, opset=opset)
            result = same(built[0], built[1])
            assert sum(result.counts.values()) == 1, f"{spelling} {axes} {sizes} {pairs}: {result.near_misses}"
            (got,) = run(result.model, built[1]).values()
            np.testing.assert_allclose(got, built[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [17, NEWEST])
@pytest.mark.parametrize("passed", [0, 3])
@pytest.mark.parametrize("shape", [[8], [5, 8], [2, 5, 8], [2, 3, 5, 8], [2, 2, 3, 5, 8]])
def test_any_number_of_leading_axes(shape, passed, opset):
    b = Build(opset=opset)
    x = b.input("x", [*shape[:-1], 8 + passed])
    angles = b.input("angles", [*shape[-2:-1], 4])
    turned = cut(b, x, 0, 8) if passed else x
    y = half_full(b, turned, b.node("Cos", angles), b.node("Sin", angles), 4, shape)
    y = b.concat(y, cut(b, x, 8, LARGE), axis=-1) if passed else y
    feeds = {"x": numbers(*shape[:-1], 8 + passed), "angles": numbers(*shape[-2:-1], 4, seed=1)}
    expected = rotation(feeds["x"], np.cos(feeds["angles"]), np.sin(feeds["angles"]))
    check(b.model(y), feeds, expected, name_of("half_full", passed))


def test_dynamic_sizes_run_at_several_of_them():
    b = Build(opset=17)
    x = b.transpose(b.reshape(b.input("x", ["B", "S", 24]), [0, 0, 3, 8]), perm=[0, 2, 1, 3])
    cos, sin = (b.unsqueeze(cache, [1]) for cache in from_positions(b, ("B", "S"), 4))
    model_ = b.model(half_full(b, x, cos, sin, 4, [0, 3, 0, 8]))
    feeds = []
    for batch, length in ((1, 1), (2, 5), (5, 2), (3, 3)):
        rng = np.random.default_rng(batch)
        feeds.append({"x": numbers(batch, length, 24), "positions": rng.integers(0, 50, (batch, length))})
    result = same(model_, feeds)
    assert result.counts == {"rotary": 1}
    for feed in feeds:
        angles = feed["positions"][:, None, :, None] * frequencies(4)
        laid = feed["x"].reshape(*feed["x"].shape[:2], 3, 8).transpose(0, 2, 1, 3)
        (got,) = run(result.model, feed).values()
        np.testing.assert_allclose(got, rotation(laid, np.cos(angles), np.sin(angles)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_checked_rewrite_runs_both_sides_with_halves_that_are_equal(spelling, source):
    built = model(spelling, source, passed=2)
    (match,) = same(built[0], built[1], check=True).matches
    assert match.checked, match.unchecked


def test_cos_and_sin_are_made_once_for_all_layers():
    b = Build(opset=17)
    cos, sin = (b.unsqueeze(cache, [1]) for cache in from_positions(b, ("B", "S"), 4))
    cos, sin = (b.concat(cache, cache, axis=-1) for cache in (cos, sin))
    outputs = []
    for layer in range(4):
        x = b.input(f"x{layer}", ["B", 2, "S", 8])
        rotated = b.concat(b.neg(cut(b, x, 4, LARGE)), cut(b, x, 0, 4), axis=-1)
        outputs.append(b.add(b.mul(x, cos), b.mul(rotated, sin)))
    feeds = {f"x{layer}": numbers(3, 2, 5, 8, seed=layer) for layer in range(4)}
    feeds["positions"] = np.random.default_rng(0).integers(0, 50, (3, 5))
    result = same(b.model(*outputs), feeds)
    found = operators(result.model)
    assert found["RotaryEmbedding"] == 4
    assert (found["Range"], found["Cos"], found["Sin"], found["Concat"], found["Slice"]) == (1, 1, 1, 0, 0)


def test_a_position_from_the_end_of_the_table_is_gathered_and_not_given_to_the_kernel():
    built = model("half_full", "from_table")
    built[1]["positions"] = np.array([[-1, 0, 1, 2, 3], [0, -12, -2, 5, 6]])
    assert same(built[0], built[1]).counts == {"rotary": 1}


def test_the_halves_of_a_stored_table_are_compared():
    angles = np.arange(12)[:, None] * frequencies(4)
    wide = np.concatenate([angles, angles], -1)
    other = wide.copy()
    other[7, 2] += 0.5
    for table, count in ((wide, 1), (other, 0)):
        b = Build(opset=17)
        positions = b.input("positions", ["B", "S"], INT64)
        x = b.input("x", ["B", 2, "S", 8])
        caches = (b.gather(f(table).astype(np.float32), positions, axis=0) for f in (np.cos, np.sin))
        cos, sin = (b.unsqueeze(cache, [1]) for cache in caches)
        rotated = b.concat(b.neg(cut(b, x, 4, LARGE)), cut(b, x, 0, 4), axis=-1)
        feeds = {"x": numbers(2, 2, 3, 8), "positions": np.array([[0, 1, 2], [7, 8, 11]])}
        result = same(b.model(b.add(b.mul(x, cos), b.mul(rotated, sin))), feeds)
        assert sum(result.counts.values()) == count


@pytest.mark.parametrize("source", ["cosine", "scaled", "product", "contraction"])
def test_halves_that_are_computed_alike_are_equal(source):
    b = Build(opset=17)
    positions = b.node("Cast", b.unsqueeze(b.input("positions", ["B", "S"], INT64), [-1]), to=TensorProto.FLOAT)
    f = frequencies(4)
    if source in ("cosine", "scaled"):
        angles = b.mul(positions, f)
        angles = b.concat(angles, angles, axis=-1)
    elif source == "product":
        angles = b.mul(positions, np.concatenate([f, f]))
    else:
        angles = b.matmul(positions, np.concatenate([f, f])[None, :])
    cos, sin = (b.unsqueeze(b.node(op, angles), [1]) for op in ("Cos", "Sin"))
    if source == "scaled":
        cos, sin = b.mul(cos, 1.25), b.mul(sin, 1.25)
    outputs = []
    for name in ("q", "k"):
        x = b.input(name, ["B", 2, "S", 8])
        rotated = b.concat(b.neg(cut(b, x, 4, LARGE)), cut(b, x, 0, 4), axis=-1)
        outputs.append(b.add(b.mul(x, cos), b.mul(rotated, sin)))
    feeds = {"q": numbers(2, 2, 3, 8), "k": numbers(2, 2, 3, 8, seed=1), "positions": np.array([[0, 1, 2], [7, 8, 11]])}
    assert same(b.model(*outputs), feeds).counts == {"rotary": 2}


def test_a_first_part_that_is_no_neighbour_of_the_rest_is_put_beside_it():
    b = Build(opset=17)
    x, rest = b.input("x", ["B", 2, "S", 8]), b.input("rest", ["B", 2, "S", 3])
    cos, sin = (b.unsqueeze(cache, [1]) for cache in from_positions(b, ("B", "S"), 4))
    y = b.concat(half_full(b, x, cos, sin, 4, [0, 2, 0, 8]), rest, axis=-1)
    feeds = {"x": numbers(2, 2, 3, 8), "rest": numbers(2, 2, 3, 3), "positions": np.array([[0, 1, 2], [7, 8, 11]])}
    assert same(b.model(y), feeds).counts == {"partial_rotary": 1}


@pytest.mark.parametrize("opset", [17, NEWEST])
@pytest.mark.parametrize("dtype", [HALF, DOUBLE])
def test_other_element_types(dtype, opset):
    built = model("half_full", "from_table", dtype=dtype, opset=opset)
    result = same(built[0], built[1])
    assert sum(result.counts.values()) == (0 if dtype == DOUBLE else 1)


def test_the_standard_target():
    built = model("half_full", "from_positions", opset=23)
    check(*built, "rotary", target="onnx")
    older = model("half_full", "from_positions", opset=17)
    result = same(*older[:2], target="onnx")
    assert not result.counts
    assert any("RotaryEmbedding comes with opset 23" in text for _, text in misses(result, "rotary"))


# What is no rotation --------------------------------------------------------------------------------------------------


def lookalike(change):
    b = Build(opset=17)
    x, other = b.input("x", ["B", 2, "S", 8]), b.input("other", ["B", 2, "S", 8])
    angles = b.mul(b.node("Cast", b.unsqueeze(b.input("positions", ["B", "S"], INT64), [1, -1]), to=1), frequencies(4))
    second = (
        b.mul(angles, 2.0) if change == "unequal angles" else b.neg(angles) if change == "negated angles" else angles
    )
    emb = b.concat(angles, second, axis=-1)
    cos, sin = b.node("Cos", emb), b.node("Sin", emb)
    if change == "cos of another":
        cos = b.node("Cos", b.concat(angles, b.mul(angles, 0.5), axis=-1))
    low, high = cut(b, x, 0, 4), cut(b, x, 4, LARGE)
    if change == "wrong part":
        high = cut(b, x, 3, 7)
    if change == "another value":
        high = cut(b, other, 4, LARGE)
    parts = {
        "no sign": (high, low), "sign on the first": (high, b.neg(low)), "swapped": (b.neg(low), high),
        "both signs": (b.neg(high), b.neg(low)),
    }.get(change, (b.neg(high), low))  # fmt: skip
    rotated = b.concat(*parts, axis=-1)
    if change == "backwards":
        rotated = b.concat(b.neg(cut(b, x, -1, 3, -1)), cut(b, x, 3, -LARGE, -1), axis=-1)
    if change == "cos twice":
        sin = cos if change == "cos twice" else sin
    whole = {"another x": other}.get(change, x)
    left, right = b.mul(whole, cos), b.mul(rotated, sin)
    y = b.sub(left, right) if change == "subtracted" else b.add(left, right)
    if change == "read elsewhere":
        return b, y, right
    return b, y


LOOKALIKES = [
    "unequal angles", "negated angles", "cos of another", "wrong part", "another value", "no sign",
    "sign on the first", "swapped", "both signs", "backwards", "another x", "subtracted", "read elsewhere",
]  # fmt: skip
FEEDS = {
    "x": numbers(2, 2, 3, 8),
    "other": numbers(2, 2, 3, 8, seed=5),
    "positions": np.array([[0, 1, 2], [7, 8, 11]]),
}


@pytest.mark.parametrize("change", LOOKALIKES)
def test_what_is_no_rotation_is_left_alone(change):
    b, *outputs = lookalike(change)
    assert not same(b.model(*outputs), FEEDS).counts


def test_the_unchanged_lookalike_is_one():
    b, *outputs = lookalike("none")
    assert same(b.model(*outputs), FEEDS).counts == {"rotary": 1}


def test_cos_and_sin_exchanged_is_a_rotation_by_other_caches():
    b = Build(opset=17)
    x = b.input("x", ["B", 2, "S", 8])
    cos, sin = (b.unsqueeze(cache, [1]) for cache in from_positions(b, ("B", "S"), 4))
    feeds = {"x": numbers(2, 2, 3, 8), "positions": np.array([[0, 1, 2], [7, 8, 11]])}
    result = same(b.model(half_full(b, x, sin, cos, 4, [0, 2, 0, 8])), feeds)
    assert result.counts == {"rotary": 1}
    angles = feeds["positions"][:, None, :, None] * frequencies(4)
    (got,) = run(result.model, feeds).values()
    np.testing.assert_allclose(got, rotation(feeds["x"], np.sin(angles), np.cos(angles)), rtol=1e-5, atol=1e-5)


def test_cos_that_differs_from_head_to_head_is_found_and_not_written():
    b = Build(opset=17)
    x, angles = b.input("x", ["B", 2, "S", 8]), b.input("angles", [1, 2, "S", 4])
    y = half_full(b, x, b.node("Cos", angles), b.node("Sin", angles), 4, [0, 2, 0, 8])
    result = same(b.model(y), {"x": numbers(2, 2, 3, 8), "angles": numbers(1, 2, 3, 4)})
    assert not result.counts
    assert ("requirement", "cos and sin are not the same for all heads") in misses(result, "rotary")


def test_why_names_what_is_unmet():
    b, *outputs = lookalike("unequal angles")
    (place,) = fusion.why(b.model(*outputs), "rotary").places
    assert any(miss.kind == "same value" for miss in place.misses)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("spelling", ["half_pieces", "neighbours_full", "neighbours_pieces"])
def test_attention_may_read_what_lies_inside_a_rotation(spelling, cast):
    """Seen from attention, its queries are the parts before they are cast, or merged: it is written first."""
    b = Build(opset=17)
    cos, sin = (b.unsqueeze(cache, [1]) for cache in from_positions(b, ("B", "S"), 4))
    q, k, v = (b.input(name, ["B", 2, "S", 8]) for name in "qkv")
    q, k = (SPELLINGS[spelling](b, value, cos, sin, 4, [0, 2, -1, 8]) for value in (q, k))
    if cast:
        q, k = b.node("Cast", q, to=TensorProto.FLOAT), b.node("Identity", k)
    scores = b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), 8**-0.5)
    attended = b.transpose(b.matmul(b.softmax(scores, axis=-1), v), perm=[0, 2, 1, 3])
    feeds = {name: numbers(2, 2, 3, 8, seed=seed) for seed, name in enumerate("qkv")}
    result = same(b.model(b.reshape(attended, [0, 0, 16])), feeds | {"positions": np.array([[0, 1, 2], [7, 8, 11]])})
    assert result.counts == {name_of(spelling, 0): 2, "multi_head_attention": 1}
    found = operators(result.model)
    assert (found["RotaryEmbedding"], found["Sub"], found["Neg"]) == (2, 0, 0)


def test_attention_after_a_rotation_is_still_found():
    b = Build(opset=17)
    weight = numbers(16, 16, scale=0.2)
    x = b.input("x", ["B", "S", 16])
    cos, sin = (b.unsqueeze(cache, [1]) for cache in from_positions(b, ("B", "S"), 4))
    heads = [
        b.transpose(b.reshape(b.matmul(x, np.roll(weight, turn)), [0, 0, 2, 8]), perm=[0, 2, 1, 3]) for turn in range(3)
    ]
    q, k = (half_full(b, value, cos, sin, 4, [0, 2, 0, 8]) for value in heads[:2])
    scores = b.mul(b.matmul(q, b.transpose(k, perm=[0, 1, 3, 2])), 8**-0.5)
    attended = b.transpose(b.matmul(b.softmax(scores, axis=-1), heads[2]), perm=[0, 2, 1, 3])
    model_ = b.model(b.reshape(attended, [0, 0, 16]))
    feeds = {"x": numbers(2, 3, 16), "positions": np.array([[0, 1, 2], [7, 8, 11]])}
    assert same(model_, feeds).counts == {"rotary": 2, "multi_head_attention": 1}
