"""Do two models compute the same? The same inputs go through both, and every output is compared.

`verify` draws its own inputs (see `feeds`) or takes yours. Both models run without the runtime's own rewrites, so that
what is compared is what is written. Each input set goes through the first model twice: what differs from itself cannot
be compared with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from rich.console import Console

from fusion.diffing.scopes import all_nodes, interface
from fusion.errors import ModelError
from fusion.models.model import Model, load
from fusion.report import Report, counted, table
from fusion.verifying.compare import SAME, Comparison, compare, worse
from fusion.verifying.feeds import Feed, Feeder, NothingRan, declared_inputs
from fusion.verifying.given import Inputs, given_feeds
from fusion.verifying.runtime import ONNXRUNTIME, REFERENCE, Refused, Session

ROUNDING, MOST = 4, 16
"""How many times as far as by the runtime's own rewriting of the first model an output may be moved, and how many
times as far as its type allows at the most."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which the second model is not the first.

    Attributes:
        kind: "load", "input", "output", "refused" or "value".
        name: the input or output it is about; empty where it is about the whole model.
        sentence: what was there and what became of it.
        feed: the input set that showed it; empty where the declarations show it.
    """

    kind: str
    name: str
    sentence: str
    feed: str = ""


@dataclass(slots=True)
class OutputReport:
    """What all runs say about one output.

    Attributes:
        worst: the worst comparison of all runs.
        feed: the input set of that comparison.
        compared: number of runs in which it was compared.
        unsteady: number of runs in which the first model did not agree with itself.
    """

    name: str
    worst: Comparison = SAME
    feed: str = ""
    compared: int = 0
    unsteady: int = 0


@dataclass(slots=True)
class VerifyReport(Report):
    """The answer of `verify`.

    Attributes:
        runs: input sets that went through both models.
        skipped: input sets that the first model refused.
        unjudged: input sets on which only the first model could be run, and that not by onnxruntime.
        engines: what ran the first and the second model.
        differences: everything that differs, the declarations first; empty where the models are equal.
        outputs: one report per output of the first model.
    """

    runs: int = 0
    skipped: int = 0
    unjudged: int = 0
    engines: tuple[str, str] = ("", "")
    differences: list[Difference] = field(default_factory=list)
    outputs: list[OutputReport] = field(default_factory=list)

    DERIVED: ClassVar[tuple[str, ...]] = ("equal", "worst")

    @property
    def equal(self) -> bool:
        """Whether something was compared and nothing differs."""
        return not self.differences and any(o.compared for o in self.outputs)

    @property
    def worst(self) -> dict[str, float]:
        """The worst relative error of each output."""
        return {o.name: o.worst.error for o in self.outputs}

    def show(self, out: Console) -> None:
        """Print a table of the outputs, one line per difference, and the verdict."""
        shown = table("output", ">runs", ">worst relative error", ">in epsilons", ">allowed")
        for output in self.outputs:
            worst = output.worst
            figures = (f"{worst.error:.1e}", f"{worst.epsilons:.1f}", f"{worst.tolerance:.1e}")
            style = "" if worst.equal else "red"
            shown.add_row(output.name, str(output.compared), *(figures if output.compared else ("–",) * 3), style=style)
        tried = counted(self.runs, "input set")
        tried += f", {self.skipped} refused by the first model" if self.skipped else ""
        tried += f", {self.unjudged} that no runtime runs both models on" if self.unjudged else ""
        if self.equal:
            verdict = f"equal: {counted(len(self.outputs), 'output')}, {tried}"
        elif self.differences:
            verdict = f"different: {counted(len(self.differences), 'difference')} ({tried})"
        else:
            verdict = f"nothing could be compared ({tried})"
        lines = [(f"✗ {d.sentence}" + (f" ({d.feed})" if d.feed else ""), "red") for d in self.differences]
        for o in self.outputs:
            if o.unsteady:
                itself = f"! output {o.name!r} differs from itself in {o.unsteady} runs: not compared there"
                lines.append((itself, "yellow"))
        out.print(shown, markup=False)
        for text, style in (*lines, (verdict, "green" if self.equal else "bold red")):
            out.print(text, style=style, markup=False, highlight=False)


def verify(
    a: Any,
    b: Any,
    *,
    inputs: Inputs | None = None,
    runs: int = 8,
    sizes: Mapping[str, int] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    optimized: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> VerifyReport:
    """Run the same inputs through two models and compare every output.

    Args:
        a: the model that is right by definition: a path, ModelProto, gs.Graph or onnx_ir.Model.
        b: the model to be judged.
        inputs: an .npz file, a dict, or several dicts, instead of drawn inputs.
        runs: how many input sets to draw; the named dimensions get distinct primes, 1, and one size for all in turn.
        sizes: sizes for named dimensions, instead of the several drawn ones.
        rtol: allowed relative error; by default it depends on the element type (see `compare`).
        atol: absolute error that is allowed besides.
        optimized: let the runtime apply its own rewrites to both: what a user gets, but not what is written.
        progress: called with the number of input sets done and the number of all.

    Returns:
        The report. A model that the runtime refuses as `b` is a difference, not an error.

    Raises:
        ModelError: `a` or `b` cannot be read, no runtime takes `a`, no inputs were found that `a` takes, or onnxruntime
            does not run `a` and the reference implementation does not run `b`.
    """
    first, second = load(a, validate=False), load(b, validate=False)  # the runtime is the judge
    report = VerifyReport(differences=list(_declarations(first.proto, second.proto)))
    expected = _expected(first, inputs, max(runs, 1), sizes, optimized)
    report.outputs = [OutputReport(name) for name in expected.outputs]
    report.skipped = expected.skipped
    try:
        session = Session(_runnable(second), optimized=optimized)
    except Refused as refusal:
        if expected.engine == REFERENCE:
            raise _incomparable(expected, refusal) from refusal
        report.differences.append(Difference("load", "", f"the second model does not load: {refusal}"))
        report.engines = (expected.engine, "")
        return report
    report.engines = (expected.engine, session.engine)
    if session.refusal and expected.engine != REFERENCE:
        sentence = f"onnxruntime takes the first model and refuses the second: {session.refusal}"
        report.differences.append(Difference("load", "", sentence))
    precision = compute_precision(first.proto)
    total = len(expected.runs)
    judged: list[_Judged] = []
    for done, (feed, results, again) in enumerate(expected.runs):
        progress(done, total)
        try:
            got = _run_second(session, second, feed, expected.engine)
        except Unjudged as refusal:
            report.unjudged += 1
            if report.unjudged == total:
                raise _incomparable(expected, refusal) from refusal
            continue
        except Refused as refusal:
            got = {}
            sentence = f"only the second model refuses: {refusal}"
            report.differences.append(Difference("refused", "", sentence, feed.label))
        report.runs += 1
        for output in report.outputs:
            if (name := output.name) not in got:
                continue
            if not compare(results[name], again[name], precision, rtol=rtol, atol=atol).equal:
                output.unsteady += 1
                continue
            one = compare(results[name], got[name], precision, rtol=rtol, atol=atol, slack=feed.slack)
            judged.append((output, feed, results[name], one))
    del session
    if rtol is None and not optimized and expected.engine == ONNXRUNTIME:
        judged = _but_rounding(first, judged, precision)
    for output, feed, _, one in judged:
        output.compared += 1
        if not output.feed or worse(output.worst, one) is one:
            output.worst, output.feed = one, feed.label
    for output in report.outputs:
        if not output.worst.equal:
            sentence = f"output {output.name!r}: {output.worst.reason}"
            report.differences.append(Difference("value", output.name, sentence, output.feed))
    progress(total, total)
    return report


_Judged: TypeAlias = tuple[OutputReport, Feed, Any, Comparison]
"""An output, the inputs, what the first model gave, and how the second compares with that."""


def _but_rounding(model: Model, judged: list[_Judged], precision: np.dtype[Any] | None) -> list[_Judged]:
    """Let pass what is no larger than what the runtime's own rewriting of the first model does to the same output.

    A deep model may amplify rounding; the runtime adds up in another order, too.
    """
    doubtful = {feed.label: feed for _, feed, _, one in judged if not one.equal and np.isfinite(one.error)}
    if not doubtful:
        return judged
    try:
        rewritten = Session(_runnable(model), optimized=True)
        moved = {label: rewritten.run(feed.values) for label, feed in doubtful.items()}
    except Refused:
        return judged
    settled: list[_Judged] = []
    for output, feed, result, one in judged:
        if not one.equal and feed.label in moved:
            noise = compare(result, moved[feed.label][output.name], precision).error
            allowed = min(ROUNDING * noise, MOST * one.tolerance)
            if one.error <= allowed:
                one = replace(one, equal=True, reason="", tolerance=allowed)
        settled.append((output, feed, result, one))
    return settled


class Unjudged(Refused):
    """onnxruntime runs neither model on these inputs, and the reference implementation not the second."""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What the first model gives: it is run, twice for each input set, and let go before the second is loaded.

    Attributes:
        engine: what ran it.
        trouble: why that was not onnxruntime.
        outputs: names of its outputs.
        runs: the input sets it took, with the results of both runs.
        skipped: how many it refused.
    """

    engine: str
    trouble: str
    outputs: list[str]
    runs: Sequence[tuple[Feed, Mapping[str, Any], Mapping[str, Any]]]
    skipped: int


