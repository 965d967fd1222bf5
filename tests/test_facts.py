"""Facts on small graphs: what each must say and must not say, where graphs are deep, nested and partly unknown."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from fusion.dims import broadcast, maximum, minimum, symbol, tail
from fusion.facts import Facts, IntTensor
from fusion.layout import Layout
from fusion.models.graph import Graph
from fusion.models.model import load

B, S, T, P = (symbol(name) for name in "BSTP")
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]


def node(op, inputs, outputs, domain="", **attributes):
    """A node; names separated by blanks, "-" is one left out."""
    names = [["" if name == "-" else name for name in text.split()] for text in (inputs, outputs)]
    return helper.make_node(op, *names, domain=domain, **attributes)


def info(name, dims, dtype=FLOAT):
    return helper.make_tensor_value_info(name, dtype, dims)


def facts_of(nodes, inputs, constants=None, opset=17, output=None, functions=()):
    """Facts of a model; inputs: name → dims, or (dims, dtype); constants: name → array."""
    infos = [info(name, *(spec if isinstance(spec, tuple) else (spec,))) for name, spec in inputs.items()]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    last = output or next(name for name in reversed(nodes[-1].output) if name)
    graph = helper.make_graph(nodes, "g", infos, [helper.make_empty_tensor_value_info(last)], tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions)
    return Facts(Graph(load(model, validate=False)))


def value(facts, name):
    """The value of that name, in the last scope that has one."""
    return next(scope.values[name] for scope in reversed(facts.graph.scopes) if name in scope.values)


def shape(facts, name):
    return facts.shape(value(facts, name))


def items(facts, name):
    found = facts.integers(value(facts, name))
    return None if found is None else found.items


# --- leaves -----------------------------------------------------------------------------------------------------------


def test_an_input_has_its_declared_dims_and_a_symbol_of_its_own_for_the_rest():
    facts = facts_of([node("Relu", "x", "y")], {"x": ["B", None, 4]})
    assert shape(facts, "y") == (B, symbol("x.1", own=True), 4)
    assert facts.dtype(value(facts, "y")) == FLOAT


def test_an_input_without_a_shape_has_no_rank():
    facts = facts_of([node("Relu", "x", "y"), node("Shape", "y", "s")], {"x": None})
    assert shape(facts, "y") is None
    assert facts.rank(value(facts, "s")) == 1
    assert items(facts, "s") is None


def test_an_initializer_that_is_an_input_too_is_no_constant():
    facts = facts_of([node("Reshape", "x shape", "y")], {"x": ["B", 4], "shape": ([2], INT64)}, {"shape": [2, -1]})
    assert not facts.is_constant(value(facts, "shape"))
    assert facts.constant(value(facts, "shape")) is None
    assert items(facts, "shape") is None
    assert facts.rank(value(facts, "y")) == 2
    assert not isinstance(shape(facts, "y")[0], int)


@pytest.mark.parametrize(
    ("attributes", "expected", "dtype"),
    [
        ({"value": numpy_helper.from_array(np.array([[7, 7]]))}, (7, 7), INT64),
        ({"value_ints": [3, 4]}, (3, 4), INT64),
        ({"value_int": 5}, (5,), INT64),
        ({"value_floats": [0.5, 0.5]}, None, FLOAT),
        ({"value_float": 0.5}, None, FLOAT),
    ],
)
def test_constant_nodes(attributes, expected, dtype):
    facts = facts_of([node("Constant", "", "c", **attributes), node("Identity", "c", "d")], {})
    assert items(facts, "c") == items(facts, "d") == expected
    assert facts.dtype(value(facts, "d")) == dtype
    assert facts.is_constant(value(facts, "c"))
    assert not facts.is_constant(value(facts, "d"))
    if dtype == FLOAT:
        assert facts.number(value(facts, "d")) == 0.5
        assert facts.constant(value(facts, "c")).dtype == np.float32


def test_large_payloads_are_read_only_by_constant(monkeypatch):
    facts = facts_of([node("MatMul", "x w", "y")], {"x": ["B", 64]}, {"w": np.zeros((64, 64), dtype=np.float32)})
    read = []
    original = facts.graph.model.array
    monkeypatch.setattr(facts.graph.model, "array", lambda tensor: read.append(tensor.name) or original(tensor))
    assert facts.number(value(facts, "w")) is None
    assert shape(facts, "y") == (B, 64)
    assert read == []
    assert facts.constant(value(facts, "w")).shape == (64, 64)
    assert read == ["w"]


# --- shape arithmetic -------------------------------------------------------------------------------------------------


def test_head_split_from_shape_arithmetic():
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "batch"),
        node("Unsqueeze", "batch axes", "batch1"),
        node("Concat", "batch1 rest", "target", axis=0),
        node("Reshape", "x target", "y"),
        node("Transpose", "y", "z", perm=[0, 2, 1, 3]),
    ]
    constants = {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([-1, 4, 8])}
    facts = facts_of(nodes, {"x": ["B", "S", 32]}, constants)
    assert items(facts, "target") == (B, -1, 4, 8)
    assert shape(facts, "z") == (B, 4, S, 8)
    source, layout = facts.through(value(facts, "y"))
    assert source is value(facts, "x")
    assert layout == Layout.identity((B, S, 32)).reshape((B, S, 4, 8))
    assert facts.layout(facts.graph.main.values["z"].producer).axes[1] == ((2, 1, 4),)


def test_a_shape_with_start_and_end():
    nodes = [node("Shape", "x", "s", start=1, end=-1), node("Shape", "x", "t", start=-2)]
    facts = facts_of(nodes, {"x": ["B", "S", 4, "T"]})
    assert items(facts, "s") == (S, 4)
    assert items(facts, "t") == (4, T)


@pytest.mark.parametrize(("dtype", "known"), [(FLOAT, True), (TensorProto.DOUBLE, True), (TensorProto.FLOAT16, False)])
def test_a_range_up_to_a_size_that_was_cast(dtype, known):
    """Positions in half precision end at 2048, whatever the size is."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [
        node("Shape", "x", "s", start=1, end=2),
        node("Squeeze", "s", "size"),
        node("Cast", "size", "limit", to=dtype),
        node("Range", "zero limit one", "y"),
    ]
    facts = facts_of(nodes, {"x": ["B", "S", 4]}, {"zero": np.array(0, kind), "one": np.array(1, kind)})
    assert (shape(facts, "y") == (S,)) is known


