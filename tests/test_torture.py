"""The short form of the torture suite, and that each of its rows can fail."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from resnet_cifar10 import sources
from torture import inputs
from torture.broken import BROKEN


def torture(*arguments: str | Path, status: int = 0) -> str:
    command = [sys.executable, "-m", "torture", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_the_short_form_finds_nothing_and_writes_its_table(tmp_path: Path) -> None:
    torture("--scale", "0.02", "--report", tmp_path / "reliability.md")
    report = (tmp_path / "reliability.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(BROKEN)
    for what, _, asked, reached, failures, _, note in rows:
        assert failures == "0", what
        assert reached == asked or note.startswith("SKIPPED"), what
    assert "No failures." in report


def test_every_row_notices_a_product_that_is_broken_on_purpose() -> None:
    printed = torture("--broken")
    for row, variants in BROKEN.items():
        for what, _ in variants:
            assert re.search(rf"^{row}: {re.escape(what)}: (caught|SKIPPED) ", printed, re.MULTILINE), printed


def test_one_batch_of_one_row_can_be_asked_for() -> None:
    code = """
import sys
from torture.__main__ import main, training

training.Ground.build = lambda self: vars(self).update(seconds=0.0, whole_seconds=0.0)  # mutated settings train nothing
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "--only", "settings", "--seed", "3", "--batch", "7"]
    printed = subprocess.check_output(command, cwd=ROOT, text=True)
    assert re.search(r"settings: .*: 50 of 50 reached, 0 failures", printed)


def test_a_failure_comes_again_with_the_seed_and_the_batch_that_are_printed_with_it(tmp_path: Path) -> None:
    code = """
import json, pathlib, sys
from torture.harness import Failed, Row, run

def trials(rng, count, folder):
    yield
    raise Failed(rng.random())

row, work = Row("toy", "", "", 12, trials, batch=4), pathlib.Path(sys.argv[1])
print(json.dumps([run(row, 3, 12, work, only).failures for only in (None, 2)]))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    found, again = json.loads(done.stdout)
    assert len(set(found)) == 3
    assert again == found[2:]
    assert again[0].endswith("--only toy --seed 3 --batch 2")


@pytest.mark.parametrize("name", inputs.BAD_BATCHES)
def test_a_bad_batch_is_refused(tmp_path: Path, name: str) -> None:
    bad = inputs.BAD_BATCHES[name]
    for file, content in inputs.good_batches().items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "test_batch").write_bytes(bad if isinstance(bad, bytes) else inputs.bad_batch_of(bad))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        sources.load(tmp_path, "test")


@pytest.mark.parametrize("kind", ["rows", "dictionary"])
def test_a_parquet_bomb_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs.training.GROUND, "folder", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(inputs.parquet_bomb(kind))
    with pytest.raises(ValueError, match="allowed: at most" if kind == "rows" else "more than"):
        sources.load(tmp_path / "data", "train")
