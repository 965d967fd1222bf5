"""Two models, the same inputs: what must be found equal, and what must be found different."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from rich.console import Console

from fusion.errors import ModelError
from fusion.verifying.feeds import MASKS, Feeder, declared_inputs
from fusion.verifying.runtime import Refused, Session
from fusion.verifying.verify import VerifyReport, compute_precision, verify

MODELS = Path(__file__).parent / "models"
EXPORTS = sorted(path.stem for path in MODELS.glob("*.onnx"))


def model(text: str, opset: int = 17) -> ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')


GELU = """
g (float[batch, n] x) => (float[batch, n] y) <float two = {2.0}, float half = {0.5}, float one = {1.0}> {
  root = Sqrt (two) s = Div (x, root) e = Erf (s) a = Add (e, one) m = Mul (x, a) y = Mul (m, half)
}"""
GELU_SPELT_OTHERWISE = """
g (float[batch, n] x) => (float[batch, n] y) <float root = {0.70710677}, float half = {0.5}, float one = {1.0}> {
  h = Mul (half, x) s = Mul (root, x) e = Erf (s) a = Add (one, e) y = Mul (a, h)
}"""
ATTENTION = """
g (float[b, s, 8] x, int64[b, s] attention_mask) => (float[b, s, 8] y)
<float one = {1.0}, float fill = {-10000.0}, int64[1] axis = {1}, float scale = {0.3535534}> {
  t = Transpose <perm = [0, 2, 1]> (x) raw = MatMul (x, t) scores = Mul (raw, scale)
  m = Cast <to = 1> (attention_mask) i = Sub (one, m) f = Mul (i, fill) bias = Unsqueeze (f, axis)
  masked = Add (scores, bias) p = Softmax (masked) y = MatMul (p, x)
}"""
PAST = """
g (float[b, new, 4] x, float[b, past, 4] cache, float[b, total] weights) => (float[b, total, 4] y)
<int64[1] last = {-1}> { all = Concat <axis = 1> (cache, x) w = Unsqueeze (weights, last) y = Mul (all, w) }"""


def names(report: VerifyReport) -> list[tuple[str, str]]:
    return [(d.kind, d.name) for d in report.differences]


# Equal -------------------------------------------------------------------------------------------------------


def test_two_spellings_of_one_formula_are_equal() -> None:
    report = verify(model(GELU), model(GELU_SPELT_OTHERWISE))
    assert report.equal
    assert (report.runs, report.skipped) == (8, 0)
    assert report.engines == ("onnxruntime", "onnxruntime")
    assert 0 < report.worst["y"] < 1e-5


@pytest.mark.parametrize("name", EXPORTS)
def test_a_real_export_is_equal_to_itself_on_drawn_and_on_given_inputs(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    drawn, given = verify(path, path), verify(path, path, inputs=MODELS / f"{name}.npz")
    assert drawn.equal, drawn.differences
    assert given.equal, given.differences
    assert set(drawn.worst.values()) == {0.0}


def test_an_optimized_session_computes_the_same_as_the_plain_one() -> None:
    path = MODELS / "bert__ts17_sdpa.onnx"
    assert verify(path, path, optimized=True, runs=2).equal


def test_the_answer_is_the_same_every_time() -> None:
    first, second = (verify(model(ATTENTION), model(ATTENTION.replace("0.3535534", "0.5"))) for _ in range(2))
    assert first.to_json() == second.to_json()


# Different ---------------------------------------------------------------------------------------------------


def test_another_constant_is_found_and_the_output_is_named() -> None:
    report = verify(model(GELU), model(GELU.replace("two = {2.0}", "two = {3.0}")))
    assert not report.equal
    assert names(report) == [("value", "y")]
    assert "output 'y'" in report.differences[0].sentence


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0.3535534", "0.25"),  # the scale
        ("0.3535534", "0.354"),
        ("masked = Add (scores, bias) p = Softmax (masked)", "p = Softmax (scores)"),  # the mask
        ("p = Softmax (masked)", "p = Softmax <axis = 1> (masked)"),
        ("fill = {-10000.0}", "fill = {-1.0}"),
    ],
)
def test_changes_of_attention_are_found(before: str, after: str) -> None:
    assert before in ATTENTION
    assert not verify(model(ATTENTION), model(ATTENTION.replace(before, after))).equal


def test_the_fill_matters_only_where_a_row_masks_every_key() -> None:
    """-10000 and -6000 are both far below every score; a row without any key shows the scores' rounding only."""
    report = verify(model(ATTENTION), model(ATTENTION.replace("-10000.0", "-6000.0")))
    assert report.equal
    assert "mask: empty row" in report.outputs[0].feed
    assert report.worst["y"] > 1e-4