def test_a_range_with_fractions_is_of_unknown_length():
    nodes = [node("Range", "zero limit step", "y")]
    constants = {"zero": np.float32(0), "limit": np.float32(5), "step": np.float32(0.5)}
    (length,) = shape(facts_of(nodes, {"x": ["S"]}, constants), "y")
    assert not isinstance(length, int)


def test_an_expand_target_with_minus_one_is_read():
    """Exporters write Expand(x, Where(target == -1, ones, target)): a dimension is never -1."""
    nodes = [
        node("Shape", "x", "s"),
        node("Concat", "s minus", "target", axis=0),
        node("Equal", "target minus", "is_minus"),
        node("Where", "is_minus one target", "clean"),
        node("Expand", "v clean", "y"),
    ]
    constants = {"minus": np.array([-1]), "one": np.array([1]), "v": np.ones((1, 1, 5), dtype=np.float32)}
    facts = facts_of(nodes, {"x": ["B", "S"]}, constants)
    assert items(facts, "is_minus") == (False, False, True)
    assert items(facts, "clean") == (B, S, 1)
    assert shape(facts, "y") == (B, S, 5)
    assert facts.through(value(facts, "y"))[1].axes == (((None, 0, B),), ((None, 0, S),), ((2, 1, 5),))


def test_pads_written_through_a_transpose_and_a_reversed_slice():
    """TorchScript writes the pads of Pad as Reshape, Slice with step -1, Transpose, Reshape."""
    nodes = [
        node("Reshape", "p two", "a"),
        node("Slice", "a minus1 far zero minus1", "b"),
        node("Transpose", "b", "c", perm=[1, 0]),
        node("Reshape", "c minus1", "d"),
        node("Pad", "x d", "y"),
    ]
    constants = {
        "p": np.array([1, 2, 3, 4]),
        "two": np.array([-1, 2]),
        "minus1": np.array([-1]),
        "far": np.array([-(2**63) + 1]),
        "zero": np.array([0]),
    }
    facts = facts_of(nodes, {"x": ["B", "S"]}, constants)
    assert items(facts, "d") == (3, 1, 4, 2)
    assert shape(facts, "y") == (B + 7, S + 3)