def _expected(
    model: Model, inputs: Inputs | None, runs: int, sizes: Mapping[str, int] | None, optimized: bool
) -> _Expected:
    """Run the first model; ModelError where it does not load, or takes no inputs."""

    def run(session: Session, trouble: str) -> _Expected:
        feeds: Iterable[Feed]
        if inputs is not None:
            feeds = given_feeds(inputs, model.proto, session.inputs)
        else:
            feeds = islice(Feeder(declared_inputs(model.proto), session.run, sizes), runs)
        taken, skipped, refusal = [], 0, None
        for feed in feeds:
            try:
                taken.append((feed, session.run(feed.values), session.run(feed.values)))
            except Refused as error:
                skipped, refusal = skipped + 1, error
        if not taken:
            raise NothingRan(f"the first model refuses the inputs: {refusal}")
        return _Expected(session.engine, trouble, session.outputs, taken, skipped)

    session = Session(_runnable(model), optimized=optimized)
    try:
        return run(session, session.refusal)
    except NothingRan as nothing:
        # onnxruntime loads some models it then cannot run; the reference implementation may.
        if session.engine == REFERENCE:
            raise
        with suppress(NothingRan):
            return run(Session(_runnable(model), reference=True), str(nothing))
        raise  # what onnxruntime says is what a user will meet


