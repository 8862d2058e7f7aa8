"""The page of `report` needs nothing but itself, and can be used by everyone.

Run with `-s` for how long ten thousand rows take, and `--basetemp DIR` for the pages and
their screenshots.
"""

import errno
import os
import re
import sys
import time
from pathlib import Path

import browser as chromium
import keras
import numpy as np
import pytest

from keras_glorot import audit, initialize, report
from keras_glorot._drawing.stream import draw
from keras_glorot.tables import Finding, Layout, Table
from keras_glorot.tables.plots import RATIOS, STDS
from keras_glorot.tools.report import audit_section, write_page

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
in_browser = [pytest.mark.slow, chromium.needs_chromium]

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked=1'>\"$x^$\x1b"
)


def net():
    hidden = [keras.layers.Dense(30, "tanh", name=f"h{i}") for i in range(5)]
    model = keras.Sequential(
        [keras.Input((9,)), *hidden, keras.layers.Dense(3, name="out")], name="digits"
    )
    initialize(model, seed=1, verbose=0)
    noise = np.random.default_rng(0).normal(0, 0.05, (30, 30))  # it should be uniform
    model.layers[2].kernel.assign(noise)
    return model


LAYOUT = Layout(kernel_key="fan_in", picture=RATIOS)
X = draw("truncated_normal", (50, 9), 1.0, "float32", (7,))


