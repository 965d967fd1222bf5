"""Write docs/gallery/: every pattern of the library, and what it becomes on every target.

python tools/gallery.py            # write it
python tools/gallery.py --check    # exit 1 where it is not up to date
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from types import FunctionType

from onnx import TensorProto

from fusion import registry
from fusion.api import library
from fusion.language import Capture, Pattern
from fusion.registry import Schema
from fusion.targets import Target, target_named

FOLDER = Path(__file__).parents[1] / "docs" / "gallery"
HEAD = """# The gallery of patterns

Every pattern of the library. Written by `tools/gallery.py`; change the patterns, not this page.
[The language](../language.md) says how to read them.

"""
TARGETS = ("onnx", "ort-cpu", "ort-cuda")
TYPES = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
TARGETS_HEAD = """# What patterns become, target by target

Written by `tools/gallery.py`; [targets](../targets.md) says what a target is, and why an operator was chosen. Where a
cell lists several, they are tried in that order. *From 20* is the opset of the standard operators that the operator
comes with. The types are those among float, half and bfloat16 that have a kernel, with the runtime whose kernels the
package has on file: onnxruntime {cpu} on the CPU and {cuda} with CUDA. At work the installed one is asked.

"""
KINDS = {"tensor": "tensor", "optional": "tensor, may be absent", "rest": "everything else in the sum"}
OPERATOR = re.compile(r"\bop\.((?:microsoft\.)?[A-Z]\w*)\(")


def pages() -> dict[str, str]:
    """The pages by name, as Markdown."""
    return {"index.md": page(), "targets.md": targets_page()}


def page() -> str:
    """The page of patterns."""
    patterns = library().values()
    rows = [f"| [{p.name}](#{p.name}) | {_first_line(p)} | {', '.join(p.targets) or 'none'} |" for p in patterns]
    index = ["| pattern | what it computes | targets |", "|---|---|---|", *rows]
    return HEAD + "\n".join(index) + "\n\n" + "\n".join(_section(pattern) for pattern in patterns)


def targets_page() -> str:
    """The table of patterns by targets, as Markdown."""
    cpu, cuda = registry.snapshot().label.split()[-1], registry.cuda_snapshot().label.split()[-1]
    rows = [
        f"| [{p.name}](index.md#{p.name}) | {' | '.join(_cell(p, target) or '–' for target in TARGETS)} |"
        for p in library().values()
        if p.emissions
    ]
    header = [f"| pattern | {' | '.join(TARGETS)} |", "|---" * (len(TARGETS) + 1) + "|"]
    return TARGETS_HEAD.format(cpu=cpu, cuda=cuda) + "\n".join([*header, *rows]) + "\n"


def _cell(pattern: Pattern, target: str) -> str:
    found = [
        _need(name, target)
        for emission in pattern.emissions
        if target in emission.targets
        for name in _operators(emission.build)
    ]
    return "<br>".join(dict.fromkeys(found))


def _need(name: str, target: str) -> str:
    """An operator with the opset that brought it and the types that have a kernel."""
    domain, _, op = name.rpartition(".")
    known = {"onnx": registry.standard, "ort-cpu": registry.snapshot, "ort-cuda": registry.cuda_snapshot}[target]()
    aim = Target(target, target_named(target).provider, lambda: known)
    versions, standard = known.versions(op, domain), registry.standard().versions(op, domain)
    since = min(set(versions) & set(standard), default=min(versions))
    types = [
        short
        for short, kind in TYPES.items()
        if any(_has_kernel(aim, op, domain, schema, kind) for schema in versions.values() if schema.since >= since)
    ]
    words = [f"from {since}"] if standard else []
    words += [", ".join(types) or "no kernel"] if target != "onnx" else []
    return f"`{name}`" + (f" ({'; '.join(words)})" if words else "")


def _has_kernel(target: Target, op: str, domain: str, schema: Schema, kind: int) -> bool:
    """Whether there is a kernel for inputs of an element type, those that must have another one apart."""
    name = registry.type_name(kind)
    variables = [variable for _, variable in schema.inputs[: max(schema.required, 1)]]
    asked = [kind if name in schema.types.get(variable, ()) else None for variable in variables]
    return any(asked) and target.route(op, domain, schema.since, asked) == "kernel"


def _section(pattern: Pattern) -> str:
    captures = [f"| `{name}` | {_axes(capture)} | {_kind(capture)} |" for name, capture in pattern.captures.items()]
    lines = (
        f"- {', '.join(emission.targets)}: {', '.join(f'`{name}`' for name in _operators(emission.build))}"
        for emission in pattern.emissions
    )
    written = list(dict.fromkeys(lines))
    read = ", ".join(f"`{operator}`" for operator in pattern.readers)
    parts = [
        f"## {pattern.name}\n",
        f"From `patterns/{Path(pattern.path).name}`:\n\n```py\n{_source(pattern)}```\n",
        "\n".join(["| capture | axes | |", "|---|---|---|", *captures]) + "\n",
        "Written as\n\n" + "\n".join(written) + "\n" if written else "Not written by itself; other patterns call it.\n",
        f"Recognised where it is already fused: {read}.\n" if read else "",
    ]
    return "\n".join(part for part in parts if part)


def _first_line(pattern: Pattern) -> str:
    return pattern.doc.splitlines()[0]


def _source(pattern: Pattern) -> str:
    return textwrap.dedent(inspect.getsource(pattern.function))


def _operators(build: FunctionType) -> list[str]:
    """The operators that an emission names, itself or by a function of its file."""
    names = OPERATOR.findall(inspect.getsource(build))
    for name in build.__code__.co_names:
        helper = build.__globals__.get(name)
        if isinstance(helper, FunctionType) and helper.__module__ == build.__module__:
            names += _operators(helper)
    return [re.sub(r"^microsoft\.", "com.microsoft.", name) for name in dict.fromkeys(names)]


def _axes(capture: Capture) -> str:
    words = [token if isinstance(token, str) else f"({' '.join(token)})" for token in capture.dims or ()]
    loose = [f"{word}\\|1" if word in capture.loose else word for word in words]
    return f"`{' '.join(loose)}`" if loose else ""


def _kind(capture: Capture) -> str:
    if capture.kind != "scalar":
        return KINDS[capture.kind]
    bounds = [f"from {capture.low:g}"] * (capture.low > -float("inf"))
    bounds += [f"to {capture.high:g}"] * (capture.high < float("inf"))
    return " ".join(["number", *bounds])


def main(arguments: list[str]) -> int:
    """Write the pages, or say whether they are up to date."""
    texts = {FOLDER / name: text for name, text in pages().items()}
    if arguments == ["--check"]:
        fresh = all(path.exists() and path.read_text() == text for path, text in texts.items())
        print("the gallery is up to date" if fresh else "out of date: run python tools/gallery.py")
        return 0 if fresh else 1
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
