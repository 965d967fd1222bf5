"""Every Python block of the documentation runs, and every shell line calls a command that exists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import typer.main

import fusion
from fusion import cli, targets

ROOT = Path(__file__).parents[1]
MODEL = Path(__file__).parent / "models" / "bert_seqcls__ts14_eager.onnx"
# engine.md lists interfaces, with "..." for bodies; decisions are records of their day.
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "engine.md"})
PAGES = [page for page in PAGES if "decisions" not in page.parts]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of a page with the line they start at."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 1, m.group(1)) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, beside a model.onnx and a fused.onnx made of it."""
    code = blocks(page, "python")
    if not code:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "_targets", dict(targets._targets))  # what a page adds is of the page
    for own in fusion.api.library().values():
        monkeypatch.setattr(own, "emissions", list(own.emissions))
    shutil.copy(MODEL, "model.onnx")
    fusion.optimize("model.onnx", "fused.onnx")
    names: dict[str, object] = {"__name__": "page"}
    for line, text in code:
        # Empty lines in front, so that a traceback and a pattern's own file and line point into the page.
        exec(compile("\n" * line + text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_shell_lines_call_commands_with_options_that_exist(page: Path) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line, text in blocks(page, "console"):
        for words in (
            row.removeprefix("$ ").split("#")[0].split() for row in text.splitlines() if row.startswith("$ ")
        ):
            place = f"{page.name}:{line}: {' '.join(words)}"
            if words[0] == "make":
                assert set(words[1:]) <= targets, place
            elif words[0] == "fusion":
                assert words[1] in commands, place
                options = {opt for parameter in commands[words[1]].params for opt in parameter.opts}
                assert {w for w in words if w.startswith("--")} <= options, place


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
