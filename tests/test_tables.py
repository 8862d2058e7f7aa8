"""A table prints to the width there is, loses no row or finding, and exports cleanly.

`pytest tests/test_tables.py --overwrite` writes the golden outputs anew: read the diff.
"""

import io
import json
import pickle
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from keras_glorot.tables import Finding, Layout, Table
from keras_glorot.tables.view import View, fold

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


KERNELS = Layout(kernel_key="fan_in")
AUDIT = Layout(kernel_key="fan_in", can_be_sound=True, is_brief=True)


def table():
    return Table("audit", ROWS, FINDINGS, note="4 variables.", layout=AUDIT)


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


def test_findings_are_folded_only_if_they_say_the_same():
    """But for their numbers, and names that have some: the first one speaks for all."""
    said = ["Signal vanishes: 0.5x from a/b to c_1.", "Gradient vanishes: 0.5x from c_1.",
            "Signal vanishes: 0.07x from d/e to f_2."]  # fmt: skip
    found = [Finding("warning", "vanishing", "c_1", text, "Scale it.") for text in said]
    text = " ".join(str(Table("propagate", dense_rows(3), found)).split())
    assert text.count("(and 1 like it)") == 1
    assert "Signal vanishes: 0.5x" in text
    assert "Gradient vanishes: 0.5x" in text


def dense_rows(count):
    return [{"path": f"dense_{i}/kernel", "std": 1.0, "fan_in": 3} for i in range(count)]


def finding(path, severity="warning", code="std", advice="Fix it."):
    return Finding(severity, code, path, "It is off.", advice)


@pytest.mark.parametrize("columns", [20, 40, 80, 300])
def test_a_long_path_is_folded_and_whole(columns, width):
    width(columns)
    path = "encoder/" + "a/" * 60 + "a_name_that_is_long/kernel"
    text = str(Table("propagate", [{"path": path, "std": 0.5, "x": "y" * 30}] * 3))
    assert re.sub(r"[ \n]|0\.5|y{30}", "", text).count(path) == 3
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5])
def test_no_terminal_is_too_narrow(columns, width):
    width(columns)
    assert str(Table("propagate", [{"path": "名/kernel", "std": 0.5}], [finding("名")]))


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("dense/kernel", 12, ["dense/kernel"]),
        ("encoder/block/depthwise/kernel", 26, ["encoder/block/depthwise/", "kernel"]),
        ("encoder/block/depthwise/kernel", 18, ["encoder/block/", "depthwise/kernel"]),
        ("a_single_name_that_is_long", 13, ["a_single_", "name_that_is_", "long"]),
        ("encoder/a_long_name/kernel", 9, ["encoder/", "a_long_", "name/", "kernel"]),
        ("without_anything", 5, ["witho", "ut_", "anyth", "ing"]),
        ("名名名名名", 6, ["名名名", "名名"]),
        ("ends/", 3, ["end", "s/"]),
    ],
)
def test_names_are_folded_where_their_parts_end(name, width, lines):
    assert fold(name, width) == lines
    assert "".join(lines) == name


@pytest.mark.parametrize("letters", [40, 60, 78])
def test_the_name_in_a_finding_is_on_one_line(letters, width):
    """So that a search in a log finds it."""
    width(80)
    name = "encoder/".ljust(letters - 7, "x") + "/kernel"
    text = str(Table("audit", [], [finding(name)]))
    assert sum(name in line for line in text.splitlines()) == 1


def test_long_names_leave_fewer_rows_on_the_screen(width):
    width(80)
    rows = [{"path": f"{'encoder_block/' * 7}{i}/kernel", "std": 1.0} for i in range(99)]
    assert len(str(Table("audit", rows)).splitlines()) < 32


def test_a_sound_model_takes_one_line(width):
    width(80)
    sound = Table("audit", dense_rows(500), note="500 kernels.", layout=AUDIT)
    assert str(sound) == "audit: sound. 500 kernels."
    remark = [finding("dense_1/kernel", "info")]
    text = str(Table("audit", dense_rows(500), remark, (), "500 kernels.", AUDIT))
    assert text.splitlines()[0] == "audit: sound, 1 remark. 500 kernels."
    assert len(text.splitlines()) == 2


def test_a_long_table_shows_the_rows_with_findings_and_both_ends(width):
    width(80)
    text = str(Table("audit", dense_rows(500), [finding("dense_333/kernel", "error")]))
    lines = text.splitlines()
    assert len(lines) < 32
    assert text.count("dense_333/kernel") == 2  # the row and the finding
    assert "dense_0/kernel" in text
    assert "dense_499/kernel" in text
    left_out = [int(line.split()[1]) for line in lines if line.startswith("…")]
    shown = sum(line.startswith("dense_") for line in lines)
    assert len(left_out) == 2
    assert sum(left_out) + shown == 500
    assert f"Not shown: {sum(left_out)} rows." in text


def test_the_worst_findings_have_precedence(width):
    width(80)
    warnings = [finding(f"dense_{i}/kernel") for i in range(0, 500, 3)]
    errors = [finding(f"dense_{i}/kernel", "error") for i in (200, 250)]
    table = Table("audit", dense_rows(500), warnings + errors)
    selected = View(table).select(24)
    paths = [row["path"] for row in selected if not isinstance(row, int)]
    assert {"dense_200/kernel", "dense_250/kernel"} <= set(paths)
    assert len(selected) <= 24