def _incomparable(expected: _Expected, refusal: Refused) -> ModelError:
    return ModelError(
        f"onnxruntime does not run the first model ({expected.trouble}), and nothing runs the second ({refusal}): "
        "they cannot be compared"
    )


def compute_precision(model: ModelProto) -> np.dtype[Any] | None:
    """Return the coarsest float type the model computes in; None where it is that of its outputs, as far as one sees.

    A tensor that is only cast to another type is storage, not computation.
    """
    types = {t.name: t.data_type for t in model.graph.initializer}
    types |= {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    found: set[int] = set()
    for node in all_nodes(n for body in (model.graph, *model.functions) for n in body.node):
        if node.op_type == "Cast":
            found.update(a.i for a in node.attribute if a.name == "to")
        elif node.op_type != "DequantizeLinear":
            found.update(types[name] for name in node.input if name in types)
    return next((helper.tensor_dtype_to_np_dtype(kind) for kind in _COARSE if kind in found), None)


_COARSE = (TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT)
"""Float types that round more than another one does, the coarsest first."""


def _run_second(session: Session, model: Model, feed: Feed, engine: str) -> Mapping[str, Any]:
    values = {name: feed.values[name] for name in session.inputs if name in feed.values}
    try:
        return session.run(values)
    except Refused as refusal:
        if engine != REFERENCE or session.engine == REFERENCE:
            raise
        try:
            other = Session(_runnable(model), reference=True)
        except Refused as unknown:
            raise Unjudged(f"{refusal}; {unknown}") from unknown
    return other.run(values)


def _runnable(model: Model) -> Path | ModelProto:
    # From its file a model runs with its external data, and without a copy of its weights in Python.
    return model.path if model.path is not None else model.to_proto()


def _declarations(a: ModelProto, b: ModelProto) -> Iterator[Difference]:
    """Yield what the declared inputs and outputs say: missing, new, in another order, of another type or shape."""
    weights = [{t.name for t in m.graph.initializer} for m in (a, b)]
    fed = [[i for i in m.graph.input if i.name not in w] for m, w in zip((a, b), weights, strict=True)]
    for name, sentence in interface("input", fed[0], fed[1], _type_change):
        yield Difference("input", name, sentence)
    for name, sentence in interface("output", a.graph.output, b.graph.output, _type_change):
        yield Difference("output", name, sentence)


def _type_change(a: ValueInfoProto, b: ValueInfoProto) -> str:
    """Return how the declared types contradict each other; a dimension that only one of them knows does not."""
    if a.type.WhichOneof("value") != b.type.WhichOneof("value"):
        return f"{a.type.WhichOneof('value')} became {b.type.WhichOneof('value')}"
    x, y = a.type.tensor_type, b.type.tensor_type
    if x.elem_type != y.elem_type:
        code = TensorProto.DataType.Name
        return f"element type {code(x.elem_type).lower()} became {code(y.elem_type).lower()}"
    if not (x.HasField("shape") and y.HasField("shape")):
        return ""
    shapes = [[d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in t.shape.dim] for t in (x, y)]
    fixed = [(m, n) for m, n in zip(*shapes, strict=False) if isinstance(m, int) and isinstance(n, int)]
    if len(shapes[0]) != len(shapes[1]) or any(m != n for m, n in fixed):
        return f"declared shape {shapes[0]} became {shapes[1]}"
    return ""
