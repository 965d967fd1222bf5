"""Checked rewriting: both sides of a rewrite are cut out of the model and run on the same inputs before it stays.

The inputs of a cut are the values the match binds, so what is compared is the rewrite alone: on random numbers, and on
what has caught wrong fusions before, such as rows masked everywhere, rows of tiny numbers, zeros of both signs, sizes
of 1. Errors are measured against how the original itself answers inputs that differ in their last digits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ml_dtypes
import numpy as np
from onnx import helper

from fusion.dims import Poly, evaluate, symbols
from fusion.facts import Facts
from fusion.matching.region import grounds
from fusion.matching.state import State, entries
from fusion.models.graph import Graph, Node, Value
from fusion.verifying.compare import compare, epsilon, is_float
from fusion.verifying.feeds import mask
from fusion.verifying.runtime import ONNXRUNTIME, REFERENCE, Refused, Session
from fusion.verifying.verify import compute_precision
from fusion.writing.apply import apply
from fusion.writing.cut import Cut, Unchecked, cut
from fusion.writing.found import Found, New, NewNode, Unmet

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
Sizes = Mapping[Poly, int]

ATTEMPTS = 32
"""How many sets of sizes are tried until the original runs."""
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)
GROWTH = 10
"""How often sizes are doubled where a dimension computed from them, as behind convolutions, would be empty."""
RANDOM, ROWS, LARGE, ZEROS = "random", "tiny to large", "large", "zero"
MASKS = {RANDOM: "holes", ROWS: "holes", LARGE: "empty row", ZEROS: "full"}
"""Kinds of inputs, as a message names them, and what of `feeds.MASKS` masks are then."""
PLAIN = 1e4
"""Magnitude from which a number is a mask's fill, and no input that may be off by a digit."""
MISSING = ("could not find an implementation", "not a registered")
"""What onnxruntime says of an operator that it has no kernel for on the CPU."""


def apply_checked(
    graph: Graph, found: Found, nodes: Sequence[NewNode], results: Sequence[New]
) -> tuple[list[Node], str]:
    """Write one match if what is written computes the same as what it replaces.

    Returns:
        The new nodes, and why the two sides could not be compared; empty where they were, and are equal.

    Raises:
        Unmet: they differ. The graph is as it was.
    """
    finals = found.finals
    stops = set(grounds(found.state))
    try:
        trial = Trial(cut(graph, found.facts, finals, stops), found.facts, found.state)
    except Unchecked as reason:
        return apply(graph, found, nodes, results), str(reason)
    with graph.transaction():
        made = apply(graph, found, nodes, results)
        written = [value for value in finals if value.producer in made]
        try:
            difference = trial.difference(cut(graph, found.facts, written, stops), stops)
        except Unchecked as reason:
            return made, str(reason)
        if difference:
            operators = ", ".join(node.key for node in made)
            raise Unmet(f"{operators}: {difference}", kind="check", place=found.root.name)
    return made, ""


def _masks(state: State) -> set[Value]:
    """The values that a match adds to scores, or chooses scores with."""
    return {entry.ref.value for bound in state.bound.values() for entry in entries(bound) if entry.kind != "clamp"}


@dataclass(frozen=True, slots=True)
class Run:
    """One set of inputs, and what the original gave.

    Attributes:
        kind: of `MASKS`.
        sizes: of the symbolic dimensions.
        results: by name of the output.
        slack: factor on the allowed error, from how far the last digits of the inputs move the results.
    """

    kind: str
    sizes: Sizes
    results: Mapping[str, Any]
    slack: float


