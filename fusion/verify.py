"""Do two models compute the same? The same inputs go through both, and every output is compared.

`verify` draws its own inputs (see `feeds`) or takes yours. Both models run without the runtime's own rewrites, so that
what is compared is what is written. Each input set goes through the first model twice: what differs from itself cannot
be compared with another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from rich.console import Console
from rich.table import Table

from fusion.compare import Comparison, compare, worse
from fusion.errors import ModelError
from fusion.feeds import Feed, Feeder, NothingRan, declared_inputs
from fusion.given import Inputs, given_feeds
from fusion.model import Model, load
from fusion.runtime import REFERENCE, Refused, Session


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
    worst: Comparison = field(default_factory=lambda: Comparison(True))
    feed: str = ""
    compared: int = 0
    unsteady: int = 0


@dataclass(slots=True)
class VerifyReport:
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

    @property
    def equal(self) -> bool:
        """Whether something was compared and nothing differs."""
        return not self.differences and any(o.compared for o in self.outputs)

    @property
    def worst(self) -> dict[str, float]:
        """The worst relative error of each output."""
        return {o.name: o.worst.error for o in self.outputs}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON (infinity becomes null)."""
        data = {"equal": self.equal, "worst": self.worst, **asdict(self)}
        return _plain(data)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def print(self, console: Console | None = None) -> None:
        """Print a table of the outputs and one line per difference."""
        console = console or Console()
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("output", "runs", "worst relative error", "in epsilons", "allowed"):
            table.add_column(title, justify="left" if title == "output" else "right")
        for output in self.outputs:
            worst = output.worst
            style = "" if worst.equal else "red"
            figures = (f"{worst.error:.1e}", f"{worst.epsilons:.1f}", f"{worst.tolerance:.1e}")
            table.add_row(output.name, str(output.compared), *(figures if output.compared else ("–",) * 3), style=style)
        console.print(table)
        for difference in self.differences:
            place = f" ({difference.feed})" if difference.feed else ""
            console.print(f"✗ {difference.sentence}{place}", style="red", markup=False, highlight=False)
        for output in self.outputs:
            if output.unsteady:
                note = f"! output {output.name!r} differs from itself in {output.unsteady} runs: not compared there"
                console.print(note, style="yellow", markup=False, highlight=False)
        console.print(self._verdict(), style="green" if self.equal else "bold red", markup=False, highlight=False)

    def _verdict(self) -> str:
        tried = _count(self.runs, "input set")
        tried += f", {self.skipped} refused by the first model" if self.skipped else ""
        tried += f", {self.unjudged} that no runtime runs both models on" if self.unjudged else ""
        if self.equal:
            return f"equal: {_count(len(self.outputs), 'output')}, {tried}"
        if not self.differences:
            return f"nothing could be compared ({tried})"
        return f"different: {_count(len(self.differences), 'difference')} ({tried})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
    progress: Callable[[int, int], None] | None = None,
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
    report = VerifyReport(differences=_declarations(first.proto, second.proto))
    expected = Expected(first, inputs, runs, sizes, optimized)
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
    for done, (feed, results, again) in enumerate(expected.runs):
        if progress:
            progress(done, total)
        try:
            got = _run_second(session, second, feed, expected.engine)
        except Unjudged as refusal:
            report.unjudged += 1
            if report.unjudged == total:
                raise _incomparable(expected, refusal) from refusal
            continue
        except Refused as refusal:
            report.runs += 1
            sentence = f"only the second model refuses: {refusal}"
            report.differences.append(Difference("refused", "", sentence, feed.label))
            continue
        report.runs += 1
        for output in report.outputs:
            if output.name in got:
                compared = (results[output.name], again[output.name], got[output.name])
                _judge(output, feed, compared, precision, rtol=rtol, atol=atol)
    for output in report.outputs:
        if not output.worst.equal:
            sentence = f"output {output.name!r}: {output.worst.reason}"
            report.differences.append(Difference("value", output.name, sentence, output.feed))
    if progress:
        progress(total, total)
    return report


class Unjudged(Refused):
    """onnxruntime runs neither model on these inputs, and the reference implementation not the second."""


def _incomparable(expected: Expected, refusal: Refused) -> ModelError:
    return ModelError(
        f"onnxruntime does not run the first model ({expected.trouble}), and nothing runs the second ({refusal}): "
        "they cannot be compared"
    )