def scalars(proto: ModelProto) -> list[TensorProto]:
    constants = [a.t for n in proto.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return [t for t in [*proto.graph.initializer, *constants] if not t.dims and t.data_type == TensorProto.FLOAT]


@pytest.mark.parametrize("name", ["bert_seqcls__ts14_eager", "distilbert__ts11_eager", "vit__ts17_eager"])
def test_a_changed_scalar_of_a_real_export_is_found(name: str) -> None:
    """The square root of two in Gelu, the scale of attention, the exponent of LayerNorm: whatever is no epsilon."""
    path = MODELS / f"{name}.onnx"
    count, changed = len(scalars(onnx.load(path))), 0
    for index in range(count):
        proto = onnx.load(path)
        tensor = scalars(proto)[index]
        value = float(numpy_helper.to_array(tensor))
        if 1e-3 < abs(value) < 1e3:
            tensor.CopyFrom(numpy_helper.from_array(np.array(value * 1.05, "float32"), tensor.name))
            changed += 1
            # 0.5 and 2.0 of different places may be one tensor each: every one of them has to show.
            assert not verify(path, proto, runs=2).equal, (index, value)
    assert changed >= 4


def test_a_missing_a_new_and_a_renamed_output_are_named() -> None:
    two = "g (float[n] x) => (float[n] y, float[n] z) { y = Neg (x) z = Abs (x) }"
    report = verify(model(two), model(two.replace("z", "w")))
    assert names(report) == [("output", "z"), ("output", "w")]
    assert report.outputs[0].compared == 8  # what both have is compared all the same


def test_outputs_in_another_order_are_a_difference_though_their_values_agree() -> None:
    two = "g (float[n] x) => (float[n] y, float[n] z) { y = Neg (x) z = Abs (x) }"
    report = verify(model(two), model(two.replace("(float[n] y, float[n] z)", "(float[n] z, float[n] y)")))
    assert [d.sentence for d in report.differences] == ["the outputs are in another order: y, z became z, y"]


def test_another_element_type_is_a_difference() -> None:
    text = "g (float[n] x) => (float[n] y) { y = Neg (x) }"
    other = "g (float[n] x) => (double[n] y) { m = Neg (x) y = Cast <to = 11> (m) }"
    report = verify(model(text), model(other))
    assert names(report) == [("output", "y"), ("value", "y")]
    assert report.differences[0].sentence == "output 'y': element type float became double"
    assert "element type float32 became float64" in report.differences[1].sentence


def test_declared_shapes_differ_only_where_they_contradict() -> None:
    text = "g (float[n, 3] x) => (float[n, 3] y) { y = Neg (x) }"
    assert verify(model(text), model(text.replace("float[n, 3] y", "float[k, l] y"))).equal
    report = verify(model(text), model(text.replace("float[n, 3] x", "float[n, 4] x")))
    assert ("input", "x") in names(report)


def test_a_missing_input_is_a_difference() -> None:
    text = "g (float[n] x, float[n] y) => (float[n] z) { z = Add (x, y) }"
    assert ("input", "y") in names(verify(model(text), model("g (float[n] x) => (float[n] z) { z = Add (x, x) }")))


def test_sizes_that_only_the_second_model_refuses_are_a_difference() -> None:
    text = "g (float[b, s, 6] x) => (float[b, s, 2, 3] y) <int64[4] to = {0, 0, 2, 3}> { y = Reshape (x, to) }"
    report = verify(model(text), model(text.replace("{0, 0, 2, 3}", "{2, 7, 2, 3}")))
    assert {d.kind for d in report.differences} == {"refused"}
    assert "b=1, s=1" in report.differences[0].feed


def test_sizes_that_both_models_refuse_are_skipped_and_counted() -> None:
    text = "g (float[b, 6] x) => (float[o, 3] y) <int64[2] to = {4, 3}> { y = Reshape (x, to) }"
    report = verify(model(text), model(text))
    assert report.equal
    assert report.runs + report.skipped == 8
    assert report.skipped >= 4  # only b = 2 fits


def test_a_second_model_that_does_not_load_is_a_difference() -> None:
    report = verify(model(GELU), model(GELU.replace("Erf", "Erff")))
    assert not report.equal
    assert names(report) == [("load", "")]
    assert "Erff" in report.differences[0].sentence


def test_nan_in_one_model_only_is_found() -> None:
    text = "g (float[n] x) => (float[n] y) { a = Abs (x) y = Sqrt (a) }"
    report = verify(model(text), model("g (float[n] x) => (float[n] y) { y = Sqrt (x) }"))
    assert "NaN differs" in report.differences[0].sentence


def test_a_random_output_is_not_compared_and_said_to_be_unsteady() -> None:
    text = "g (float[n] x) => (float[n] y, float[n] z) { y = RandomNormalLike (x) z = Neg (x) }"
    report = verify(model(text), model(text))
    assert report.equal
    assert [(o.name, o.compared, o.unsteady) for o in report.outputs] == [("y", 0, 8), ("z", 8, 0)]
    alone = verify(*[model("g (float[n] x) => (float[n] y) { y = RandomNormalLike (x) }")] * 2)
    assert not alone.equal  # nothing was compared


# Inputs that are drawn ----------------------------------------------------------------------------------------


def feeder(text: str, **given: object) -> Feeder:
    proto = model(text)
    session = Session(proto)
    return Feeder(declared_inputs(proto), session.run, **given)  # type: ignore[arg-type]


def test_every_dimension_gets_several_sizes_and_one_name_one_size() -> None:
    draws = [feed.values for feed, _ in zip(feeder(ATTENTION), range(8), strict=False)]
    shapes = [values["x"].shape for values in draws]
    assert [values["attention_mask"].shape for values in draws] == [shape[:2] for shape in shapes]
    assert {shape[0] for shape in shapes} >= {1, 2, 3, 4}
    assert (1, 1, 8) in shapes
    assert (4, 4, 8) in shapes  # the trap of equal sizes


def test_masks_come_full_padded_on_both_sides_with_holes_and_with_an_empty_row() -> None:
    seen = {}
    for feed, _ in zip(feeder(ATTENTION, sizes={"b": 3, "s": 9}), range(len(MASKS)), strict=False):
        kind = next(kind for kind in MASKS if f"mask: {kind}" in feed.label)
        seen[kind] = feed.values["attention_mask"]
    assert set(seen) == set(MASKS)
    assert seen["full"].all()
    assert not seen["empty row"][0].any()
    assert seen["empty row"][1:].all()
    assert (np.diff(seen["right padding"]) <= 0).all()
    assert (np.diff(seen["left padding"]) >= 0).all()
    assert seen["left padding"][:, -1].all()
    assert (np.diff(seen["holes"]) != 0).any()
    assert seen["holes"].any(axis=1).all()


def test_a_truth_value_is_true_and_false() -> None:
    text = """g (bool c, float[n] x) => (float[n] y) {
      y = If (c) <then_branch = t () => (float[n] a) { a = Neg (x) },
                  else_branch = e () => (float[n] b) { b = Abs (x) }> }"""
    assert {bool(feed.values["c"]) for feed, _ in zip(feeder(text), range(8), strict=False)} == {True, False}
    assert not verify(model(text), model(text.replace("Abs", "Exp"))).equal


def test_the_size_of_a_vocabulary_is_found_by_trying() -> None:
    text = "g (int64[n] ids, float[20, 4] table) => (float[n, 4] y) { y = Gather (table, ids) }"
    drawn = [feed.values["ids"] for feed, _ in zip(feeder(text), range(8), strict=False)]
    assert max(int(ids.max()) for ids in drawn) in range(2, 8)  # 8 is the largest tried range that 20 rows hold
    assert min(int(ids.min()) for ids in drawn) == 0


def test_integers_that_mask_without_saying_so_are_kept_to_zero_and_one() -> None:
    text = """g (float[n] x, int64[n] keep) => (float[n] y) <float one = {1.0}> {
      k = Cast <to = 1> (keep) d = Sub (one, k) r = Sqrt (d) y = Add (x, r) }"""
    for feed, _ in zip(feeder(text), range(8), strict=False):
        assert set(np.unique(feed.values["keep"])) <= {0, 1}


def test_a_total_of_past_and_new_positions_is_found_by_trying() -> None:
    for feed, _ in zip(feeder(PAST), range(4), strict=False):
        cache, x, weights = (feed.values[name] for name in ("cache", "x", "weights"))
        assert weights.shape[1] == cache.shape[1] + x.shape[1]
    report = verify(model(PAST), model(PAST))
    assert (report.equal, report.skipped) == (True, 0)


def test_dimensions_of_inputs_that_are_alike_are_tried_as_equal() -> None:
    """An exporter gives every cache a length of its own name, and nothing says that they are equal."""
    layers = [(f"float[b{i}, 2, past{i}, 4] k{i}", f"float[c{i}, 2, own{i}, 4] v{i}") for i in range(12)]
    caches = ", ".join(cache for layer in layers for cache in layer)
    names = ", ".join(f"k{i}, v{i}" for i in range(12))
    proto = model(f"""g (float[b, new] ids, float[d, total] weights, {caches}) => (float[n, m] y)
        {{ sum = Sum ({names}) k = ReduceMean <axes = [1, 3], keepdims = 0> (sum)
           all = Concat <axis = 1> (k, ids) y = Mul (all, weights) }}""")
    tried = []

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tried.append(values)
        return Session(proto).run(values)

    for feed, _ in zip(Feeder(declared_inputs(proto), run), range(4), strict=False):
        past = feed.values["k0"].shape[2]
        assert all(feed.values[f"{name}{i}"].shape[2] == past for name in "kv" for i in range(12))
        assert feed.values["weights"].shape[1] == past + feed.values["ids"].shape[1]
    assert len(tried) < 1000


def test_a_dimension_named_by_an_expression_has_its_size() -> None:
    proto = model("g (float[a] x, float[b] y) => (float[c] z) { z = Concat <axis = 0> (x, y) }")
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ["2*a + b"]))
    feed = next(iter(Feeder(declared_inputs(proto), lambda values: {})))
    assert len(feed.values["w"]) == 2 * len(feed.values["x"]) + len(feed.values["y"])