class Trial:
    """The original of a rewrite, run on several inputs.

    Args:
        before: the original, cut out.
        facts: what is known about the values of its graph.
        state: what the match bound.

    Raises:
        Unchecked: it does not run.
    """

    def __init__(self, before: Cut, facts: Facts, state: State) -> None:
        self.before = before
        self.facts = facts
        self.masks = _masks(state)
        # An epsilon is seen only where squares are as small as it is.
        numbers = [number for number in state.bound.values() if isinstance(number, float) and 0 < number < 1]
        self.magnitudes = [*np.sqrt(numbers), 8.0, 0.1, 1e-3, 1e-5]
        self.precision = compute_precision(before.model)
        try:
            self.session = Session(before.model)
        except Refused as refusal:
            raise Unchecked(f"no runtime takes the original: {refusal}") from None
        self.dims = [dim for value in before.inputs.values() for dim in facts.shape(value) or ()]
        names = list(dict.fromkeys(name for dim in self.dims for name in symbols(dim)))
        sizes = self._sizes(names)
        ones = self._grown(dict.fromkeys(names, 1))
        runs = [self._run(kind, sizes) for kind in MASKS]
        if ones != sizes:
            runs.append(self._run(RANDOM, ones))
        self.runs = [run for run in runs if run is not None]
        if not self.runs:
            raise Unchecked("the last digits of the inputs decide what the original gives")

    def difference(self, after: Cut, stops: set[Value]) -> str:
        """How what was written differs from the original, in one sentence; empty where it does not.

        Raises:
            Unchecked: it cannot be run here, or reads what the original does not.
        """
        for name, value in after.inputs.items():
            if name not in self.before.inputs and name not in after.asked and value not in stops:
                raise Unchecked(f"the new nodes read {name}, which the old ones do not")
        session: Session | None = None
        try:
            session = Session(after.model)
            refusal = session.refusal
        except Refused as error:
            refusal = str(error)
        native = self.session.engine == ONNXRUNTIME
        missing = any(text in refusal.lower() for text in MISSING)
        if session is None and (missing or not native):
            raise Unchecked(f"nothing here runs what was written: {refusal}")
        if session is None or (refusal and native and not missing):
            return f"onnxruntime refuses what was written: {refusal}"
        for run in self.runs:
            feeds = self._feeds(after, run.kind, run.sizes)
            given = ", ".join(f"{name} {list(feeds[name].shape)}" for name in self.before.inputs if name in feeds)
            try:
                got = session.run(feeds)
            except Refused as error:
                if session.engine == REFERENCE:
                    raise Unchecked(f"nothing here runs what was written: {error}") from None
                return f"what was written does not run on {run.kind} inputs ({given}): {error}"
            for name, result in got.items():
                compared = compare(run.results[name], result, self.precision, slack=run.slack)
                if not compared.equal:
                    return f"on {run.kind} inputs ({given}), output {name}: {compared.reason}"
        return ""

    def _run(self, kind: str, sizes: Sizes) -> Run | None:
        """Run the original; None where it refuses the inputs, or where their last digits make the results NaN."""
        try:
            feeds = self._feeds(self.before, kind, sizes)
            results = self.session.run(feeds)
            again = self.session.run({name: _shaken(array) for name, array in feeds.items()})
        except (Refused, Unchecked):
            return None
        slack = 1.0
        for name, result in results.items():
            moved = compare(result, again[name], self.precision)
            if not np.isfinite(moved.error):
                return None
            if moved.tolerance:
                slack = max(slack, 2 * moved.error / moved.tolerance)
        return Run(kind, sizes, results, slack)

    # Sizes and values ------------------------------------------------------------------------------------------------

    def _sizes(self, names: Sequence[Poly]) -> Sizes:
        """Sizes of the symbols at which the original runs and gives something, distinct ones if it can be."""
        trouble: Exception | None = None
        for sizes in islice(self._candidates(names), ATTEMPTS):
            try:
                results = self.session.run(self._feeds(self.before, RANDOM, sizes))
            except (Refused, Unchecked) as error:
                trouble = trouble or error
                continue
            if all(np.size(result) for result in results.values()):
                return sizes
        raise Unchecked(f"no inputs were found that the original takes ({trouble or 'its results are empty'})")

    def _candidates(self, names: Sequence[Poly]) -> Iterator[Sizes]:
        same = dict.fromkeys(names, 4)
        primes = {name: PRIMES[index % len(PRIMES)] for index, name in enumerate(names)}
        for least in (1, 8):  # windows and slices may need more than one
            yield self._grown(primes, least)
            yield self._grown(same, least)
        for size in (8, 0):  # the sum of two others, as past and new positions are; or no past
            for name in names:
                yield {**same, name: size}

    def _grown(self, sizes: dict[Poly, int], least: int = 1) -> dict[Poly, int]:
        """Double sizes until no dimension computed from them is short, as those behind convolutions are at first."""
        for _ in range(GROWTH):
            short = {name for dim in self.dims if (evaluate(dim, sizes) or 0) < least for name in symbols(dim)}
            if not short:
                break
            sizes = {name: size * 2 if name in short else size for name, size in sizes.items()}
        return sizes

    def _feeds(self, part: Cut, kind: str, sizes: Sizes) -> Feeds:
        """The inputs of a cut: the same numbers for the same name."""
        return {**part.fed, **{name: self._drawn(value, kind, sizes) for name, value in part.inputs.items()}}

    def _drawn(self, value: Value, kind: str, sizes: Sizes) -> Array:
        dims, code = self.facts.shape(value), self.facts.dtype(value)
        assert dims is not None
        assert code is not None
        shape = [size for dim in dims if (size := evaluate(dim, sizes)) is not None and size >= 0]
        if len(shape) < len(dims):
            raise Unchecked(f"{value.name} has no size where {', '.join(f'{k} = {v}' for k, v in sizes.items())}")
        dtype = helper.tensor_dtype_to_np_dtype(code)
        if dtype.kind in "cO":
            raise Unchecked(f"{value.name} holds neither real numbers nor truth values")
        rng = np.random.default_rng([list(MASKS).index(kind), zlib.crc32(value.name.encode())])
        known = self.facts.integers(value) if not is_float(dtype) else None
        if known is not None and list(known.shape) == shape:
            items = [None if item is None else evaluate(item, sizes) for item in known.items]
            return np.array([0 if item is None else item for item in items]).reshape(shape).astype(dtype)
        if not is_float(dtype):
            return mask(shape, MASKS[kind], rng).astype(dtype)
        finest = ml_dtypes.finfo(dtype)
        if value in self.masks and kind != RANDOM:
            fill = -np.inf if kind == ROWS else float(finest.min)
            return np.where(mask(shape, MASKS[kind], rng), 0.0, fill).astype(dtype)
        numbers = rng.standard_normal(shape)
        if kind == ZEROS:
            numbers = np.copysign(0.0, numbers)
        elif kind == LARGE:
            numbers *= 8.0 if float(finest.max) < 1e6 else 30.0  # squares stay finite
        elif kind == ROWS:
            rows = [*shape[:-1], 1][: len(shape)]
            numbers *= np.maximum(np.resize(self.magnitudes, rows), 16.0 * float(finest.tiny))
        return numbers.astype(dtype)


def _shaken(array: Array) -> Array:
    """The array with another last digit in every number."""
    if not is_float(array.dtype):
        return array
    signs = np.random.default_rng(0).choice([-2.0, 2.0], array.shape) * epsilon(array.dtype)
    with np.errstate(invalid="ignore"):
        wide = array.astype(np.float64)
        return np.where(np.abs(wide) < PLAIN, wide * (1.0 + signs), wide).astype(array.dtype)