def test_integers_that_wrap_around_are_not_followed():
    nodes = [node("Mul", "big big", "a"), node("Cast", "far", "b", to=TensorProto.INT32), node("Div", "minus two", "c")]
    constants = {"big": np.array([2**40]), "far": np.array([2**63 - 1]), "minus": np.array([-3]), "two": np.array([2])}
    facts = facts_of(nodes, {}, constants)
    assert items(facts, "a") is None
    assert items(facts, "b") is None
    assert items(facts, "c") == (-1,)  # towards zero


def test_sums_and_differences_of_dimensions():
    nodes = [
        node("Concat", "past new", "all", axis=1),
        node("Shape", "all", "s", start=1, end=2),
        node("Shape", "past", "p", start=1, end=2),
        node("Sub", "s p", "d"),
        node("Less", "p s", "less"),
        node("LessOrEqual", "p s", "less_or_equal"),
    ]
    facts = facts_of(nodes, {"past": ["B", "P", 4], "new": ["B", "S", 4]})
    assert shape(facts, "all") == (B, P + S, 4)
    assert items(facts, "d") == (S,)
    assert items(facts, "less") is None  # S may be 0
    assert items(facts, "less_or_equal") == (True,)


# --- slices -----------------------------------------------------------------------------------------------------------


def sliced(start, end, step=1, size="S", opset=17):
    names = {"starts": np.array([start]), "ends": np.array([end]), "axes": np.array([0]), "steps": np.array([step])}
    facts = facts_of([node("Slice", "x starts ends axes steps", "y")], {"x": [size]}, names, opset)
    return shape(facts, "y")[0], facts.through(value(facts, "y"))


