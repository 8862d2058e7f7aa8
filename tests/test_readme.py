"""Every Python block of the README runs, and prints what stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from keras_glorot.tools.audit import CODES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_block(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert [line for line in printed if line.strip()][: len(expected)] == expected


TABLES = re.findall(r"```python\n([^`]*?)```\n\n```\n(.*?)```", README, re.DOTALL)


def tokens(text):
    return re.sub("─+", " ", text).split()


NUMBER = r"\d+(?:\.\d+)?(?:e[-+]\d+)?"


def assert_alike(printed, expected, tolerances):
    """The same words, and numbers within these relative tolerances."""
    words = [[re.sub(NUMBER, "#", token) for token in text] for text in (printed, expected)]
    assert words[0] == words[1]
    for token, wanted, tolerance in zip(printed, expected, tolerances, strict=True):
        numbers, right = (list(map(float, re.findall(NUMBER, t))) for t in (token, wanted))
        assert numbers == pytest.approx(right, rel=tolerance), wanted


# Six standard errors of the std of the smallest drawn kernel, 576 uniform values, are 11 %.
# Backends differ in the last digit of four.
DRAWN, COMPUTED = 0.12, 2e-3


@pytest.mark.parametrize(("block", "table"), TABLES)
def test_tables_are_what_is_printed(block, table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    runs = []
    for seed in (1, 2):  # what differs is drawn
        keras.utils.clear_session()
        keras.utils.set_random_seed(seed)
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        runs.append(tokens(capsys.readouterr().out))
    assert max(map(len, table.splitlines())) <= 80
    tolerances = [COMPUTED if a == b else DRAWN for a, b in zip(*runs, strict=True)]
    assert_alike(runs[0], tokens(table), tolerances)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="README's backend")
def test_the_demo_prints_the_first_screen():
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, str(ROOT / "benchmarks" / "demo.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    expected = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0]
    # Without the versions and the seconds; sums differ in their last bits by processor.
    printed, wanted = (tokens(text)[6:-4] for text in (done.stdout, expected))
    assert_alike(printed, wanted, [0.05] * len(wanted))


def test_every_code_of_audit_is_listed():
    listed = set(re.findall(r"`([a-z-]+)`", README))
    assert listed.issuperset(CODES)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
    assert len(TABLES) >= 2


def test_no_reference_to_a_file_that_is_missing():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists()
