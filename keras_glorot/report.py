"""`report`: a page that holds what there is to see of a model, and needs nothing else.

The rows, findings and pictures are those of the tables. The package itables brings the
table that sorts and filters; its code is copied into the page.
"""

import html
import io
import platform
import re
import string
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_glorot.auditing import audit
from keras_glorot.files import drafted
from keras_glorot.plots import OFF_COLOR, drawable_rows, plot_histograms
from keras_glorot.propagation import propagate
from keras_glorot.tables import Table, cell, findings_html, is_number, printable

__all__ = ["Picture", "Section", "audit_section", "report", "write_page"]


class Picture(NamedTuple):
    """What to draw: `draw` returns Axes of the figure."""

    label: str
    draw: Callable[[], Any]


class Section(NamedTuple):
    """A table with its pictures."""

    title: str
    table: Table
    pictures: Sequence[Picture]


def report(
    model: keras.Layer,
    x: Any = None,
    path: str | PathLike = "report.html",
    *,
    y: Any = None,
    loss: Any = None,
    seed: int = 0,
) -> Path:
    """Writes a page about a model: findings, pictures, and a table to sort and to filter.

    The page shows what `audit` finds and, with a batch, what `propagate` and
    `plot_histograms` show. It is one HTML file that needs no network.

    Args:
        model: A built Keras model or layer.
        x: A batch to call it on, as in `propagate`. Without one, the page shows the weights
            alone.
        path: The file to write.
        y: As in `propagate`.
        loss: As in `propagate`.
        seed: As in `propagate`.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib, itables or pandas is not installed.
        ValueError: If `path` can't be written as a file; else as `audit` and `propagate`.
        TypeError: As `audit` and `propagate`.

    Example:

    >>> import tempfile
    >>> report(model, x, tempfile.mkdtemp() + "/report.html").name
    'report.html'
    """
    _check_path(path)
    _import_table_library()
    sections = [audit_section(audit(model))]
    command = "keras_glorot.report(model)"
    if x is not None:
        sections.append(_signal_section(model, x, y, loss, seed))
        more = "" if loss is None else ", y=y, loss=loss"
        command = f"keras_glorot.report(model, x{more}, seed={seed})"
    return write_page(path, model.name, sections, command, None if x is None else seed)


def audit_section(table: Table) -> Section:
    """What `audit` found, with a picture if there is a kernel to draw."""
    label = "The std of each kernel over the expected one"
    return Section("Weights", table, _picture_of(table, label))


def _picture_of(table: Table, label: str) -> list[Picture]:
    return [Picture(label, table.plot)] if drawable_rows(table) else []


def _signal_section(model: keras.Layer, x: Any, y: Any, loss: Any, seed: int) -> Section:
    table = propagate(model, x, y, loss, seed)
    pictures = _picture_of(table, "The std of signal and gradient by depth")
    kernels = [row for row in table.rows[:-1] if row["kernel_gradient_std"] is not None]
    if len(kernels) > 1:
        label = "The distributions of activations and of gradients, layer by layer"
        draw = plot_histograms
        pictures.append(Picture(label, lambda: draw(model, x, y, loss, seed)[0]))
    return Section("Signal and gradient", table, pictures)


def write_page(
    path: str | PathLike,
    name: str,
    sections: Sequence[Section],
    command: str,
    seed: int | None = None,
) -> Path:
    """Writes the page of a model called `name`."""
    path = _check_path(path)
    library = _import_table_library()
    facts = {"seed of the gradient": seed, **_versions()}
    rows = [
        f'<tr><th scope="row">{key}</th><td>{html.escape(str(value))}</td></tr>'
        for key, value in facts.items()
        if value is not None
    ]
    page = string.Template(_PAGE).substitute(
        name=html.escape(printable(name)),
        library=library.javascript.generate_init_offline_itables_html(
            library.options.dt_bundle
        ),
        verdicts="".join(_verdict_html(section) for section in sections),
        sections="".join(
            _section_html(section, f"section-{number}")
            for number, section in enumerate(sections, 1)
        ),
        command=html.escape(printable(command)),
        facts="".join(rows),
        off=OFF_COLOR,
    )
    with drafted(path, "Argument `path`") as put:
        put(lambda draft: draft.write_text(page, encoding="utf-8"))
    return path


def _check_path(path: str | PathLike) -> Path:
    checked = Path(path).resolve()
    if not checked.parent.is_dir() or (checked.exists() and not checked.is_file()):
        raise ValueError(
            f"Argument `path` must be a file in an existing folder. Received: path={path}"
        )
    return checked


def _import_table_library() -> Any:
    try:
        import itables
        import itables.javascript
        import matplotlib  # noqa: F401
        import pandas  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Reports need {error.name}: `pip install keras-glorot[report]`."
        ) from None
    return itables


