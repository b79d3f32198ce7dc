"""The short form of the torture suite, and that each of its rows can fail."""

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from resnet_cifar10 import sources
from torture import inputs
from torture.broken import BROKEN
from torture.harness import Failed, Row, run


def test_the_short_form_finds_nothing_and_every_row_notices_a_product_that_is_broken_on_purpose(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torture", "--scale", "0.01", "--broken", "--report", tmp_path / "reliability.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "reliability.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(BROKEN)
    for what, _, asked, reached, failures, _, note in rows:
        assert failures == "0", what
        assert reached == asked or note.startswith("SKIPPED"), what
    assert "No failures." in report
    for row, variants in BROKEN.items():
        for what, _ in variants:
            assert re.search(rf"^{row}: {re.escape(what)}: (caught|SKIPPED) ", done.stdout, re.MULTILINE), done.stdout


def test_a_failure_comes_again_with_the_command_that_is_printed_with_it(tmp_path: Path) -> None:
    def trials(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
        yield
        raise Failed(rng.random())

    (tmp_path / "again").mkdir()
    row = Row("toy", "", "", 12, trials, batch=4)
    found = run(row, 3, 12, tmp_path).failures
    assert len(set(found)) == 3 and found[2].endswith("again: python -m torture --only toy --seed 3 --batch 2")
    assert run(row, 3, 12, tmp_path / "again", only=2).failures == found[2:]


@pytest.mark.parametrize("name", inputs.BAD_BATCHES)
def test_a_bad_batch_is_refused(tmp_path: Path, name: str) -> None:
    bad = inputs.BAD_BATCHES[name]
    for file, content in inputs.good_batches().items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "test_batch").write_bytes(bad if isinstance(bad, bytes) else inputs.bad_batch_of(bad))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        sources.load(tmp_path, "test")