def test_one_row_is_never_replaced_by_a_mark():
    for count in range(1, 80):
        rows = View(Table("propagate", dense_rows(count))).select(24)
        assert 1 not in rows
        assert sum(row if isinstance(row, int) else 1 for row in rows) == count


def test_kernels_are_shown_and_the_rest_on_request(width, capsys):
    width(80)
    rows = dense_rows(3)
    rows += [{"path": f"dense_{i}/bias", "std": 0.0, "fan_in": None} for i in range(40)]
    found = [finding("dense_7/bias", "info")]
    table = Table("initialize", rows, found, layout=KERNELS)
    assert "dense_7/bias" in str(table)
    assert "dense_8/bias" not in str(table)
    assert "Not shown: 39 rows without a kernel." in str(table)
    table.show(all=True)
    printed = capsys.readouterr().out
    assert all(row["path"] in printed for row in rows)
    assert "Not shown" not in printed


def test_columns_that_do_not_fit_are_named(width):
    width(50)
    text = " ".join(str(table()).split())
    assert "Not shown: columns fan out, std, ratio, layer, initializer, dtype." in text


def test_all_rows_of_a_sound_audit_can_be_shown(width, capsys):
    width(80)
    Table("audit", dense_rows(60), note="All is well.", layout=AUDIT).show(all=True)
    printed = capsys.readouterr().out
    assert printed.count("/kernel") == 60


def test_no_text_steers_the_terminal(width):
    width(80)
    hostile = "\x1b]0;title\x07\x1b[2J\r\n\u202e"
    rows = [{"path": hostile, "std": 1.0, "initializer": hostile}]
    found = [Finding("warning", "std", hostile, hostile, hostile)]
    text = str(Table("propagate", rows, found, note=hostile))
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
    assert r"\x1b]0;title\x07" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_signs(encoding, width):
    width(60)
    path = "名/" + "a/" * 60 + "kernel"
    found = [Finding("error", "std", path, "名.", "名.")]
    many = Table("propagate", [{"path": path, "std": 0.5, "shape": "名"}] * 99, found)
    file = io.TextIOWrapper(io.BytesIO(), encoding, newline="\n")
    Console(file=file).print(many)  # raises what can't be encoded
    file.flush()
    text = file.buffer.getvalue().decode(encoding)
    assert r"\u540d" in text
    assert max(map(len, text.splitlines())) <= 60


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


def test_pickled():
    copy = pickle.loads(pickle.dumps(table()))
    assert str(copy) == str(table())


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = table().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(ROWS[0])
    assert frame["fan_in"].tolist() == [27, 9, 9, 0]


def test_pandas_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        table().to_pandas()


class Outline(HTMLParser):
    """Tags with attributes, and whether all that was opened is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("wbr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_html_is_a_table_that_can_be_sorted():
    outline = Outline(table()._repr_html_())
    assert not outline.open
    assert outline.count("table") == 1
    assert outline.count("tr") == 1 + len(ROWS)
    assert outline.count("button") == len(ROWS[0]) + 1  # and the codes of findings
    assert "Redraw it." in outline.text
    assert "[bold]odd[/] 名/kernel" in outline.text
    assert "0.0797" in outline.text
    marked = [attrs["class"] for tag, attrs in outline.tags if tag == "td"
              and attrs.get("class") in ("error", "warning", "info")]  # fmt: skip
    assert marked == ["error", "warning", "warning", "info"]  # the worst first


def test_html_keeps_the_order_of_calls():
    rows = [{"path": f"dense_{i}", "std": 1.0} for i in range(3)]
    found = [finding("dense_2")]
    calls = Table("propagate", rows, found, layout=Layout(is_sequence=True))
    text = calls._repr_html_()
    assert text.index("<code>dense_<wbr>0") < text.rindex("<code>dense_<wbr>2")


def test_html_of_a_sound_model_is_folded():
    sound = Table("audit", dense_rows(500), note="500 kernels.", layout=AUDIT)
    (attributes,) = [attrs for tag, attrs in Outline(sound._repr_html_()).tags
                     if tag == "details"]  # fmt: skip
    assert "open" not in attributes


def test_html_shows_the_first_rows_and_has_all():
    rows = [*dense_rows(500), {"path": "dense/bias", "std": 0.0, "fan_in": None}]
    found = [finding("dense_499/kernel")]
    text = Table("initialize", rows, found, layout=KERNELS)._repr_html_()
    assert text.count("<tr>") == 1 + 200
    assert text.count('<tr class="more">') == 300
    assert "200 of 500 rows" in text
    assert text.index("499") < text.index("<code>dense_<wbr>0/")
    assert "Not shown: 1 row without a kernel." in text


def test_html_escapes_names():
    hostile = "<script>alert()</script>\"'&"
    found = [Finding("error", "std", hostile, hostile, hostile)]
    outline = Outline(Table("audit", [{"path": hostile, "x": hostile}], found,
                            note=hostile)._repr_html_())  # fmt: skip
    assert outline.count("script") == 0
    assert outline.text.count("alert()") == 6


def test_no_colours_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(table())
    assert repr(table()) == str(table())


def test_empty():
    empty = Table("audit", [], note="This layer has no weights.")
    assert str(empty) == "This layer has no weights."
    assert json.loads(empty.to_json()) == {"kind": "audit", "rows": [], "findings": []}


def test_what_a_terminal_would_obey_is_escaped(width):
    width(80)
    name = "a\x1b[2J\x9bb\x07\u202ec\ud800"
    row, finding = (
        {"path": name, "std": 1.0},
        Finding("warning", "std", name, name, "Do\nit."),
    )
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
