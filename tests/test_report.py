"""The page of `report` needs nothing but itself, and can be used by everyone.

Run with `-s` for how long ten thousand rows take, and `--basetemp DIR` for the pages and
their screenshots.
"""

import errno
import os
import sys
import time
from pathlib import Path

import browser as chromium
import keras
import numpy as np
import pytest

from keras_glorot import audit, initialize, report
from keras_glorot.report import audit_section, write_page
from keras_glorot.sampling import draw
from keras_glorot.tables import Finding, Table

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("itables")
pytest.importorskip("pandas")
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
    model.layers[2].kernel.assign(model.layers[2].kernel.numpy() / 4)
    return model


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
    return Table("audit", rows, found, note=f"{count} kernels.")


def page_of(table, path, name="model"):
    return write_page(path, name, [audit_section(table)], "keras_glorot.report(model)")


def test_the_page_has_what_there_is_to_know(tmp_path):
    path = report(net(), X, tmp_path / "report.html", seed=5)
    text = path.read_text(encoding="utf-8")
    assert "Initialization of digits" in text
    assert "audit: 1 warning. 5 of 6 kernels have the expected std" in text
    assert "keras_glorot.report(model, x, seed=5)" in text
    assert f"<td>{keras.__version__}</td>" in text
    assert text.count("<svg role=") == 3
    assert len(text) < 2_000_000


def test_without_a_batch_it_is_about_weights(tmp_path):
    text = report(net(), path=tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg role=") == 1
    assert "keras_glorot.report(model)" in text
    assert "seed of the gradient" not in text


def test_the_same_model_gives_the_same_page(tmp_path):
    model = net()
    one, other = (report(model, X, tmp_path / name) for name in ("1.html", "2.html"))
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


@pytest.mark.parametrize("package", ["matplotlib", "itables", "pandas"])
def test_what_is_missing_is_named(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "itables":
        monkeypatch.delitem(sys.modules, "itables.javascript", raising=False)
    with pytest.raises(ImportError, match=r"keras-glorot\[report\]"):
        report(net(), path=tmp_path / "report.html")


@pytest.fixture(scope="module")
def browser():
    with chromium.launched() as browser:
        yield browser


def open_page(browser, path, **options):
    page = chromium.open_file(browser, path, **options)
    page.wait_for_selector("table.dataTable tbody tr td", timeout=30_000)
    return page


def column(page, number):
    """What a column of the first table shows."""
    cells = page.locator(f"#section-1-table tbody tr td:nth-child({number})")
    return cells.all_inner_texts()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    return report(net(), X, tmp_path_factory.mktemp("report") / "report.html")


class TestInBrowser:
    pytestmark = in_browser

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [400, 1200])
    def test_accessible(self, browser, page_file, width, scheme):
        """Nothing serious from axe-core, and nothing that must be scrolled sideways."""
        page = open_page(browser, page_file, width=width, scheme=scheme)
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
        page = open_page(browser, page_file)
        assert column(page, 1)[0] == "h2/kernel"  # what has a finding comes first
        header = page.locator("#section-1-table thead th", has_text="ratio")
        header.locator("[tabindex], button").first.focus()
        page.keyboard.press("Enter")
        heads = page.locator("#section-1-table thead th").all_inner_texts()
        number = [text.strip() for text in heads].index("ratio") + 1
        ratios = [float(text) for text in column(page, number) if text]
        assert ratios == sorted(ratios)
        assert len(ratios) == 6
        page.get_by_label("Filter rows:").first.focus()
        page.keyboard.type("h3 kernel")
        page.get_by_text("Showing 1 to 1 of 1").wait_for()
        assert column(page, 1) == ["h3/kernel"]
        chromium.close(page)

    def test_hostile_names_are_shown_and_not_run(self, browser, tmp_path):
        rows = [{"path": f"{HOSTILE} {i}", "fan_in": 1, "ratio": 0.1, "layer": HOSTILE}
                for i in range(3)]  # fmt: skip
        found = [Finding("error", "std", row["path"], HOSTILE, HOSTILE) for row in rows]
        table = Table("audit", rows, found, note=HOSTILE)
        page = open_page(browser, page_of(table, tmp_path / "hostile.html", HOSTILE))
        assert page.evaluate("window.hacked") is None
        visible = HOSTILE.replace("\x1b", r"\x1b")
        assert visible in page.inner_text("h1")
        assert sorted(column(page, 1)) == [f"{visible} {i}" for i in range(3)]
        chromium.close(page)

    def test_ten_thousand_rows(self, browser, tmp_path):
        path = page_of(many(10_000), tmp_path / "many.html")
        begin = time.perf_counter()
        page = open_page(browser, path)
        steps = {"open": time.perf_counter() - begin}
        assert page.locator("#section-1-table tbody tr").count() == 25  # not 10,000
        assert set(column(page, 2)) == {"std"}

        def timed(name, act):
            begin = time.perf_counter()
            act()
            steps[name] = time.perf_counter() - begin

        def sort(order):
            page.locator("#section-1-table thead th", has_text="ratio").click()
            page.locator(f"#section-1-table th[aria-sort={order}]").wait_for()

        timed("sort", lambda: sort("ascending"))
        sort("descending")
        ratios = [float(text) for text in column(page, 5)]
        assert ratios == sorted(ratios, reverse=True)
        assert min(ratios) > 1.09  # of two tenths, the largest 25 of 9,900

        def filter_rows():
            page.get_by_label("Filter rows:").press_sequentially("layer_7777/")
            page.get_by_text("Showing 1 to 1 of 1").wait_for()

        timed("filter, 11 keys", filter_rows)
        assert column(page, 1) == ["encoder/layer_7777/dense/kernel"]
        print(f"\n10,000 rows, {path.stat().st_size:,} bytes, seconds:",
              {name: round(seconds, 2) for name, seconds in steps.items()})  # fmt: skip
        chromium.close(page)

    def test_table_of_a_notebook_sorts(self, browser, tmp_path):
        path = tmp_path / "notebook.html"
        path.write_text(many(500)._repr_html_(), encoding="utf-8")
        page = chromium.open_file(browser, path, width=400)
        button = page.locator("th button", has_text="ratio")
        for order in ("ascending", "descending"):
            button.focus()
            page.keyboard.press("Enter")
            assert page.locator(f"th[aria-sort={order}]").inner_text() == "ratio"
            cells = page.locator("tbody td:nth-child(4)").all_inner_texts()
            ratios = [float(text) for text in cells]
            assert ratios == sorted(ratios, reverse=order == "descending")
            assert page.locator("tbody tr").last.inner_text().startswith("…")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        chromium.close(page)


def test_audit_of_a_model_can_be_a_page(tmp_path):
    assert page_of(audit(net()), tmp_path / "page.html").exists()


def test_names_in_any_script_need_no_font(tmp_path):
    names = ["名前", "имя", "🙂"]  # a warning of a missing font would be an error here
    hidden = [keras.layers.Dense(30, "tanh", name=name) for name in names]
    model = keras.Sequential([keras.Input((9,)), *hidden])
    text = report(model, X, tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text.count(f">{name}</text>") for name in names)
