"""The benchmark in its smallest form: it runs, and its JSON holds what the table promises."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BENCH = [sys.executable, str(ROOT / "benchmarks" / "bench.py")]


def test_smallest_form(tmp_path: Path) -> None:
    command = [*BENCH, "--quick", "--only", "ResNet-8", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "min left" in done.stderr and "not measured" in done.stdout
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert result["not_measured"]["all that is compiled"] and result["machine"]["torch"]
    rows = {(row["contender"].partition(",")[0], row["measure"].partition(" ")[0]): row for row in result["rows"]}
    assert {("common recipe", "images/s"), ("ours", "images/s"), ("ours", "%")} < rows.keys()
    for row in rows.values():
        middle, least, greatest = row["value"]
        assert 0 < least <= middle <= greatest and row["peak_memory_mb"] > 50
    assert rows["common recipe", "images/s"]["times_baseline"] is None
    ratio = rows["ours", "images/s"]["value"][0] / rows["common recipe", "images/s"]["value"][0]
    assert abs(rows["ours", "images/s"]["times_baseline"][0] / ratio - 1) < 1e-6


def test_wrong_data_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--data", str(tmp_path / "nothing")])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(BENCH[1], run_name="__main__")
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
