"""A table prints to the width there is, loses no row or finding, and exports cleanly.

`pytest tests/test_tables.py --overwrite` writes the golden outputs anew: read the diff.
"""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from keras_glorot.tables import Finding, Table

GOLDEN = Path(__file__).parent / "golden"
ROWS = [
    {
        "path": path,
        "shape": shape,
        "fan_in": fans[0],
        "fan_out": fans[1],
        "std": std,
        "ratio": ratio,
        "layer": layer,
        "initializer": "GlorotUniform",
        "dtype": "float32",
    }
    for path, shape, fans, std, ratio, layer in [
        ("conv/kernel", (3, 3, 3, 32), (27, 288), 0.0797, 1.002, "Conv2D"),
        ("encoder/block_1/depthwise/kernel", (3, 3, 32, 1), (9, 9), 0.0833, 0.25,
         "DepthwiseConv2D"),
        ("encoder/block_2/depthwise/kernel", (3, 3, 64, 1), (9, 9), 0.0597, 0.179,
         "DepthwiseConv2D"),
        ("[bold]odd[/] 名/kernel", (0, 4), (0, 4), float("nan"), None, "Dense"),
    ]
]  # fmt: skip
FINDINGS = [
    Finding("info", "relu-gain", "conv/kernel", "A remark.", "Nothing to do."),
    *(
        Finding(
            "warning", "std", row["path"], f"The std is {row['ratio']:.2g} of 1.", "Fix it."
        )
        for row in ROWS[1:3]
    ),
    Finding(
        "error", "not-finite", ROWS[3]["path"], "Some values are not finite.", "Redraw it."
    ),
]


def table(**options):
    return Table("audit", ROWS, FINDINGS, **{"note": "4 variables.", **options})


@pytest.fixture
def width(monkeypatch):
    return lambda columns: monkeypatch.setenv("COLUMNS", str(columns))


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_golden_output(columns, width, request):
    width(columns)
    text = str(table()) + "\n"
    golden = GOLDEN / f"table_{columns}.txt"
    if request.config.getoption("--overwrite"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", [20, 40, 80, 300])
def test_every_path_is_whole_at_any_width(columns, width):
    width(columns)
    plain = Table("audit", [{"path": "a/" * 40 + "kernel", "std": 0.5, "x": "y" * 30}] * 3)
    folded = "".join(line.split("  ")[0].strip() for line in str(plain).splitlines())
    assert folded.count("a/" * 40 + "kernel") == 3


def test_a_long_table_shows_the_rows_with_findings(width):
    width(80)
    rows = [{"path": f"dense_{i}/kernel", "std": 1.0} for i in range(500)]
    text = str(
        Table("audit", rows, [Finding("error", "std", "dense_499/kernel", "Bad.", "Fix.")])
    )
    assert "Showing 50 of 500 rows" in text
    assert text.count("dense_499/kernel") == 2  # the row and the finding
    assert "dense_48/" in text
    assert "dense_49/" not in text


def test_sequence_of_rows():
    assert len(table()) == 4
    assert list(table()) == ROWS
    assert [row["path"] for row in table()] == [row["path"] for row in table().rows]


def test_json_is_valid_and_whole():
    content = json.loads(table().to_json(), parse_constant=pytest.fail)
    assert content["kind"] == "audit"
    assert len(content["rows"]) == 4
    assert content["rows"][0]["shape"] == [3, 3, 3, 32]
    assert content["rows"][3]["std"] is None
    assert content["rows"][3]["path"] == ROWS[3]["path"]
    assert content["findings"][0] == FINDINGS[0]._asdict()


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = table().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(ROWS[0])
    assert frame["fan_in"].tolist() == [27, 9, 9, 0]


def test_html_shows_names_as_they_are():
    html = table()._repr_html_()
    assert html.startswith("<pre")
    assert "[bold]odd[/]" in html
    assert "Redraw it." in html
    hostile = Table("audit", [{"path": "<script>alert()</script>"}])
    assert "<script>" not in hostile._repr_html_()


def test_no_colours_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(table())
    assert repr(table()) == str(table())


def test_empty():
    empty = Table("audit", [], note="This layer has no weights.")
    assert str(empty) == "This layer has no weights."
    assert json.loads(empty.to_json()) == {"kind": "audit", "rows": [], "findings": []}


def test_what_a_terminal_would_obey_is_escaped():
    name = "a\x1b[2J\x9bb\x07\u202ec\ud800"
    row, finding = {"path": name, "std": 1.0}, Finding("info", "std", name, name, "Do\nit.")
    for text in (
        str(Table("audit", [row], [finding], note=name)),
        Table("audit", [row], [finding], note=name)._repr_html_(),
    ):
        assert (
            text.count(r"a\x1b[2J\x9bb\x07\u202ec\ud800") == 4
        )  # row, finding twice, note
        assert all(sign.isprintable() or sign == "\n" for sign in text)
    assert name in Table("audit", [row]).rows[0]["path"]


def test_what_an_encoding_lacks_is_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    Console(file=stream, width=80).print(Table("audit", ROWS, FINDINGS))
    stream.flush()
    assert rb"\u540d/kernel" in stream.buffer.getvalue()