def test_signals_get_the_length_that_a_convolution_needs() -> None:
    text = "g (float[b, 1, samples] x, float[2, 1, 50] w) => (float[b, 2, o] y) { y = Conv (x, w) }"
    assert next(iter(feeder(text))).values["x"].shape[2] >= 50


def test_a_decoder_that_takes_one_new_token_only() -> None:
    text = """g (float[b, new, 4] x, float[b, past, 4] k, float[b, total] mask) => (float[b, total, 4] y)
      <int64[1] at = {1}> { single = Squeeze (x, at) again = Unsqueeze (single, at) whole = Concat <axis = 1> (k, again)
      last = Constant <value_ints = [-1]> () m = Unsqueeze (mask, last) y = Mul (whole, m) }"""
    report = verify(model(text), model(text))
    assert report.equal
    assert report.runs > 1


def test_sizes_are_not_guessed_beyond_what_memory_holds() -> None:
    tried: list[int] = []

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tried.append(values["x"].size)
        raise Refused("no")

    with pytest.raises(ModelError, match="or sizes of its named dimensions"):
        Feeder(declared_inputs(model("g (float[a, b, c, d] x) => (float[a, b, c, d] y) { y = Abs (x) }")), run)
    assert tried
    assert max(tried) <= 2**24


def test_the_runtimes_own_words_say_why_no_inputs_were_found() -> None:
    text = """g (float[n, m] x) => (float[n, k] y)
        { s = Constant <value_ints = [41, 53]> () w = ConstantOfShape (s) y = MatMul (x, w) }"""
    with pytest.raises(ModelError, match="MatMul dimension mismatch"):
        verify(model(text), model(text))