@pytest.mark.parametrize(
    ("start", "end", "step", "length", "first"),
    [
        (0, 2**63 - 1, 1, S, 0),
        (3, 2**63 - 1, 1, S - minimum(S, 3), minimum(S, 3)),
        (0, 3, 1, minimum(S, 3), 0),
        (-4, 2**31 - 1, 1, minimum(S, 4), S - minimum(S, 4)),
        (0, -1, 1, maximum(0, S - 1), 0),
        (2**31 - 1, -(2**31), -1, S, S - 1),
        (0, 2**31 - 1, 2, (S + 1) // 2, 0),
        (-1, -(2**63) + 1, -1, S, S - 1),
    ],
)
def test_slices_of_a_symbolic_axis(start, end, step, length, first):
    found, (_, layout) = sliced(start, end, step)
    assert found == length
    assert layout.offsets == (first,)


@pytest.mark.parametrize("size", range(7))
@pytest.mark.parametrize("step", [1, 2, -1, -3])
def test_slices_of_a_known_axis_are_numpys(size, step):
    array = np.arange(size)
    for start in (-8, -3, -1, 0, 2, 5, 9):
        for end in (-9, -2, 0, 3, 6, 10):
            length, through = sliced(start, end, step, size)
            expected = array[start:end:step]
            if step < 0 and start + size < 0 and start != -1:  # numpy takes nothing there, onnxruntime one element
                assert not isinstance(length, int)
                continue
            assert length == len(expected)
            if len(expected) and through is not None:
                (factor,) = through[1].axes[0] or ((0, 1, 1),)
                got = [through[1].offsets[0] + factor[1] * i for i in range(factor[2])]
                assert got == expected.tolist()


def test_the_last_count_elements_where_count_may_be_zero():
    """x[-count:] is all of x where count is 0."""
    nodes = [node("Shape", "y", "n"), node("Neg", "n", "start"), node("Slice", "x start far axes", "z")]
    constants = {"far": np.array([2**63 - 1]), "axes": np.array([0])}
    facts = facts_of(nodes, {"x": [64], "y": ["T"]}, constants)
    assert shape(facts, "z") == (tail(64, T),)
    assert broadcast(tail(64, T), T) is T


def test_a_bound_of_unknown_sign_gets_a_symbol():
    nodes = [node("Shape", "y", "n"), node("Sub", "c n", "start"), node("Slice", "x start far axes", "z")]
    constants = {"far": np.array([2**63 - 1]), "axes": np.array([0]), "c": np.array([66])}
    facts = facts_of(nodes, {"x": [64], "y": ["T"]}, constants)
    assert shape(facts, "z") == (symbol("z.0", own=True),)
    assert facts.through(value(facts, "z")) is None


def test_slice_as_attributes_below_opset_10():
    nodes = [node("Slice", "x", "y", starts=[1], ends=[-1], axes=[1])]
    facts = facts_of(nodes, {"x": ["B", 6]}, opset=9)
    assert shape(facts, "y") == (B, 4)


# --- operators --------------------------------------------------------------------------------------------------------


def test_split_forms():
    x = {"x": ["B", 12]}
    old = facts_of([node("Split", "x", "a b", axis=1, split=[5, 7])], x, opset=11)
    new = facts_of([node("Split", "x sizes", "a b", axis=-1)], x, {"sizes": np.array([5, 7])})
    even = facts_of([node("Split", "x", "a b", axis=1)], x)
    for facts, second in ((old, 7), (new, 7), (even, 6)):
        assert shape(facts, "b") == (B, second)
        assert facts.through(value(facts, "b"))[1].offsets == (0, 12 - second)
    uneven = facts_of([node("Split", "x", "a b c", axis=0, num_outputs=3)], {"x": [7]}, opset=18)
    assert [shape(uneven, name)[0] for name in "abc"] == [3, 3, 1]


def test_squeeze_without_axes_needs_to_know_every_dimension():
    known = facts_of([node("Squeeze", "x", "y")], {"x": [1, 4, 1]})
    assert shape(known, "y") == (4,)
    unknown = facts_of([node("Squeeze", "x", "y")], {"x": [1, "S"]})
    assert shape(unknown, "y") is None


def test_reshape_zero_copies_unless_allowzero():
    target = {"t": np.array([0, 0, 2, -1])}
    facts = facts_of([node("Reshape", "x t", "y")], {"x": ["B", "S", 8]}, target)
    assert shape(facts, "y") == (B, S, 2, 4)
    empty = facts_of([node("Reshape", "x t", "y", allowzero=1)], {"x": ["B", 0]}, {"t": np.array([0, 5])})
    assert shape(empty, "y") == (0, 5)


def test_reshape_solves_one_unknown_entry_but_not_two():
    nodes = [node("Concat", "u four", "t", axis=0), node("Reshape", "x t", "y")]
    one = facts_of(nodes, {"x": ["B", "S", 8], "u": ([1], INT64)}, {"four": np.array([8])})
    assert shape(one, "y") == (B * S, 8)
    nodes[0] = node("Concat", "u u four", "t", axis=0)
    two = facts_of(nodes, {"x": ["B", "S", 8], "u": ([1], INT64)}, {"four": np.array([8])})
    assert shape(two, "y") == (symbol("y.0", own=True), symbol("y.1", own=True), 8)


def test_broadcasting_a_slice_of_a_position_table():
    nodes = [
        node("Shape", "x", "s", start=1, end=2),
        node("Slice", "table zero s one", "rows"),
        node("Add", "x rows", "y"),
    ]
    constants = {"table": np.zeros((1, 66, 4), np.float32), "zero": np.array([0]), "one": np.array([1])}
    facts = facts_of(nodes, {"x": ["B", "S", 4]}, constants)
    assert shape(facts, "rows") == (1, minimum(S, 66), 4)
    assert shape(facts, "y") == (B, S, 4)
    over = Layout.identity((B, S, 4)).broadcast_over(shape(facts, "rows"))
    assert over.axes == (((None, 0, B),), ((1, 1, S),), ((2, 1, 4),))
    assert over.whole(1) == 1


def test_einsum():
    operands = {"q": ["B", 4, "S", 8], "k": ["B", 4, "T", 8]}
    facts = facts_of([node("Einsum", "q k", "y", equation="b...id, b...jd->b...ij")], operands)
    assert shape(facts, "y") == (B, 4, S, T)
    facts = facts_of([node("Einsum", "q", "y", equation="ij->ji")], {"q": None})
    assert facts.rank(value(facts, "y")) == 2


def test_a_declared_name_of_an_intermediate_value_is_no_fact():
    nodes = [node("Mystery", "x", "y", domain="local"), node("Relu", "y", "z")]
    graph = helper.make_graph(nodes, "g", [info("x", ["B", 4])], [info("z", None)], value_info=[info("y", ["S", 4])])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    facts = Facts(Graph(load(helper.make_model(graph, opset_imports=imports), validate=False)))
    assert shape(facts, "z") == (symbol("y.0", own=True), 4)
    assert facts.dtype(value(facts, "z")) == FLOAT


@pytest.mark.parametrize(
    ("op", "inputs", "shapes", "attributes", "expected"),
    [
        ("SkipLayerNormalization", "x x g b", "yms", {}, {"y": (B, S, 32), "s": (B, S, 32), "m": (B, S, 1)}),
        ("BiasGelu", "x g", "y", {}, {"y": (B, S, 32)}),
        ("FastGelu", "x g", "y", {}, {"y": (B, S, 32)}),
        ("QuickGelu", "x", "y", {}, {"y": (B, S, 32)}),
        ("Attention", "x w bias", "y", {"num_heads": 4}, {"y": (B, S, 32)}),
        ("MultiHeadAttention", "x x x", "y", {"num_heads": 4}, {"y": (B, S, 32)}),
        ("FusedMatMul", "x x", "y", {"transB": 1}, {"y": (B, S, S)}),
    ],
)
def test_operators_of_the_runtime(op, inputs, shapes, attributes, expected):
    ones = np.ones(32, np.float32)
    constants = {"g": ones, "b": ones, "w": np.ones((32, 96), np.float32), "bias": np.ones(96, np.float32)}
    outputs = {"y": "y", "yms": "y m - s"}[shapes]
    nodes = [node(op, inputs, outputs, domain="com.microsoft", **attributes)]
    facts = facts_of(nodes, {"x": ["B", "S", 32]}, constants)
    for name, dims in expected.items():
        assert shape(facts, name) == dims
    assert facts.dtype(value(facts, "y")) == FLOAT


def test_attention_with_a_cache():
    nodes = [node("Attention", "q k v - pk pv", "y kk vv", q_num_heads=4, kv_num_heads=2)]
    inputs = {"q": ["B", "S", 32], "k": ["B", "S", 16], "v": ["B", "S", 20]}
    inputs |= {"pk": ["B", 2, "P", 8], "pv": ["B", 2, "P", 10]}
    facts = facts_of(nodes, inputs, opset=23)
    assert shape(facts, "y") == (B, S, 40)
    assert shape(facts, "kk") == (B, 2, P + S, 8)
    assert shape(facts, "vv") == (B, 2, P + S, 10)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_scale_computed_from_a_shape():
    nodes = [
        node("Shape", "x", "s", start=-1),
        node("Cast", "s", "f", to=FLOAT),
        node("Sqrt", "f", "r"),
        node("Div", "one r", "scale"),
        node("Reshape", "scale shape", "scale4"),
    ]
    constants = {"one": np.float32(1), "shape": np.array([1, 1, 1, 1])}
    facts = facts_of(nodes, {"x": ["B", "S", 8]}, constants)
    assert facts.number(value(facts, "scale4")) == float(np.float32(1) / np.sqrt(np.float32(8)))


def test_numbers_round_as_their_type_does_and_are_absent_where_nothing_is():
    nodes = [
        node("ConstantOfShape", "none", "empty"),
        node("Cast", "third", "half", to=TensorProto.FLOAT16),
        node("Cast", "large", "not_known", to=TensorProto.INT32),
    ]
    constants = {
        "none": np.array([0]),
        "third": np.float32(1 / 3),
        "large": np.float32(1e30),
        "nan": np.float32(np.nan),
    }
    facts = facts_of(nodes, {}, constants)
    assert facts.number(value(facts, "half")) == float(np.float16(1 / 3))
    assert facts.number(value(facts, "not_known")) is None
    assert facts.number(value(facts, "nan")) is None


def test_a_where_with_a_known_condition():
    nodes = [
        node("ConstantOfShape", "s", "c", value=numpy_helper.from_array(np.array([True]))),
        node("Where", "c a b", "y"),
    ]
    facts = facts_of(nodes, {"s": ([2], INT64)}, {"a": np.float32(2), "b": np.float32(3)})
    assert facts.number(value(facts, "y")) == 2.0
    assert facts.dtype(value(facts, "c")) == BOOL


# --- scopes -----------------------------------------------------------------------------------------------------------


def branch(nodes, output):
    return helper.make_graph(nodes, output, [], [helper.make_empty_tensor_value_info(output)])


def test_bodies_see_outer_values_and_an_if_knows_what_both_branches_agree_on():
    then = branch([node("Relu", "x", "t")], "t")
    other = branch([node("Slice", "x zero two one", "e")], "e")
    nodes = [node("If", "c", "y", then_branch=then, else_branch=other)]
    facts = facts_of(
        nodes, {"x": ["B", "S"], "c": ([], BOOL)}, {"zero": np.array([0]), "two": np.array([2]), "one": np.array([1])}
    )
    assert facts.shape(value(facts, "t")) == (B, S)
    assert facts.shape(value(facts, "e")) == (B, minimum(S, 2))
    assert shape(facts, "y") == (B, symbol("y.1", own=True))
    assert facts.dtype(value(facts, "y")) == FLOAT


def test_what_a_body_obeys_is_not_learned():
    """A branch may never run: its MatMul says nothing about S and T."""
    then = branch([node("MatMul", "x y", "t")], "t")
    other = branch([node("Relu", "x", "e")], "e")
    nodes = [node("If", "c", "z", then_branch=then, else_branch=other)]
    facts = facts_of(nodes, {"x": ["B", "S"], "y": ["T", "B"], "c": ([], BOOL)})
    facts.learn()
    assert facts.equal == {}


def test_the_same_name_in_two_functions_is_two_symbols():
    one, two = (
        helper.make_function("local", name, ["a"], ["r"], [node("NonZero", "a", "r")], IMPORTS) for name in ("F", "G")
    )
    facts = facts_of([node("F", "x", "y", domain="local")], {"x": ["B"]}, functions=[one, two])
    first, second = (scope.values["r"] for scope in facts.graph.scopes[1:])
    assert facts.shape(first) == (symbol("1:r.0", own=True), symbol("1:r.1", own=True))
    assert facts.shape(second) == (symbol("2:r.0", own=True), symbol("2:r.1", own=True))


# --- equalities -------------------------------------------------------------------------------------------------------


def test_a_contraction_teaches_that_a_mask_is_as_long_as_the_keys():
    nodes = [
        node("Concat", "past new", "k", axis=1),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "scores"),
        node("Add", "scores mask", "masked"),
        node("MatMul", "masked k", "y"),
    ]
    facts = facts_of(nodes, {"past": ["B", "P", 8], "new": ["B", "S", 8], "q": ["B", "S", 8], "mask": ["B", 1, "T"]})
    assert shape(facts, "masked")[2] == broadcast(P + S, T)
    facts.learn()
    assert shape(facts, "masked")[2] == P + S
    assert shape(facts, "mask")[2] is T  # 1 or full: the sum says only what the sum is


