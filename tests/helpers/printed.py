"""Code blocks of Markdown files: they run, and print what stands below them."""

import re

import keras
import pytest

NUMBER = r"\d+(?:\.\d+)?(?:e[-+]\d+)?"
# Six standard errors of the std of the smallest drawn kernel, 576 uniform values, are 11 %.
# Backends differ in the last digit of four.
DRAWN, COMPUTED = 0.12, 2e-3


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def blocks_with_output(text):
    return re.findall(r"```python\n([^`]*?)```\n\n```\n(.*?)```", text, re.DOTALL)


def assert_comments_are_printed(block, capsys):
    """Each `print(...)  # text` prints this text, before anything else is printed."""
    exec(compile(block, "block", "exec"), {"__name__": "block"})
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert [line for line in printed if line.strip()][: len(expected)] == expected


def assert_output_is_printed(block, output, capsys, monkeypatch):
    """The same words; numbers that are drawn may differ, those that are computed not."""
    monkeypatch.setenv("COLUMNS", "80")
    runs = []
    for seed in (1, 2):
        keras.utils.clear_session()
        keras.utils.set_random_seed(seed)
        exec(compile(block, "block", "exec"), {"__name__": "block"})
        runs.append(tokens(capsys.readouterr().out))
    assert max(map(len, output.splitlines())) <= 80
    tolerances = [COMPUTED if a == b else DRAWN for a, b in zip(*runs, strict=True)]
    assert_alike(runs[0], tokens(output), tolerances)


def tokens(text):
    return re.sub("─+", " ", text).split()


def assert_alike(printed, expected, tolerances):
    """The same words, and numbers within these relative tolerances."""
    words = [[re.sub(NUMBER, "#", token) for token in text] for text in (printed, expected)]
    assert words[0] == words[1]
    for token, wanted, tolerance in zip(printed, expected, tolerances, strict=True):
        numbers, right = (list(map(float, re.findall(NUMBER, t))) for t in (token, wanted))
        assert numbers == pytest.approx(right, rel=tolerance), wanted
