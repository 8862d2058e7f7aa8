"""The documentation: its code runs, and the built site works for everyone, from disk."""

import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import close, launched, needs_chromium, open_file, violations
from printed import (
    assert_comments_are_printed,
    assert_output_is_printed,
    blocks_with_output,
    python_blocks,
)

from keras_glorot.tools.audit import CODES
from keras_glorot_cli import _parser, _with_values_joined

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
TEXTS = {
    path.relative_to(ROOT / "docs").with_suffix("").as_posix(): path.read_text("utf-8")
    for path in PAGES
}
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, block in enumerate(python_blocks(text))
]
TABLES = [
    pytest.param(*both, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, both in enumerate(blocks_with_output(text))
]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_block(block, capsys):
    """Each runs alone, and prints what its comments say."""
    assert_comments_are_printed(block, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "output"), TABLES)
def test_output(block, output, capsys, monkeypatch):
    assert_output_is_printed(block, output, capsys, monkeypatch)


README = (ROOT / "README.md").read_text(encoding="utf-8")


def phrases(text, words=8):
    """Each run of so many words outside of code and links."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " . ", text, flags=re.DOTALL)
    for sentence in re.split(r"[.:|]\s|\n\n", text):
        found = re.findall(r"\w+", sentence.lower())
        yield from (tuple(found[i : i + words]) for i in range(len(found) - words + 1))


def test_no_sentence_stands_on_two_pages():
    """A fact that stands twice is soon true once. The other page has a link."""
    pages: dict[tuple[str, ...], set[str]] = {}
    for name, text in {"README": README, **TEXTS}.items():
        for phrase in phrases(text):
            pages.setdefault(phrase, set()).add(name)
    assert not {" ".join(each): on for each, on in pages.items() if len(on) > 1}


def test_every_code_is_listed():
    listed = set(re.findall(r"`([a-z-]+)`", TEXTS["findings"]))
    assert listed.issuperset(CODES)


ALL_TEXT = "\n".join(TEXTS.values())
COMMANDS = re.findall(
    r"^ *(?:- run: )?keras-glorot (\w+ [^\[\n]*)$", ALL_TEXT, re.MULTILINE
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch, tmp_path):
    for name in ("model.keras", "batch.npy"):  # they have to be there
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    options = _parser().parse_args(_with_values_joined(shlex.split(command)))
    assert command.startswith(options.command)


def test_there_are_commands():
    assert len(COMMANDS) > 8


def test_every_option_is_listed():
    (commands,) = _parser()._subparsers._group_actions
    for name, command in commands.choices.items():
        usage = re.search(rf"keras-glorot {name} MODEL.*?(?=keras-glorot |```)",
                          TEXTS["guides/command-line"], re.DOTALL)  # fmt: skip
        assert usage is not None, name
        for action in command._actions:
            names = [each for each in action.option_strings if each not in ("-h", "--help")]
            assert not names or any(each in usage[0] for each in names), (name, names)


SITE = ROOT / "site"
built = [
    pytest.mark.slow,
    needs_chromium,
    pytest.mark.skipif(not SITE.exists(), reason="`make docs` has not built the site"),
]


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


def site_pages():
    """All but the one that only a server shows."""
    pages = [path for path in SITE.rglob("*.html") if path.name != "404.html"]
    return sorted(str(path.relative_to(SITE)) for path in pages)


@pytest.mark.parametrize("name", site_pages() or ["index.html"])
class TestSite:
    pytestmark = built

    @pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1200, "dark")])
    def test_accessible(self, browser, name, width, scheme):
        """Nothing serious by axe-core, nothing from elsewhere, nothing too wide."""
        page = open_file(browser, SITE / name, width=width, scheme=scheme)
        found = [
            each for each in violations(page) if each["impact"] in ("serious", "critical")
        ]
        assert not [(each["id"], each["nodes"][0]["html"]) for each in found]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        close(page)


def links(path):
    """File and anchor of each link to a place in the site. Settings are no anchors."""
    for link in re.findall(r'href="([^":]*#[^"]+)"', path.read_text(encoding="utf-8")):
        target, anchor = unescape(link).split("#", 1)
        if "=" not in anchor:
            yield (path.parent / target).resolve() if target else path, unquote(anchor)


@pytest.mark.slow
@pytest.mark.skipif(not SITE.exists(), reason="`make docs` has not built the site")
def test_anchors():
    """mkdocs does not look for those in notebooks."""
    pages = {
        path: path.read_text(encoding="utf-8") for path in SITE.resolve().rglob("*.html")
    }
    broken = [
        (path.name, target.name, anchor)
        for path in pages
        for target, anchor in links(path)
        if f'id="{anchor}"' not in unescape(pages.get(target, ""))
    ]
    assert not broken


@pytest.mark.slow
@pytest.mark.skipif(not SITE.exists(), reason="`make docs` has not built the site")
def test_the_page_for_wrong_addresses_asks_for_nothing_from_outside():
    """Its links begin at the server's root, so no browser can open it from disk."""
    text = (SITE / "404.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="([^"]*)', text)
    assert len(loaded) > 3
    assert not [each for each in loaded if "//" in each]
    assert "unpkg" not in text


@pytest.mark.slow
@pytest.mark.skipif(not SITE.exists(), reason="`make docs` has not built the site")
def test_nothing_but_pages_is_published():
    assert not [str(path) for path in SITE.rglob("*") if "pycache" in path.name]


def test_charts_are_those_of_the_tables():
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "evidence" / "charts.py"),
        "--check",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not SITE.exists(), reason="`make docs` has not built the site")
def test_notebooks_link_to_pages():
    """To files they would download; one link, to the page's own, is there for that."""
    for path in (SITE / "notebooks").glob("*.html"):
        files = re.findall(r'href="([^"]*\.ipynb)[#"]', path.read_text(encoding="utf-8"))
        assert files == [f"{path.stem}.ipynb"]


@pytest.mark.slow
@pytest.mark.skipif(not SITE.exists(), reason="`make docs` has not built the site")
def test_search_leaves_out_what_stands_beside_cells():
    index = (SITE / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "Why initialization matters" in index
    assert not re.findall(r"Copied!|(?:In|Out)\\u00a0\[", index)


class TestFromDisk:
    pytestmark = built

    def test_search(self, browser):
        page = open_file(browser, SITE / "index.html")
        page.click("input[name=query]")
        page.keyboard.type("calculate_gain", delay=50)
        page.wait_for_selector("a[href*=calculate_gain].md-search-result__link")
        close(page)

    def test_formulas(self, browser):
        page = open_file(browser, SITE / "notebooks" / "02_deriving_glorot.html")
        assert page.locator("math").count() > 20
        text = page.locator("article").inner_text()
        assert "$" not in text
        close(page)

    def test_settings_of_the_course(self, browser):
        """The page to play with understands each link to it."""
        course = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
        addresses = re.findall(r"explorable/index\.html(#[^)]*)", course)
        assert len(addresses) > 5
        for address in addresses:
            page = open_file(browser, SITE / "explorable" / "index.html", address)
            page.wait_for_selector("#verdict:not(:empty)")
            assert page.locator("#note").is_hidden(), address
            close(page)