def test_a_reshape_settles_an_unreadable_entry():
    """Two entries nobody can read are settled by the contraction that follows."""
    nodes = [
        node("Concat", "u u eight", "t", axis=0),
        node("Reshape", "x t", "y"),
        node("MatMul", "w y", "z"),
    ]
    constants = {"eight": np.array([8]), "w": np.ones((3, 4), np.float32)}
    facts = facts_of(nodes, {"x": ["S", 32], "u": ([1], INT64)}, constants)
    facts.learn()
    facts.learn()
    assert shape(facts, "y") == (S, 4, 8)


@pytest.mark.parametrize(("sizes", "learned"), [([2, 2, 2, 2], 2), ([3, 3, 3, 3], 3)])
def test_sizes_of_a_split_say_how_long_the_whole_is(sizes, learned):
    """Heads along the batch, for a batch that was written down: no other one gets through."""
    nodes = [node("Concat", "x x x x", "c", axis=0), node("Split", "c sizes", "a b d e", axis=0)]
    facts = facts_of(nodes, {"x": ["B", "S"]}, {"sizes": np.array(sizes)})
    facts.learn()
    assert facts.equal == {B: learned}
    assert shape(facts, "x") == (learned, S)


def test_several_broadcasts_are_settled_by_one_reshape():
    nodes = [
        node("Add", "a b", "x"),
        node("Shape", "a", "sa", end=1),
        node("Shape", "b", "sb", start=1, end=2),
        node("Concat", "sa sb four", "t", axis=0),
        node("Reshape", "x t", "y"),
    ]
    facts = facts_of(nodes, {"a": ["B", "S", 32], "b": ["P", "T", 32]}, {"four": np.array([4, 8])})
    facts.learn()
    facts.learn()
    assert shape(facts, "x") == (B, T, 32)
    assert shape(facts, "y") == (B, T, 4, 8)


