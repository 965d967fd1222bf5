"""The command `fusion`: every function of the library's face, for the shell.

Exit codes: 0 done; 1 the models differ (`verify`, `demo`); 2 the command cannot be carried out, and one sentence on
standard error says why. Results go to standard output, progress to standard error and only to a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from fusion import api
from fusion.demo import demonstrate
from fusion.diffing.diff import diff as diff_models
from fusion.errors import FusionError
from fusion.language import Pattern
from fusion.report import Report, plain, table
from fusion.simplify import RULES, Rule
from fusion.verifying.verify import verify as verify_models

DIFFERENT, FAILED = 1, 2

app = typer.Typer(
    name="fusion",
    help="Fuse the subgraphs of an ONNX model that a runtime has one kernel for, and prove that nothing changed.",
    epilog="Start with: [bold]fusion demo[/bold], then [bold]fusion optimize model.onnx fused.onnx[/bold]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

InputModel = Annotated[Path, typer.Argument(metavar="IN", help="ONNX model; external data lies beside it.")]
ModelA = Annotated[Path, typer.Argument(metavar="A", help="The model before: right by definition.")]
ModelB = Annotated[Path, typer.Argument(metavar="B", help="The model after.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Same = Annotated[
    list[str] | None,
    typer.Option("--same", metavar="A=B", help="Dimensions of inputs that are one size; may be repeated."),
]
TargetName = Annotated[str, typer.Option("--target", metavar="NAME", help="Where the result must run.")]


def main() -> None:
    """Run the command; errors of ours become one sentence on standard error and exit code 2."""
    try:
        app(prog_name="fusion")
    except FusionError as error:
        # Not through rich: names in brackets are no markup, and a long sentence is one line for whoever greps it.
        print(f"fusion: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except BrokenPipeError:  # `fusion patterns | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


def _example(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[dim]$[/dim] {line}" for line in lines)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"onnx-fusion {version('onnx-fusion')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=_example(
        "fusion optimize model.onnx fused.onnx",
        "fusion optimize model.onnx fused.onnx --target onnx --opset 23 --check",
        "fusion optimize model.onnx fused.onnx --pattern gelu --pattern layer_norm --json",
    )
)
def optimize(
    source: InputModel,
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write the fused model.")],
    target: TargetName = "ort-cpu",
    pattern: Annotated[
        list[str] | None, typer.Option("--pattern", metavar="NAME", help="Use this pattern only; may be repeated.")
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", metavar="N", help="Take the model to this opset first, where that is sound."),
    ] = None,
    same: Same = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run both sides of every rewrite, and undo what differs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fuse what is equal and has a kernel, write the result, and say what was done and what nearly was."""
    with _busy(f"optimizing {source.name}"):
        result = api.optimize(
            source, destination, target=target, opset=opset, patterns=pattern or None, same=_groups(same), check=check
        )
    _show(result, as_json)


@app.command(epilog=_example("fusion why model.onnx", "fusion why model.onnx sdpa --json"))
def why(
    source: InputModel,
    pattern: Annotated[str | None, typer.Argument(metavar="[PATTERN]", help="Only this pattern.")] = None,
    target: TargetName = "ort-cpu",
    same: Same = None,
    as_json: AsJson = False,
) -> None:
    """Say where a pattern matches and, where it nearly does, what keeps it from it. Nothing is changed."""
    with _busy(f"looking through {source.name}"):
        explanation = api.why(source, pattern, target=target, same=_groups(same))
    _show(explanation, as_json)


@app.command(epilog=_example("fusion diff model.onnx fused.onnx", "fusion diff model.onnx fused.onnx --html diff.html"))
def diff(
    a: ModelA,
    b: ModelB,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with drawings, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how the graphs of two models differ: which nodes became which."""
    with _busy(f"comparing {a.name} with {b.name}"):
        difference = diff_models(a, b)
        if html is not None:
            difference.to_html(html, title=f"{a.name} → {b.name}")
    _show(difference, as_json)
    if html is not None and not as_json:
        print(f"written: {html}")


@app.command(
    epilog=_example(
        "fusion verify model.onnx fused.onnx",
        "fusion verify model.onnx fused.onnx --inputs feed.npz",
        "fusion verify model.onnx fused.onnx --size batch=1 --size sequence=384 --runs 3",
    )
)
def verify(
    a: ModelA,
    b: ModelB,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="NPZ", help="Use these inputs instead of drawn ones.")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="How many input sets to draw.")] = 8,
    size: Annotated[
        list[str] | None, typer.Option("--size", metavar="NAME=N", help="Size of a named dimension; may be repeated.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option("--rtol", min=0, help="Allowed relative error; else by element type.")
    ] = None,
    atol: Annotated[float | None, typer.Option("--atol", min=0, help="Absolute error that is allowed besides.")] = None,
    optimized: Annotated[
        bool,
        typer.Option("--runtime-optimizations", help="Let onnxruntime rewrite both graphs, as it does by default."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the same inputs through two models and compare every output. Exit code 1: they differ; 2: nobody can tell."""
    sizes = _sizes(size or [])
    with _busy(f"verifying {b.name}") as progress:
        report = verify_models(
            a, b, inputs=inputs, runs=runs, sizes=sizes, rtol=rtol, atol=atol, optimized=optimized, progress=progress
        )
    _show(report, as_json)
    if not report.equal:
        raise typer.Exit(DIFFERENT if report.differences else FAILED)


@app.command(epilog=_example("fusion patterns", "fusion patterns --json"))
def patterns(as_json: AsJson = False) -> None:
    """List the patterns of the library and the simplifications: what, for which targets, and where."""
    known: list[Pattern | Rule] = [*api.library().values(), *RULES.values()]
    if as_json:
        fields = ("name", "doc", "targets", "path", "line")
        _print_json([{f: plain(getattr(p, f)) for f in fields} for p in known])
        return
    shown = table("pattern", "what it computes", "targets", "written in")
    for p in known:
        line = next(iter((p.doc or "").strip().splitlines()), "")
        shown.add_row(p.name, line, ", ".join(p.targets), f"{Path(p.path).name}:{p.line}")
    Console().print(shown, markup=False)


@app.command(epilog=_example("fusion demo", "fusion demo --output somewhere"))
def demo(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where to put the models and the page.")
    ] = Path("demo-out"),
) -> None:
    """Optimize a real BERT export that ships with the package: what was fused, is it equal, how fast, how it looks."""
    if not demonstrate(output, Console()):
        raise typer.Exit(DIFFERENT)


def _show(result: Report, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_dict())
    else:
        result.print()


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def _groups(given: list[str] | None) -> list[list[str]]:
    groups = [text.split("=") for text in given or []]
    for text, names in zip(given or [], groups, strict=True):
        if len(names) < 2 or not all(names):
            raise FusionError(f"--same {text}: expected names of dimensions that are equal, as in --same batch=batch_1")
    return groups


def _sizes(given: list[str]) -> dict[str, int] | None:
    sizes = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal():
            raise FusionError(f"--size {text}: expected the name of a dimension and its size, as in --size batch=2")
        sizes[name] = int(number)
    return sizes or None


@contextmanager
def _busy(what: str) -> Iterator[Callable[[int, int], None]]:
    """Say on a terminal what takes so long; what is given sets how much of it is done."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