def test_wanted_sizes_are_kept_and_unknown_ones_are_an_error() -> None:
    assert all("n=5" in feed.label for feed, _ in zip(feeder(GELU, sizes={"n": 5}), range(4), strict=False))
    with pytest.raises(ModelError, match="no dimension 'm': the model's named dimensions are batch, n"):
        verify(model(GELU), model(GELU), sizes={"m": 5})


def test_half_precision_inside_counts_for_outputs_in_single_precision() -> None:
    text = "g (float[n] x) => (float[n] y) { h = Cast <to = 10> (x) m = Mul (h, h) y = Cast <to = 1> (m) }"
    assert compute_precision(model(text)) == np.dtype("float16")
    assert compute_precision(model(GELU)) == np.dtype("float32")
    single = "g (float[n] x) => (float[n] y) { y = Mul (x, x) }"
    assert verify(model(text), model(single)).equal
    stored = "g (float[n] x) => (float[n] y) <float16 c = {3}> { w = Cast <to = 1> (c) y = Mul (x, w) }"
    assert compute_precision(model(stored)) == np.dtype("float32")


def test_single_precision_inside_counts_for_outputs_in_double() -> None:
    text = "g (double[n] x) => (double[n] y) { h = Cast <to = 1> (x) m = Mul (h, h) y = Cast <to = 11> (m) }"
    double = "g (double[n] x) => (double[n] y) { y = Mul (x, x) }"
    assert verify(model(text), model(double)).equal
    assert compute_precision(model(double)) is None
    assert not verify(model(double), model(text)).equal


