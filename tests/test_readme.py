"""Every Python block of the README runs, and prints what stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from printed import (
    assert_alike,
    assert_comments_are_printed,
    assert_output_is_printed,
    blocks_with_output,
    python_blocks,
    tokens,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = python_blocks(README)
TABLES = blocks_with_output(README)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_block(block, capsys):
    assert_comments_are_printed(block, capsys)


@pytest.mark.parametrize(("block", "output"), TABLES)
def test_tables_are_what_is_printed(block, output, capsys, monkeypatch):
    assert_output_is_printed(block, output, capsys, monkeypatch)


def points(accuracy):
    """How far the accuracy on 450 digits may be off where sums have another order.

    Four standard errors near 97 %, and guessing is always of the same digit. In between a
    net is still learning, and two seeds differ by 8 (benchmarks/evidence/depth.jsonl).
    """
    return 3.5 if accuracy > 90 or accuracy < 11 else 16


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="README's backend")
def test_the_demo_prints_the_first_screen():
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, str(ROOT / "benchmarks" / "demo.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    expected = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0]
    # Without the versions and the seconds.
    printed, wanted = tokens(done.stdout)[6:-4], tokens(expected)[6:]
    accuracies = [
        [float(token[:-1]) for token in text if token.endswith("%")]
        for text in (printed, wanted)
    ]
    for seen, claimed in zip(*accuracies, strict=True):
        assert seen == pytest.approx(claimed, abs=points(claimed))
    others = [[t for t in text if not t.endswith("%")] for text in (printed, wanted)]
    assert_alike(*others, [0.05] * len(others[0]))


def test_it_is_short():
    """What is reference stands in the documentation, once."""
    assert len(README.splitlines()) <= 150


def test_there_are_blocks():
    assert len(BLOCKS) >= 5
    assert len(TABLES) >= 1


def test_no_reference_to_a_file_that_is_missing():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists()