def many(count):
    """An audit of made-up kernels, of which each hundredth is off."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "path": f"encoder/layer_{i}/dense/kernel",
            "expected_std": 0.1,
            "std": float(std),
            "ratio": float(std / 0.1),
            "shape": (3, 3, i),
            "fan_in": 9,
            "layer": "Dense",
        }
        for i, std in enumerate(rng.uniform(0.09, 0.11, count))
    ]
    found = []
    for row in rows[7::100]:
        row["std"], row["ratio"] = row["std"] / 10, row["ratio"] / 10
        found.append(Finding("warning", "std", row["path"], "It is off.", "Fix it."))
    return Table("audit", rows, found, (), f"{count} kernels.", LAYOUT)


def page_of(table, path, name="model"):
    return write_page(
        path, name, [audit_section({"": table})], "keras_glorot.report(model)"
    )


def test_the_page_has_what_there_is_to_know(tmp_path):
    path = report(net(), X, path=tmp_path / "report.html", seed=5)
    text = path.read_text(encoding="utf-8")
    assert "Initialization of digits" in text
    assert "audit: 1 warning. 5 of 6 kernels have the expected std" in text
    assert "keras_glorot.report(model, x, seed=5)" in text
    assert f"<td>{keras.__version__}</td>" in text
    assert text.count("<svg role=") == 3
    assert len(text) < 2_000_000


def test_rows_have_the_numbers_of_the_picture(tmp_path):
    ratios = enumerate([0.1, None, 0.2])
    rows = [{"path": f"k{i}", "fan_in": 1, "ratio": ratio} for i, ratio in ratios]
    page = page_of(Table("audit", rows, layout=LAYOUT), tmp_path / "page.html")
    numbers = r'</code></td><td class="number">(\d*)</td>'
    assert re.findall(numbers, page.read_text(encoding="utf-8")) == ["1", "", "2"]


def test_a_model_before_stands_beside(tmp_path):
    model = net()
    before = keras.models.clone_model(model)
    path = report(model, X, path=tmp_path / "report.html", before=before)
    text = path.read_text(encoding="utf-8")
    assert text.count("<svg role=") == 6
    labels = re.findall("<figcaption>(Before|After): ", text)
    assert labels == ["Before", "After"] * 3
    verdicts = re.findall('class="verdict [a-z]*">(.*?): ', text)
    assert verdicts == ["Before", "After"] * 2
    assert "keras_glorot.report(model, x, seed=0, before=before)" in text
    with pytest.raises(ValueError, match="Argument `before` must be built"):
        report(model, path=tmp_path / "report.html", before=keras.layers.Dense(3))


def test_pictures_before_and_after_have_one_scale():
    """And a kernel without spread stands at the edge of it."""
    rows = [
        {"path": "a", "fan_in": 1, "ratio": 1.0, "std": 1.0, "gradient_std": 1.0},
        {"path": "b", "fan_in": 1, "ratio": 0.0, "std": 1.0, "gradient_std": 1.0},
    ]
    others = [row | {"ratio": 1e-3, "std": 1e-9, "gradient_std": 1e9} for row in rows]
    for picture in (RATIOS, STDS):
        layout = Layout(picture=picture)
        tables = {"Before: ": Table("x", rows, layout=layout),
                  "After: ": Table("x", others, layout=layout)}  # fmt: skip
        before, after = (draw() for draw in audit_section(tables).pictures.values())
        assert before.get_xlim() == after.get_xlim()
        assert before.get_ylim() == after.get_ylim()
        if picture is RATIOS:
            (dead,) = before.collections[0].get_offsets()[1:]
            assert dead[0] == before.get_xlim()[0] < 1e-3


def test_without_a_batch_it_is_about_weights(tmp_path):
    text = report(net(), path=tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg role=") == 1
    assert "keras_glorot.report(model)" in text


def test_the_same_model_gives_the_same_page(tmp_path):
    model = net()
    one, other = (report(model, X, path=tmp_path / name) for name in ("1.html", "2.html"))
    assert one.read_bytes() == other.read_bytes()


def test_a_model_without_weights(tmp_path):
    layer = keras.layers.ReLU()
    layer.build((None, 3))
    assert report(layer, path=tmp_path / "report.html").exists()


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(draft, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(draft))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ValueError, match=rf"Received: {path} \(No space left"):
        page_of(audit(net()), path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_the_path_is_checked_before_the_work(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "report.html"):
        with pytest.raises(ValueError, match="Argument `path` must be"):
            report("no model", path=path)


def test_a_path_that_is_too_long(tmp_path):
    with pytest.raises(ValueError, match=r"Argument `path` must be .*too long"):
        report(net(), path=tmp_path / f"{'x' * 300}.html")


def test_targets_come_before_the_path(tmp_path, monkeypatch):
    """As everywhere: a third argument is y, and not the name of a file."""
    monkeypatch.chdir(tmp_path)
    y = np.zeros((50, 3), "float32")
    text = report(net(), X, y, "mse").read_text(encoding="utf-8")
    assert "keras_glorot.report(model, x, y, loss, seed=0)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="loss"):
        report(net(), X, "other.html")


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"keras-glorot\[report\]"):
        report(net(), path=tmp_path / "report.html")


@pytest.fixture(scope="module")
def browser():
    with chromium.launched() as browser:
        yield browser


def column(page, name):
    """What a column of the first table shows."""
    heads = page.locator("table").first.locator("th").all_inner_texts()
    number = [head.strip() for head in heads].index(name) + 1
    cells = page.locator("tbody").first.locator(f"tr:visible td:nth-child({number})")
    return cells.all_inner_texts()


def sort(page, name, order):
    """By the keyboard, until the first table is sorted."""
    head = page.locator("table").first.locator("th", has_text=name)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == order


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    return report(net(), X, path=tmp_path_factory.mktemp("report") / "report.html")


class TestInBrowser:
    pytestmark = in_browser

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [400, 1200])
    def test_accessible(self, browser, page_file, width, scheme):
        """Nothing serious from axe-core, and nothing that must be scrolled sideways."""
        page = chromium.open_file(browser, page_file, width=width, scheme=scheme)
        shot = page_file.parent / f"{width}_{scheme}.png"
        page.screenshot(path=shot, full_page=True)
        bad = [each for each in chromium.violations(page)
               if each["impact"] in ("serious", "critical")]  # fmt: skip
        assert not [(each["id"], each["nodes"]) for each in bad]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        assert ink == page.evaluate("getComputedStyle(document.body).color")
        chromium.close(page)

    def test_sorted_and_filtered_from_the_keyboard(self, browser, page_file):
        page = chromium.open_file(browser, page_file)
        assert column(page, "path")[0] == "h2/kernel"  # what has a finding comes first
        assert column(page, "finding")[0] == "std"
        color = "cell => getComputedStyle(cell).borderLeftColor"
        marked = page.locator("td.warning").first
        assert marked.evaluate(color) == "rgb(232, 163, 61)"
        sort(page, "ratio", "ascending")
        ratios = column(page, "ratio")
        assert ratios[:6] == sorted(ratios[:6], key=float)
        assert ratios[6:] == [""] * 6  # biases have none
        page.get_by_label("Filter rows:").first.focus()
        page.keyboard.type("h3 kernel")
        assert page.locator("output").first.inner_text() == "1 of 12 rows"
        assert column(page, "path") == ["h3/kernel"]
        chromium.close(page)

    def test_hostile_names_are_shown_and_not_run(self, browser, tmp_path):
        rows = [{"path": f"{HOSTILE} {i}", "fan_in": 1, "ratio": 0.1, "layer": HOSTILE}
                for i in range(3)]  # fmt: skip
        found = [Finding("error", "std", row["path"], HOSTILE, HOSTILE) for row in rows]
        table = Table("audit", rows, found, (), HOSTILE, LAYOUT)
        page = chromium.open_file(
            browser, page_of(table, tmp_path / "hostile.html", HOSTILE)
        )
        assert page.evaluate("window.hacked") is None
        visible = HOSTILE.replace("\x1b", r"\x1b")
        assert visible in page.inner_text("h1")
        assert column(page, "path") == [f"{visible} {i}" for i in range(3)]
        chromium.close(page)

    def test_ten_thousand_rows(self, browser, tmp_path):
        path = page_of(many(10_000), tmp_path / "many.html")
        begin = time.perf_counter()
        page = chromium.open_file(browser, path)
        steps = {"open": time.perf_counter() - begin}
        assert column(page, "finding") == ["std"] * 100 + [""] * 100  # not 10,000

        def timed(name, act, *arguments):
            begin = time.perf_counter()
            act(*arguments)
            steps[name] = time.perf_counter() - begin

        timed("sort", sort, page, "ratio", "ascending")
        sort(page, "ratio", "descending")
        ratios = [float(text) for text in column(page, "ratio")]
        assert ratios == sorted(ratios, reverse=True)
        assert min(ratios) > 1.09  # of two tenths, the largest 200 of 9,900
        keys = page.get_by_label("Filter rows:").press_sequentially
        timed("filter, 11 keys", keys, "layer_7777/")
        assert column(page, "path") == ["encoder/layer_7777/dense/kernel"]
        page.get_by_label("Filter rows:").fill("")
        timed("all", page.get_by_text("Show all rows").click)
        assert page.locator("output").inner_text() == "10000 rows"
        assert page.locator("details tr:visible").count() == 1 + 10_000
        print(f"\n10,000 rows, {path.stat().st_size:,} bytes, seconds:",
              {name: round(seconds, 2) for name, seconds in steps.items()})  # fmt: skip
        chromium.close(page)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_table_of_a_notebook(self, browser, tmp_path, scheme):
        path = tmp_path / "notebook.html"
        style = f"<meta name=color-scheme content={scheme}>"
        text = f"<!DOCTYPE html><html lang=en><title>x</title>{style}<main><h1>x</h1>"
        path.write_text(f"{text}{many(500)._repr_html_()}</main>", encoding="utf-8")
        page = chromium.open_file(browser, path, width=400, scheme=scheme)
        page.screenshot(path=tmp_path / f"{scheme}.png")
        bad = [each for each in chromium.violations(page)
               if each["impact"] in ("serious", "critical")]  # fmt: skip
        assert not [(each["id"], each["nodes"]) for each in bad]
        for order in ("ascending", "descending"):
            sort(page, "ratio", order)
            ratios = [float(text) for text in column(page, "ratio")]
            assert len(ratios) == 200
            assert ratios == sorted(ratios, reverse=order == "descending")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        chromium.close(page)

    def test_numbers_that_are_none_come_last(self, browser, tmp_path):
        values = [float("nan"), 2.0, None, -1e-9, 10.0]
        rows = [{"path": f"{value}", "value": value} for value in values]
        path = tmp_path / "table.html"
        path.write_text(Table("x", rows)._repr_html_(), encoding="utf-8")
        page = chromium.open_file(browser, path)
        sort(page, "value", "ascending")
        assert column(page, "value")[:3] == ["-1e-09", "2", "10"]
        sort(page, "value", "descending")
        assert column(page, "value")[:3] == ["10", "2", "-1e-09"]
        chromium.close(page)


def test_audit_of_a_model_can_be_a_page(tmp_path):
    assert page_of(audit(net()), tmp_path / "page.html").exists()


def test_names_in_any_script_need_no_font(tmp_path):
    names = ["名前", "имя", "🙂"]  # a warning of a missing font would be an error here
    hidden = [keras.layers.Dense(30, "tanh", name=name) for name in names]
    model = keras.Sequential([keras.Input((9,)), *hidden])
    text = report(model, X, path=tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text.count(f">{name}</text>") for name in names)