def test_an_output_in_double_of_what_is_computed_in_single_precision_is_judged_as_single() -> None:
    text = "g (float[n, 8] x) => (double[n, 8] y) {{ {} y = Cast <to = 11> (s) }}"
    plain, other = (text.format(body) for body in ("e = Exp (x) s = Mul (e, e)", "t = Add (x, x) s = Exp (t)"))
    assert verify(model(plain), model(other)).equal
    double = "g (float[n] x) => (double[n] y) { d = Cast <to = 11> (x) y = Mul (d, d) }"
    assert compute_precision(model(double)) is None


def test_half_precision_in_a_body_or_a_function_counts() -> None:
    function = """g (float[n] x) => (float[n] y) { y = f.half (x) }
      <domain: "f", opset_import: ["" : 17]> half (v) => (w) { h = Cast <to = 10> (v) w = Cast <to = 1> (h) }"""
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "f" : 1]>\n{function}')
    assert compute_precision(proto) == np.dtype("float16")


def test_what_onnxruntime_has_no_kernel_for_is_run_by_the_reference() -> None:
    text = "g (bfloat16[n] x) => (bfloat16[n] y) { y = Erf (x) }"
    report = verify(model(text), model(text))
    assert report.equal
    assert report.engines == ("onnx reference", "onnx reference")


