"""What an installation brings, and which way the imports go."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENGINE = sorted((ROOT / "fusion").rglob("*.py"))
LIBRARY = sorted((ROOT / "patterns").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "patterns":
        parts.insert(0, "fusion")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ENGINE + LIBRARY}


def imports(path: Path) -> set[str]:
    """Return the modules a file imports while it is itself imported; not those inside functions, nor for types only."""
    names: set[str] = set()
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]

    def visit(body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Import):
                names.update(alias.name for alias in statement.names)
            elif isinstance(statement, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
                origin = ".".join([*base, *([statement.module] if statement.module else [])])
                # `from package import part` needs the part; `from module import name` needs the module.
                parts = {alias.name: f"{origin}.{alias.name}" for alias in statement.names}
                names.update(part if part in MODULES else origin for part in parts.values())
            elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
                visit(statement.orelse)
            elif isinstance(statement, ast.If | ast.Try | ast.With):
                visit([s for field in ("body", "orelse", "finalbody") for s in getattr(statement, field, [])])

    visit(ast.parse(path.read_text()).body)
    return names


def test_imports_form_no_circle() -> None:
    graph = nx.DiGraph(
        (name, imported) for name, path in MODULES.items() for imported in imports(path) & MODULES.keys()
    )
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert circles == []


PACKAGES = ["models", "facts", "laws", "matching", "writing", "simplify"]
"""Each leans on those before it; on diffing and instances, which are for people, none does."""


def test_packages_lean_on_those_before_them_only() -> None:
    for place, package in enumerate(PACKAGES):
        later = [*PACKAGES[place + 1 :], "diffing", "instances"]
        for name, path in MODULES.items():
            if name.startswith(f"fusion.{package}."):
                wrong = {m for m in imports(path) if m.split(".")[1:2] and m.split(".")[1] in later}
                assert not wrong, f"{path} imports {', '.join(wrong)}"


def test_no_engine_module_imports_the_face_of_the_package() -> None:
    """`from fusion import x` inside the engine would make every module depend on the whole of it."""
    for path in ENGINE:
        assert "fusion" not in imports(path), path


def test_the_engine_never_imports_the_library() -> None:
    for path in ENGINE:
        for node in ast.walk(ast.parse(path.read_text())):
            named = {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            named |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            for name in named:
                assert not name.startswith(("patterns", "fusion.patterns")), f"{path} imports {name}"


def test_the_library_is_loaded_by_name_and_only_by_the_face() -> None:
    mentions = {p.name for p in ENGINE if '"fusion.patterns"' in p.read_text()}
    assert mentions <= {"api.py", "cli.py"}


@pytest.mark.parametrize("path", ENGINE + LIBRARY, ids=lambda p: module_name(p))
def test_every_module_imports_alone_and_says_what_it_is(path: Path) -> None:
    assert importlib.import_module(module_name(path))
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{path} has no docstring"


def test_every_package_is_listed() -> None:
    """setuptools cannot both discover the engine and be told where the library lies, so the list is kept by hand."""
    there = {module_name(path) for path in ENGINE + LIBRARY if path.name == "__init__.py"}
    assert set(CONFIG["tool"]["setuptools"]["packages"]) == there


def test_nothing_that_is_ignored_is_tracked() -> None:
    """An environment or a build that was committed once makes every clone large, and `make` take it for its own."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git working tree")
    tracked = done.stdout.splitlines()
    assert not tracked, f"{len(tracked)} ignored files are tracked, {tracked[0]} first: git rm -r --cached them"


def test_every_dependency_has_a_range_and_a_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for requirement in CONFIG["project"]["dependencies"]:
        line = next(line for line in lines if f'"{requirement}"' in line)
        assert ">=" in requirement, requirement
        assert "#" in line, f"{requirement}: why is it needed?"


def test_the_distribution_is_installed_with_its_command() -> None:
    dist = distribution("onnx-fusion")
    assert dist.version == CONFIG["project"]["version"]
    assert {e.name: e.value for e in dist.entry_points}["fusion"] == "fusion.cli:main"
    assert importlib.import_module("fusion.patterns").__name__ == "fusion.patterns"


def test_the_wheel_brings_one_import_name_and_what_it_reads(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no wheel can be built here: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"fusion"}
    modules = {str(p.relative_to(ROOT)) for p in ENGINE} | {f"fusion/{p.relative_to(ROOT)}" for p in LIBRARY}
    assert modules <= set(names)
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "fusion" / "data").iterdir() if p.is_file()}
    assert {"fusion/py.typed", *data} <= set(names)
    assert len(data) >= 2


def test_the_wheel_works_away_from_the_source(tmp_path: Path) -> None:
    """The library and the data are found in an installation, not only in the working tree."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no wheel can be built here: {done.stderr.strip().splitlines()[-1:]}")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import fusion, fusion.patterns, fusion.demo, fusion.diffing.page\n"
        "assert fusion.__file__.startswith(sys.path[0]), fusion.__file__\n"
        "assert fusion.patterns.__file__.startswith(sys.path[0]), fusion.patterns.__file__\n"
        "print(len(fusion.patterns.registry()), len(fusion.demo.bert().graph.node))\n"
    )
    # -P: without the working directory, -S would lose the dependencies.
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    patterns, nodes = map(int, done.stdout.split())
    assert patterns >= 5
    assert nodes == 377