def test_forget_drops_what_is_asked_and_nothing_else():
    facts = facts_of([node("Relu", "x", "y"), node("Relu", "y", "z")], {"x": ["B"]})
    y, z = value(facts, "y"), value(facts, "z")
    assert facts.shape(z) == (B,)
    y.producer.key = "Unknown"
    facts.forget([y])
    assert facts.shape(y) is None
    assert facts.shape(z) == (B,)


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "integers", "reshape"])
def test_a_graph_may_be_deeper_than_the_stack(kind):
    depth = 20_000
    nodes = [node("Shape", "x", "n0")] if kind == "integers" else [node("Relu", "x", "n0")]
    for i in range(depth):
        if kind == "relu":
            nodes.append(node("Relu", f"n{i}", f"n{i + 1}"))
        elif kind == "integers":
            nodes.append(node("Add", f"n{i} one", f"n{i + 1}"))
        else:
            nodes += [node("Shape", f"n{i}", f"s{i}"), node("Reshape", f"n{i} s{i}", f"n{i + 1}")]
    facts = facts_of(nodes, {"x": ["B", "S"]}, {"one": np.array([1])})
    last = value(facts, f"n{depth}")
    if kind == "integers":
        assert facts.integers(last) == IntTensor((2,), (B + depth, S + depth))
    else:
        assert facts.shape(last) == (B, S)