def _versions() -> dict[str, str | None]:
    backend = keras.backend.backend()
    return {
        "keras-glorot": version("keras-glorot"),
        "Keras": keras.__version__,
        "backend": f"{backend} {_version_of(backend)}",
        "NumPy": version("numpy"),
        "Python": platform.python_version(),
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # such as tensorflow-cpu
        return ""


def _verdict_html(section: Section) -> str:
    view = section.table.view()
    worst = view.groups[0].severity if view.groups else "sound"
    return f'<p class="verdict {worst}">{html.escape(printable(view.verdict))}</p>'


def _section_html(section: Section, identifier: str) -> str:
    view = section.table.view(all=True)
    figures = "".join(
        f'<figure><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{picture.label}">{_svg(picture, f"{identifier}-{number}")}</div>'
        f"<figcaption>{picture.label}</figcaption></figure>"
        for number, picture in enumerate(section.pictures, 1)
    )
    return (
        f'<section aria-labelledby="{identifier}">'
        f'<h2 id="{identifier}">{section.title}</h2>'
        f'<div class="keras-glorot">{findings_html(view.groups)}</div>{figures}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{section.title}: all '
        f'rows">{_table_html(section.table, f"{identifier}-table")}</div></section>'
    )


def _table_html(table: Table, identifier: str) -> str:
    """All rows, those with a finding first: to be sorted, and filtered by any word."""
    import itables
    import pandas

    if not table.rows:
        return ""
    view = table.view(all=True)
    codes: dict[str, str] = {}
    for finding in table.findings:
        before = codes.get(finding.path)
        codes[finding.path] = f"{before}, {finding.code}" if before else finding.code
    path, *others = view.columns
    rows = sorted(view.shown, key=lambda row: row[path] not in codes)
    # Text: a data frame would not tell None from nan.
    content = {path: [printable(row[path]) for row in rows]}
    if codes:
        content["finding"] = [codes.get(row[path], "") for row in rows]
    for key in others:
        content[key.replace("_", " ")] = [cell(row[key]) for row in rows]
    numbers = [
        position
        for position, name in enumerate(content)
        if is_number(name.replace(" ", "_"), view.shown)
    ]
    return itables.to_html_datatable(
        pandas.DataFrame(content),
        connected=False,
        table_id=identifier,
        classes="compact",
        style="width:100%",
        showIndex=False,
        maxBytes=0,
        deferRender=True,
        autoWidth=False,
        order=[],
        text_in_header_can_be_selected=False,  # a click there sorts
        columnDefs=[{"targets": numbers, "type": "num", "className": "dt-right"}],
        layout={"topStart": "search", "topEnd": "pageLength"},
        language={"search": "Filter rows:"},
        lengthMenu=[25, 100, 1000],
    )


# What stands for the color of text while a picture is drawn.
_INK = "#010203"


def _svg(picture: Picture, identifier: str) -> str:
    """The picture as SVG in the colors of the page."""
    from matplotlib import pyplot, style

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    options = dict.fromkeys(keys, _INK) | {
        "axes.facecolor": "none",
        "legend.framealpha": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": identifier,  # makes the identifiers inside unique in the page
    }
    with style.context(["default", options]), pyplot.ioff():
        figure = picture.draw().figure
        figure.patch.set_visible(False)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The browser draws the letters, with fonts of its own.
            warnings.filterwarnings("ignore", r"Glyph .* missing from font")
            figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=144)
        pyplot.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace(_INK, "currentColor").replace(OFF_COLOR, "var(--off)")
    return text.replace("<svg", f'<svg role="img" aria-label="{picture.label}"', 1)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:">
<title>Initialization of $name</title>
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark", dark.matches);
dark.addEventListener("change", follow);
follow();
</script>
$library
<style>
:root { color-scheme: light dark; --off: $off; --line: #8886;
  --error: #d13438; --warning: #e8a33d; --info: #2a6fbb; --sound: #2e9e5b;
  font: 1rem/1.5 system-ui, sans-serif; background: #fff; color: #1b1b1b; }
:root.dark { --off: #ff8a80; background: #161616; color: #eee; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.25rem; }
code, pre { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; border: 1px solid var(--line); padding: 0.5rem; }
.verdict { font-weight: bold; border-left: 0.4rem solid var(--sound);
  padding: 0.25rem 0.75rem; overflow-wrap: anywhere; }
.verdict.error { border-color: var(--error); }
.verdict.warning { border-color: var(--warning); }
.verdict.info { border-color: var(--info); }
ul { list-style: none; padding: 0; overflow-wrap: anywhere; }
li { margin: 0.5rem 0; padding-left: 0.75rem; border-left: 0.25rem solid var(--line); }
figure { margin: 1rem 0; } figcaption { font-size: 0.875rem; }
.scroll { overflow-x: auto; } .scroll > svg { display: block; min-width: 36rem;
  max-width: 100%; height: auto; }
.scroll td { font-size: 0.875rem; }
.scroll td:first-child { overflow-wrap: anywhere; min-width: 12rem; }
@media (min-width: 60rem) { .scroll td:first-child { min-width: 20rem; } }
.scroll input, .scroll select { font: inherit; max-width: 12rem; }
table.facts { border-collapse: collapse; }
.facts th, .facts td { text-align: left; font-weight: normal; padding: 0.1rem 1rem 0.1rem 0;
  border-bottom: 1px solid var(--line); }
:focus-visible { outline: 2px solid; outline-offset: 1px; }
</style>
</head>
<body>
<main>
<h1>Initialization of $name</h1>
$verdicts
$sections
<section aria-labelledby="reproduce">
<h2 id="reproduce">Reproduce</h2>
<pre tabindex="0"><code>$command</code></pre>
<table class="facts">$facts</table>
</section>
</main>
</body>
</html>
"""
