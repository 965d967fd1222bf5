"""The command: what it prints, where, and with which exit code. Run in process, two tests apart."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser
import pytest

from fusion import cli
from fusion.simplify import RULES

MODELS = Path(__file__).parent / "models"
BERT = MODELS / "bert_seqcls__ts14_eager.onnx"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the command with arguments and return what came of it."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fusion", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


def changed(path: Path, to: Path) -> Path:
    """Write a copy of a model whose first float matrix is doubled."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.data_type == 1 and len(t.dims) == 2)
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array * 2, tensor.name))
    onnx.save(model, to)
    return to


def norms(operators: Iterable[str]) -> int:
    """Count layer normalizations, whether or not the residual sum before them went in as well."""
    return sum(op.rpartition("::")[2] in ("LayerNormalization", "SkipLayerNormalization") for op in operators)


# optimize, why -------------------------------------------------------------------------------------------------


def test_optimize_writes_a_model_that_verifies_and_counts_what_was_fused(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.onnx"
    done = fusion("optimize", BERT, out)
    assert (done.code, done.err) == (0, "")
    assert "layer_norm" in done.out
    assert fusion("verify", BERT, out).code == 0


def test_optimize_as_json_is_only_json(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = fusion("optimize", BERT, tmp_path / "out.onnx", "--json")
    data = json.loads(done.out)
    assert data["counts"]["bias_gelu"] == 2
    assert norms(n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node) == 5
    assert data["nodes_before"] == 322
    assert data["nodes_after"] < 200


def test_optimize_with_chosen_patterns_and_target(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.onnx"
    text = """<ir_version: 9, opset_import: ["" : 20]> g (float[n] x) => (float[n] y)
      <float root = {1.41421356}, float one = {1}, float half = {0.5}>
      { d = Div (x, root) e = Erf (d) a = Add (e, one) m = Mul (x, a) y = Mul (m, half) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "in.onnx")
    done = fusion("optimize", tmp_path / "in.onnx", out, "--pattern", "gelu", "--target", "onnx", "--json")
    assert json.loads(done.out)["counts"] == {"gelu": 1}
    assert [(n.domain, n.op_type) for n in onnx.load(out).graph.node] == [("", "Gelu")]
    done = fusion("optimize", tmp_path / "in.onnx", out, "--pattern", "layer_norm", "--pattern", "rms_norm", "--json")
    assert json.loads(done.out)["counts"] == {}
    assert out.read_bytes() == (tmp_path / "in.onnx").read_bytes()


def test_optimize_with_an_opset_converts_first_or_says_why_not(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.onnx"
    done = fusion("optimize", BERT, out, "--target", "onnx", "--opset", 20, "--json")
    assert json.loads(done.out)["counts"] == {"gelu": 2, "layer_norm": 5}
    assert onnx.load(out).opset_import[0].version == 20
    assert "note: the model stays at opset 14: opset 13 is older" in fusion("optimize", BERT, out, "--opset", 13).out


def test_dimensions_that_are_one_are_said_by_their_names(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = """<ir_version: 9, opset_import: ["" : 20]> g (float[a, 4] x, float[b, 4] z) => (float[c, 4] y)
      { y = Add (x, z) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "in.onnx")
    assert fusion("why", tmp_path / "in.onnx", "gelu", "--same", "a=b").code == 0
    done = fusion("optimize", tmp_path / "in.onnx", tmp_path / "out.onnx", "--same", "a=d")
    assert (done.code, done.out) == (2, "")
    assert "no input has a dimension 'd'" in done.err
    assert not (tmp_path / "out.onnx").exists()
    assert "--same a: expected names of dimensions" in fusion("why", tmp_path / "in.onnx", "--same", "a").err


def test_optimize_with_check_runs_every_rewrite(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = fusion("optimize", BERT, tmp_path / "out.onnx", "--check", "--json")
    assert done.code == 0
    assert json.loads(done.out)["counts"]["bias_gelu"] == 2
    matches = json.loads(done.out)["matches"]
    assert all(match["checked"] for match in matches)
    assert norms(n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node) == 5


def test_why_shows_where_a_pattern_matches(fusion) -> None:  # type: ignore[no-untyped-def]
    places = json.loads(fusion("why", BERT, "gelu", "--json").out)["places"]
    assert [p["pattern"] for p in places if p["verdict"] == "yes"] == ["gelu", "gelu"]
    assert "gelu" in fusion("why", BERT, "gelu").out


def test_why_explains_a_near_miss(fusion) -> None:  # type: ignore[no-untyped-def]
    """The trap divides by the square root of three: one constant keeps it from being a Gelu."""
    places = json.loads(fusion("why", MODELS / "hm_gelu_not_gelu_sqrt3__ts14.onnx", "gelu", "--json").out)["places"]
    assert places
    assert all(p["verdict"] == "no" and p["misses"] for p in places)


# diff, verify ---------------------------------------------------------------------------------------------------


def test_verify_says_equal_and_different_by_exit_code(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    equal = fusion("verify", BERT, BERT)
    assert equal.code == 0
    assert "equal: 1 output, 8 input sets" in equal.out
    different = fusion("verify", BERT, changed(BERT, tmp_path / "b.onnx"))
    assert different.code == 1
    assert "✗ output" in different.out


def test_verify_has_an_exit_code_for_what_cannot_be_compared(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[64] x) => (float[64] y) { n = RandomUniformLike (x) y = Add (x, n) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "random.onnx")
    done = fusion("verify", tmp_path / "random.onnx", tmp_path / "random.onnx")
    assert done.code == 2
    assert "nothing could be compared" in done.out


def test_verify_takes_inputs_sizes_and_tolerances(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    other = changed(BERT, tmp_path / "b.onnx")
    data = json.loads(fusion("verify", BERT, BERT, "--inputs", BERT.with_suffix(".npz"), "--json").out)
    assert (data["equal"], data["runs"]) == (True, 1)
    assert fusion("verify", BERT, other, "--rtol", "1e9").code == 0
    sized = fusion("verify", BERT, other, "--size", "batch=2", "--size", "sequence=9", "--runs", 2, "--json")
    assert "batch=2, sequence=9" in json.loads(sized.out)["differences"][0]["feed"]


def test_diff_as_table_json_and_page(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, page = tmp_path / "out.onnx", tmp_path / "page.html"
    fusion("optimize", BERT, out)
    table = fusion("diff", BERT, out, "--html", page)
    assert table.code == 0
    assert "nodes 322 → " in table.out
    assert f"written: {page}" in table.out
    assert "<svg" in page.read_text()
    data = json.loads(fusion("diff", BERT, out, "--json").out)
    regions = [region for scope in data["scopes"] for region in scope["regions"]]
    assert [region["pattern"] for region in regions].count("bias_gelu") == 2
    assert norms(node["operator"] for region in regions for node in region["added"]) == 5


def test_diff_of_equal_models_says_so(fusion) -> None:  # type: ignore[no-untyped-def]
    assert fusion("diff", BERT, BERT) == Outcome(0, "no difference\n", "")


# patterns, version, help ----------------------------------------------------------------------------------------


def test_patterns_lists_every_pattern_with_its_place(fusion) -> None:  # type: ignore[no-untyped-def]
    listed = json.loads(fusion("patterns", "--json").out)
    assert {"gelu", "layer_norm", "rms_norm", "self_attention", "dead_code"} <= {p["name"] for p in listed}
    for p in listed:
        line = Path(p["path"]).read_text().splitlines()[p["line"] - 1]
        assert line.startswith(('"""',) if p["name"] in RULES else ("@pattern", f"def {p['name']}(")), p
        assert p["doc"]
    text = fusion("patterns").out
    assert all(p["name"] in text for p in listed)


def test_version(fusion) -> None:  # type: ignore[no-untyped-def]
    assert fusion("--version").out.startswith("onnx-fusion 0.")


@pytest.mark.parametrize("command", ["optimize", "why", "diff", "verify", "patterns", "demo"])
def test_help_has_examples_that_parse(fusion, command: str) -> None:  # type: ignore[no-untyped-def]
    done = fusion(command, "--help")
    assert done.code == 0
    assert "Examples" in done.out
    assert f"$ fusion {command}" in done.out


# Bad input: one sentence on standard error, exit code 2, nothing else --------------------------------------------


def refused(done: Outcome, *words: str) -> None:
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("fusion: ")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err


def test_an_absent_file(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    absent = tmp_path / "absent.onnx"
    for command in (
        ["optimize", absent, tmp_path / "o"],
        ["why", absent],
        ["diff", absent, BERT],
        ["verify", BERT, absent],
    ):
        refused(fusion(*command), str(absent))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no model, but text", b"\x08\x08\x12", bytes(range(256)) * 20])
def test_a_file_that_is_no_model(fusion, tmp_path: Path, content: bytes) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "m.onnx").write_bytes(content)
    refused(fusion("optimize", tmp_path / "m.onnx", tmp_path / "out.onnx"), "m.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("part", [0.3, 0.7, 0.999])
def test_a_truncated_model(fusion, tmp_path: Path, part: float) -> None:  # type: ignore[no-untyped-def]
    data = BERT.read_bytes()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * part)])
    refused(fusion("optimize", tmp_path / "m.onnx", tmp_path / "out.onnx"), "m.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_that_the_checker_rejects(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = onnx.load(BERT)
    next(n for n in model.graph.node if n.op_type == "MatMul").input[0] = "no_such_value"
    onnx.save(model, tmp_path / "m.onnx")
    refused(fusion("optimize", tmp_path / "m.onnx", tmp_path / "out.onnx"), "m.onnx", "no_such_value")
    assert not (tmp_path / "out.onnx").exists()


def test_missing_external_data(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    onnx.save_model(
        onnx.load(BERT), tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0
    )
    (tmp_path / "w.data").unlink()
    refused(fusion("optimize", tmp_path / "m.onnx", tmp_path / "out.onnx"), "w.data")
    assert not (tmp_path / "out.onnx").exists()


def test_an_unwritable_destination(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(fusion("optimize", BERT, tmp_path / "absent" / "out.onnx"), "absent")
    refused(fusion("optimize", BERT, tmp_path), str(tmp_path))
    refused(fusion("diff", BERT, BERT, "--html", tmp_path / "absent" / "d.html"), "d.html")
    assert list(tmp_path.iterdir()) == []


def test_unknown_names(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.onnx"
    refused(fusion("optimize", BERT, out, "--target", "ort-gpu"), "ort-gpu", "ort-cpu")
    refused(fusion("optimize", BERT, out, "--pattern", "gellu"), "'gellu'", "'gelu'")
    refused(fusion("why", BERT, "gellu"), "'gellu'", "'gelu'")
    refused(fusion("verify", BERT, BERT, "--size", "seq=3"), "'seq'", "sequence")
    refused(fusion("verify", BERT, BERT, "--size", "sequence"), "--size sequence")
    assert not out.exists()


def test_inputs_that_do_not_fit(fusion, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    np.savez(tmp_path / "in.npz", x=np.zeros(3))
    refused(fusion("verify", BERT, BERT, "--inputs", tmp_path / "in.npz"), "in.npz", "input_ids")
    refused(fusion("verify", BERT, BERT, "--inputs", tmp_path / "none.npz"), "none.npz")


def test_an_unknown_command_shows_the_usage(fusion) -> None:  # type: ignore[no-untyped-def]
    done = fusion("optimise")
    assert done.code == 2
    assert "Usage: fusion" in done.err


# As a process ----------------------------------------------------------------------------------------------------


def test_the_installed_command_fails_without_a_traceback(tmp_path: Path) -> None:
    command = shutil.which("fusion", path=str(Path(sys.executable).parent))
    assert command, "the package is not installed: make test installs it"
    done = subprocess.run([command, "why", str(tmp_path / "absent.onnx")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
