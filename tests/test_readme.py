"""Every Python block of the README runs, and prints what its comments say."""

import re
from pathlib import Path

import keras
import pytest

from keras_glorot.auditing import CODES

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_block(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert [line for line in printed if line.strip()][: len(expected)] == expected


TABLES = re.findall(r"```python\n([^`]*?)```\n\n```\n(.*?)```", README, re.DOTALL)


def words(text):
    """The words of a table: stock Keras draws other numbers on each backend."""
    return re.sub(r"[-\d.e─]+", " ", text).split()


@pytest.mark.parametrize(("block", "table"), TABLES)
def test_tables_are_what_is_printed(block, table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    keras.utils.clear_session()
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert words(capsys.readouterr().out) == words(table)


def test_every_code_of_audit_is_listed():
    listed = set(re.findall(r"`([a-z-]+)`", README))
    assert listed.issuperset(CODES)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
    assert len(TABLES) >= 2


def test_no_reference_to_a_file_that_is_missing():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parent.parent / target).exists()
