"""Write docs/gallery/index.md: every pattern of the library, with its formula, captures, operators and source.

python tools/gallery.py            # write it
python tools/gallery.py --check    # exit 1 where it is not up to date
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path

from fusion.api import library
from fusion.language import Capture, Pattern

PAGE = Path(__file__).parents[1] / "docs" / "gallery" / "index.md"
HEAD = """# The gallery of patterns

Every pattern of the library. Written by `tools/gallery.py`; change the patterns, not this page.
[The language](../language.md) says how to read them.

"""
KINDS = {"tensor": "tensor", "optional": "tensor, may be absent", "rest": "everything else in the sum"}
OPERATOR = re.compile(r"\bop\.((?:microsoft\.)?[A-Z]\w*)\(")


def page() -> str:
    """The page, as Markdown."""
    patterns = library().values()
    rows = [f"| [{p.name}](#{p.name}) | {_first_line(p)} | {', '.join(p.targets) or 'none'} |" for p in patterns]
    index = ["| pattern | what it computes | targets |", "|---|---|---|", *rows]
    return HEAD + "\n".join(index) + "\n\n" + "\n".join(_section(pattern) for pattern in patterns)


def _section(pattern: Pattern) -> str:
    captures = [f"| `{name}` | {_axes(capture)} | {_kind(capture)} |" for name, capture in pattern.captures.items()]
    written = [
        f"- {', '.join(emission.targets)}: {', '.join(f'`{name}`' for name in _operators(emission.build))}"
        for emission in pattern.emissions
    ]
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


def _operators(build: object) -> list[str]:
    """The operators that an emission names, as it names them."""
    names = OPERATOR.findall(inspect.getsource(build))  # type: ignore[arg-type]
    return [name.replace("microsoft.", "com.microsoft.") for name in dict.fromkeys(names)]


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
    """Write the page, or say whether it is up to date."""
    text = page()
    if arguments == ["--check"]:
        fresh = PAGE.exists() and PAGE.read_text() == text
        print(f"{PAGE.name} is up to date" if fresh else "out of date: run python tools/gallery.py")
        return 0 if fresh else 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
