"""Brings notebooks and pictures into the site, which is to need no network."""

import json
import re
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BROUGHT = (ROOT, "notebooks/*.ipynb"), (ROOT / "benchmarks", "evidence/*.png")
# Where a dollar sign is a dollar sign.
CODE = re.compile(r"<(pre|code|script|style|svg)\b.*?</\1>", re.DOTALL)
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL)
# The theme needs this script to search a site that was opened from disk.
SHIM = "https://unpkg.com/iframe-worker/shim"
# From one notebook to another. The plugin leaves it as it is, to the file.
NOTEBOOK_LINK = re.compile(r'(<a href="\w+)\.ipynb(?=["#])')
# The texts that Jupyter puts beside a cell and on its copy button.
BESIDE_CELL = re.compile(r'<(?=(?:div class="jp-\w+Prompt|span class="notice"))(\w+)')
DOWNLOAD = '<p><a href="{}.ipynb" download>Download this notebook, with its checks</a></p>'
# The text of a picture that has none.
NO_TEXT = "No description has been provided for this image"
PICTURE = re.compile(r'\b(src|srcset)="docs/')
MATHJAX = re.compile(r"<script[^>]*mathjax.*?</script>", re.DOTALL | re.IGNORECASE)


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config) -> Files:
    for root, pattern in BROUGHT:
        for path in sorted(root.glob(pattern)):
            name, urls = path.relative_to(root).as_posix(), config.use_directory_urls
            files.append(File(name, str(root), config.site_dir, urls))
    return files


def on_page_content(html: str, page, config, files) -> str:
    """A search finds what a notebook says, not its cells' numbers and copy buttons.

    The first page has the README's picture, which is found from the repository's root.
    """
    html = PICTURE.sub(r'\1="', html)
    return BESIDE_CELL.sub(r"<\1 data-search-exclude", html)


def on_post_template(output: str, template_name: str, config) -> str:
    """404.html is sent for any path: it has to ask for its files from the root."""
    root = urlsplit(config.site_url or "/").path.rstrip("/")
    return output.replace(SHIM, f"{root}/assets/iframe-worker/shim.js")


@event_priority(-100)  # after it
def on_post_page(output: str, page, config) -> str:
    root = "../" * page.url.count("/")
    output = output.replace(SHIM, f"{root}assets/iframe-worker/shim.js")
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    output = _describe_pictures(output, ROOT / page.file.src_uri)
    output = NOTEBOOK_LINK.sub(r"\1.html", output)
    output = output.replace("</h1>", f"</h1>{DOWNLOAD.format(Path(page.url).stem)}", 1)
    return _outside_code(_to_mathml, MATHJAX.sub("", output))


def _describe_pictures(output: str, notebook: Path) -> str:
    """Gives each picture the text in its cell's metadata, under `alt`."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for result in cell.get("outputs", []):
            if "image/png" in result.get("data", {}):
                text = escape(cell["metadata"]["alt"])
                output = output.replace(NO_TEXT, text, 1)
    return output


def _outside_code(change, text: str) -> str:
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [change(text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def _to_mathml(text: str) -> str:
    def formula(match: re.Match) -> str:
        kind = "block" if match["block"] else "inline"
        latex = match[kind].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        return convert(latex, display=kind)

    return FORMULA.sub(formula, text)