def test_dimensions_do_not_explode():
    """A graph whose dims double at every step: x.0 becomes x.0 * x.0 by Kronecker-like reshapes."""
    nodes = []
    for i in range(60):
        nodes += [
            node("Shape", f"x{i}", f"s{i}"),
            node("Add", f"s{i} s{i}", f"d{i}"),
            node("Mul", f"d{i} s{i}", f"m{i}"),
        ]
        nodes += [node("Add", f"m{i} s{i}", f"t{i}"), node("ConstantOfShape", f"t{i}", f"x{i + 1}")]
    facts = facts_of(nodes, {"x0": ["B", "S"]})
    assert facts.rank(value(facts, "x60")) == 2


def test_a_normalisation_of_the_runtime_has_the_type_of_its_scale():
    half = np.ones(4, np.float16)
    facts = facts_of([node("SimplifiedLayerNormalization", "x g", "y", axis=-1)], {"x": ["B", 4]}, {"g": half})
    assert facts.dtype(value(facts, "y")) == TensorProto.FLOAT16
    old = facts_of([node("LayerNormalization", "x g g", "y m", axis=-1)], {"x": ["B", 4]}, {"g": half}, opset=13)
    assert old.dtype(value(old, "y")) == TensorProto.FLOAT16
    assert shape(old, "m") == (B, 1)


def test_a_squeeze_of_an_axis_that_is_not_1_says_nothing():
    facts = facts_of([node("Squeeze", "x axes", "y")], {}, {"x": np.arange(4), "axes": np.array([0])})
    assert facts.integers(value(facts, "y")) is None