class Expected:
    """What the first model gives: it is run, twice for each input set, and let go before the second is loaded.

    Attributes:
        engine: what ran it.
        trouble: why that was not onnxruntime.
        outputs: names of its outputs.
        runs: the input sets it took, with the results of both runs.
        skipped: how many it refused.
    """

    def __init__(
        self, model: Model, inputs: Inputs | None, runs: int, sizes: Mapping[str, int] | None, optimized: bool
    ) -> None:
        """Raise ModelError where the model does not load, or takes no inputs."""
        source = _runnable(model)
        session = Session(source, optimized=optimized)
        self.trouble = session.refusal
        try:
            self._run(model, session, inputs, runs, sizes)
        except NothingRan as nothing:
            # onnxruntime loads some models it then cannot run; the reference implementation may.
            if session.engine == REFERENCE:
                raise
            self.trouble = str(nothing)
            session = Session(source, reference=True)
            self._run(model, session, inputs, runs, sizes)
        self.engine, self.outputs = session.engine, session.outputs

    def _run(
        self, model: Model, session: Session, inputs: Inputs | None, runs: int, sizes: Mapping[str, int] | None
    ) -> None:
        self.runs: list[tuple[Feed, Mapping[str, Any], Mapping[str, Any]]] = []
        self.skipped = 0
        refusal: Refused | None = None
        for feed in (
            given_feeds(inputs, model.proto, session.inputs)
            if inputs is not None
            else _drawn(model.proto, session, runs, sizes)
        ):
            try:
                self.runs.append((feed, session.run(feed.values), session.run(feed.values)))
            except Refused as error:
                refusal = error
                self.skipped += 1
        if not self.runs:
            raise NothingRan(f"the first model refuses the inputs: {refusal}")


def compute_precision(model: ModelProto) -> np.dtype[Any] | None:
    """Return the narrowest float type the model computes in; None where it is that of its outputs, as far as one sees.

    A half-precision tensor that is only cast to another type is storage, not computation.
    """
    narrow = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    graph = model.graph
    weights = {t.name: t.data_type for t in graph.initializer if t.data_type in narrow}
    stored = {"Cast", "DequantizeLinear"}
    found = {weights[name] for n in graph.node if n.op_type not in stored for name in n.input if name in weights}
    found |= {a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to" and a.i in narrow}
    found |= {code for i in graph.input if (code := i.type.tensor_type.elem_type) in narrow}
    return helper.tensor_dtype_to_np_dtype(max(found)) if found else None  # BFLOAT16 is the coarser and the larger code


def _run_second(session: Session, model: Model, feed: Feed, engine: str) -> Mapping[str, Any]:
    values = {name: feed.values[name] for name in session.inputs if name in feed.values}
    try:
        return session.run(values)
    except Refused as refusal:
        if engine == session.engine:
            raise
        try:
            other = Session(_runnable(model), reference=True)
        except Refused as unknown:
            raise Unjudged(f"{refusal}; {unknown}") from unknown
    return other.run(values)


def _drawn(model: ModelProto, session: Session, runs: int, sizes: Mapping[str, int] | None) -> Iterable[Feed]:
    return islice(Feeder(declared_inputs(model), session.run, sizes), max(runs, 1))


def _runnable(model: Model) -> Path | ModelProto:
    # From its file a model runs with its external data, and without a copy of its weights in Python.
    return model.path if model.path is not None else model.to_proto()


def _judge(
    output: OutputReport, feed: Feed, compared: tuple[Any, Any, Any], precision: np.dtype[Any] | None, **allowed: Any
) -> None:
    expected, again, got = compared
    if not compare(expected, again, precision, **allowed).equal:
        output.unsteady += 1
        return
    result = compare(expected, got, precision, slack=feed.slack, **allowed)
    output.compared += 1
    if not output.feed or worse(output.worst, result) is result:
        output.worst, output.feed = result, feed.label


def _declarations(a: ModelProto, b: ModelProto) -> list[Difference]:
    """Return what the declared inputs and outputs say: missing, new, in another order, of another type or shape."""
    weights = [{t.name for t in m.graph.initializer} for m in (a, b)]
    inputs = [[i for i in m.graph.input if i.name not in w] for m, w in zip((a, b), weights, strict=True)]
    return [*_interface("input", *inputs), *_interface("output", list(a.graph.output), list(b.graph.output))]


def _interface(kind: str, a: list[ValueInfoProto], b: list[ValueInfoProto]) -> Iterable[Difference]:
    there, here = {i.name: i for i in a}, {i.name: i for i in b}
    for name in [name for name in there if name not in here]:
        yield Difference(kind, name, f"{kind} {name!r} is missing in the second model")
    for name in [name for name in here if name not in there]:
        yield Difference(kind, name, f"{kind} {name!r} is new in the second model")
    common = [name for name in there if name in here]
    if len(common) == len(there) == len(here) and list(there) != list(here):
        yield Difference(kind, "", f"the {kind}s are in another order: {', '.join(there)} became {', '.join(here)}")
    for name in common:
        if change := _type_change(there[name], here[name]):
            yield Difference(kind, name, f"{kind} {name!r}: {change}")


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