def test_models_that_no_runtime_runs_both_cannot_be_compared() -> None:
    """onnxruntime has no bfloat16 Erf: the reference runs the first, and does not know BiasGelu, in the second."""
    text = "g (bfloat16[n] x) => (bfloat16[n] y) { y = Erf (x) }"
    domains = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    fused = parser.parse_model(
        f"{domains} g (bfloat16[n] x) => (bfloat16[n] y) {{ y = com.microsoft.BiasGelu (x, x) }}"
    )
    with pytest.raises(ModelError, match=r"onnxruntime does not run the first model .*: they cannot be compared"):
        verify(model(text), fused)


def test_types_that_numpy_does_not_know_go_through_onnxruntime() -> None:
    text = """g (bfloat16[n] x) => (bfloat16[n] y) { f = Cast <to = 1> (x) m = Neg (f) y = Cast <to = 16> (m) }"""
    report = verify(model(text), model(text))
    assert report.equal
    assert report.engines == ("onnxruntime", "onnxruntime")
    assert not verify(model(text), model(text.replace("Neg", "Abs"))).equal


# Inputs that are given, and misuse ---------------------------------------------------------------------------


def test_given_inputs_are_the_only_ones() -> None:
    given = {"x": np.zeros((1, 2), "float32")}
    report = verify(model(GELU), model(GELU.replace("two = {2.0}", "two = {3.0}")), inputs=given)
    assert report.equal  # at zero every Gelu is zero
    assert report.runs == 1
    assert verify(model(GELU), model(GELU), inputs=[given, given]).runs == 2


def test_a_missing_given_input_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", z=np.zeros(2, "float32"))
    with pytest.raises(ModelError, match="input 'x' is missing; there are z"):
        verify(model(GELU), model(GELU), inputs=tmp_path / "in.npz")


@pytest.mark.parametrize("content", [b"no archive", b"", b"PK\x03\x04 an archive that was cut off"])
def test_a_file_that_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.npz").write_bytes(content)
    with pytest.raises(ModelError, match=r"in\.npz is not an \.npz file of inputs: write it with numpy\.savez"):
        verify(model(GELU), model(GELU), inputs=tmp_path / "in.npz")
    with pytest.raises(ModelError, match=r"none\.npz cannot be read: No such file"):
        verify(model(GELU), model(GELU), inputs=tmp_path / "none.npz")


def test_given_inputs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"given inputs: input 'x' has shape \[2\], the model takes \[batch, n\]"):
        verify(model(GELU), model(GELU), inputs={"x": np.zeros(2, "float32")})
    with pytest.raises(ModelError, match="given inputs: input 'x' is float64, the model takes float32"):
        verify(model(GELU), model(GELU), inputs={"x": np.zeros((2, 3))})
    text = "g (int64[n] ids, float[20, 4] table) => (float[n, 4] y) { y = Gather (table, ids) }"
    values = {"ids": np.array([20]), "table": np.zeros((20, 4), "float32")}
    with pytest.raises(ModelError, match="the first model refuses the inputs"):
        verify(model(text), model(text), inputs=values)


def test_a_model_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        verify(tmp_path / "absent.onnx", model(GELU))


def test_inputs_that_cannot_be_drawn_are_named() -> None:
    text = "g (seq(float[n]) xs) => (float[m] y) { y = ConcatFromSequence <axis = 0> (xs) }"
    with pytest.raises(ModelError, match="input 'xs' is a sequence, so it cannot be drawn: give the inputs"):
        verify(model(text), model(text))
    given = {"xs": [np.zeros(2, "float32"), np.ones(3, "float32")]}
    assert verify(model(text), model(text), inputs=given).equal


def test_an_input_without_a_type_is_named() -> None:
    untyped = model(GELU)
    untyped.graph.input[0].type.tensor_type.elem_type = 0
    with pytest.raises(ModelError, match="input 'x' has no element type, so it cannot be drawn"):
        declared_inputs(untyped)


def test_an_empty_list_of_inputs_is_an_error() -> None:
    with pytest.raises(ModelError, match="no inputs were given"):
        verify(model(GELU), model(GELU), inputs=[])


def test_external_data_beside_the_model_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    proto = onnx.load(MODELS / "whisper_encoder__ts17_eager.onnx")
    onnx.save_model(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert verify(MODELS / "whisper_encoder__ts17_eager.onnx", path, runs=2).equal


# The report --------------------------------------------------------------------------------------------------


def printed(report: VerifyReport) -> str:
    console = Console(file=io.StringIO(), width=100)
    report.print(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_printed_report_says_what_was_done_and_what_differs() -> None:
    text = printed(verify(model(GELU), model(GELU)))
    assert "equal: 1 output, 8 input sets" in text
    text = printed(verify(model(GELU), model(GELU.replace("{0.5}", "{0.6}"))))
    assert "different: 1 difference (8 input sets)" in text
    assert "✗ output 'y': " in text


def test_markup_in_names_is_printed_as_it_is() -> None:
    odd = model(GELU)
    odd.graph.node[-1].output[0] = odd.graph.output[0].name = "y[/red]"
    assert "y[/red]" in printed(verify(odd, odd))


def test_the_report_is_json_even_where_the_error_is_infinite() -> None:
    report = verify(model("g (float[n] x) => (float[n] y) { y = Neg (x) }"), model(NAN))
    data = json.loads(report.to_json())
    assert data["equal"] is False
    assert data["worst"] == {"y": None}
    assert data["outputs"][0]["name"] == "y"


NAN = "g (float[n] x) => (float[n] y) <float nan = {0.0}> { d = Div (nan, nan) m = Neg (x) y = Add (m, d) }"


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    verify(model(GELU), model(GELU), runs=3, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def cancelling(order: str, off: float = 0.0) -> tuple[ModelProto, np.ndarray]:
    """x w / 10 - c, where c leaves a thousandth of it, so that rounding counts a thousand times; and its x."""
    draw = np.random.default_rng(0)
    x, w = draw.uniform(1, 2, (64, 512)).astype(np.float32), draw.uniform(1, 2, (512, 8)).astype(np.float32)
    near = x.astype(np.float64) @ w / 10 - draw.uniform(0.06, 0.13, (64, 8)) + off
    made = model(f"g (float[64, 512] x, float[512, 8] w, float[64, 8] c) => (float[64, 8] y) {order}")
    for name, array in (("s", np.float32(0.1)), ("w", w), ("c", near.astype(np.float32))):
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return made, x


SCALED_BEFORE = "{ a = Mul (x, s) b = MatMul (a, w) y = Sub (b, c) }"
SCALED_AFTER = "{ a = MatMul (x, w) b = Mul (a, s) y = Sub (b, c) }"


def test_rounding_that_the_runtime_itself_makes_as_large_is_no_difference() -> None:
    (first, x), (second, _) = cancelling(SCALED_BEFORE), cancelling(SCALED_AFTER)
    report = verify(first, second, inputs={"x": x})
    assert report.equal
    assert report.worst["y"] > 2**-13  # more than the type's own allowance of 1024 epsilons
    assert not verify(first, second, inputs={"x": x}, rtol=2**-13).equal


def test_what_is_larger_than_rounding_is_a_difference_however_the_model_amplifies_it() -> None:
    (first, x), (second, _) = cancelling(SCALED_BEFORE), cancelling(SCALED_AFTER, off=1e-3)
    assert not verify(first, second, inputs={"x": x}).equal
