"""`report`: one HTML page about a model that needs nothing else.

The rows, findings and pictures are those of the tables.
"""

import html
import importlib
import importlib.util
import io
import os
import platform
import re
import string
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_glorot._models.passes import Batch
from keras_glorot._models.survey import Survey
from keras_glorot.tables import Table, printable
from keras_glorot.tables.html import STYLE, findings_html, rows_html
from keras_glorot.tables.plots import OFF_COLOR
from keras_glorot.tables.view import View
from keras_glorot.tools._files import write_whole
from keras_glorot.tools.audit import audited
from keras_glorot.tools.histograms import plotted_histograms
from keras_glorot.tools.propagate import propagated

__all__ = ["Section", "audit_section", "report", "write_page"]

Pictures = dict[str, Callable[[], Any]]


class Section(NamedTuple):
    """A table, or those of before and after, and by their labels functions for pictures.

    Each function draws one and returns its `Axes`.
    """

    title: str
    tables: dict[str, Table]
    pictures: Pictures


def report(
    model: keras.Layer,
    x: Any = None,
    y: Any = None,
    loss: Any = None,
    *,
    path: str | os.PathLike = "report.html",
    seed: int = 0,
    before: keras.Layer | None = None,
) -> Path:
    """Writes a page about a model: findings, pictures, and a table to sort and to filter.

    The page shows the findings of `audit` and, with a batch, those of `propagate` and the
    plots of `plot_histograms`. It is one HTML file that needs no network.

    Args:
        model: A built Keras model or layer.
        x: A batch to call it on, as in `propagate`. Without one, the page shows the weights
            alone.
        y: As in `propagate`.
        loss: As in `propagate`.
        path: The file to write.
        seed: As in `propagate`.
        before: Another model, such as a copy of this one from before `initialize`, whose
            verdicts and pictures stand beside those of `model`.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `path` can't be written as a file; else as `audit` and `propagate`.
        TypeError: As `audit` and `propagate`.

    Example:

    >>> import tempfile
    >>> report(model, x, path=tempfile.mkdtemp() + "/report.html").name
    'report.html'
    """
    _check(path)
    batch = None if x is None else Batch.check(x, y, loss, seed)
    surveys, arguments = {"": Survey(model)}, ["model"]
    if batch is not None:
        arguments += ["x", *([] if loss is None else ["y", "loss"]), f"seed={seed}"]
    if before is not None:
        surveys = {"Before: ": Survey(before, "before"), "After: ": surveys[""]}
        arguments.append("before=before")
    sections = [audit_section({when: audited(each) for when, each in surveys.items()})]
    if batch is not None:
        sections.append(_signal_section(surveys, batch))
    command = f"keras_glorot.report({', '.join(arguments)})"
    return write_page(path, model.name, sections, command)


def audit_section(tables: dict[str, Table]) -> Section:
    """The findings of `audit`, with pictures of the kernels."""
    return Section("Weights", tables, _pictures(tables))


def _pictures(tables: dict[str, Table]) -> Pictures:
    """Those of the tables that have something to draw, on one scale."""
    drawn = {when: table.layout.picture.select(table) for when, table in tables.items()}
    scaled = [row for rows in drawn.values() for row in rows]
    return {
        when + table.layout.picture.label: partial(table.plot, scaled=scaled)
        for when, table in tables.items()
        if drawn[when]
    }


def _signal_section(surveys: dict[str, Survey], batch: Batch) -> Section:
    tables = {when: propagated(survey, batch) for when, survey in surveys.items()}
    pictures = _pictures(tables)
    for when, survey in surveys.items():
        rows = tables[when].rows[:-1]
        if sum(row["kernel_gradient_std"] is not None for row in rows) > 1:
            label = "The distributions of activations and of gradients, layer by layer"
            pictures[when + label] = partial(_draw_histograms, survey, batch)
    return Section("Signal and gradient", tables, pictures)


def _draw_histograms(survey: Survey, batch: Batch) -> Any:
    return plotted_histograms(survey, batch)[0]


def write_page(
    path: str | os.PathLike, name: str, sections: Sequence[Section], command: str
) -> Path:
    """Writes the page of a model called `name`."""
    path = _check(path)
    facts = "".join(
        f'<tr><th scope="row">{key}</th><td>{html.escape(text)}</td></tr>'
        for key, text in _versions().items()
    )
    page = string.Template(_PAGE).substitute(
        name=html.escape(printable(name)),
        style=STYLE,
        verdicts="".join(map(_verdicts_html, sections)),
        sections="".join(map(_section_html, sections)),
        command=html.escape(printable(command)),
        facts=facts,
        off=OFF_COLOR,
    )
    write_whole(path, "Argument `path`", lambda draft: draft.write_text(page, "utf-8"))
    return path


def _check(path: str | os.PathLike) -> Path:
    """The whole path of a file that can be written, with pictures."""
    checked = Path(path).resolve()
    is_taken = os.path.exists(checked) and not os.path.isfile(checked)
    if is_taken or not os.path.isdir(checked.parent):
        raise ValueError(
            f"Argument `path` must be a file in an existing folder. Received: path={path}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Reports need matplotlib: `pip install keras-glorot[report]`.")
    return checked


def _versions() -> dict[str, str]:
    backend = keras.backend.backend()
    return {
        "keras-glorot": version("keras-glorot"),
        "Keras": keras.__version__,
        "backend": f"{backend} {importlib.import_module(backend).__version__}",
        "NumPy": version("numpy"),
        "Python": platform.python_version(),
    }


def _verdicts_html(section: Section) -> str:
    texts = []
    for when, table in section.tables.items():
        view = View(table)
        worst = view.groups[0].first.severity if view.groups else "sound"
        text = html.escape(printable(when + view.verdict))
        texts.append(f'<p class="verdict {worst}">{text}</p>')
    return "".join(texts)


def _section_html(section: Section) -> str:
    *before, table = section.tables.values()
    view = View(table, all=True)
    figures = "".join(
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"{_svg(draw, label)}</div><figcaption>{label}</figcaption></figure>"
        for label, draw in section.pictures.items()
    )
    return (
        f"<section><h2>{section.title}</h2>{findings_html(view.groups)}"
        f'<div class="{"pair" if before else "pictures"}">{figures}</div>'
        f"{rows_html(view)}</section>"
    )


_INK = "#010203"  # stands for the color of text while a picture is drawn
# White is under a histogram.
_COLORS = {_INK: "currentColor", OFF_COLOR: "var(--off)", "#ffffff": "var(--paper)"}


def _svg(draw: Callable[[], Any], label: str) -> str:
    """The picture as SVG in the colors of the page."""
    from matplotlib import pyplot, style

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    options = dict.fromkeys(keys, _INK) | {
        "axes.facecolor": "none",
        "legend.framealpha": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": label,  # makes the identifiers inside unique in the page
    }
    with style.context(["default", options]), pyplot.ioff():
        figure = draw().figure
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
    for color, name in _COLORS.items():
        text = text.replace(color, name)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Initialization of $name</title>
<style>
$style
:root { color-scheme: light dark; --off: $off; --paper: #fff; background: #fff;
  color: #1b1b1b; font: 1rem/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --off: #ff8a80; --paper: #000; background: #161616; color: #eee; }
  svg image { filter: invert(1) hue-rotate(180deg); } }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.25rem; }
code, pre { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; border: 1px solid #8886; padding: 0.5rem; }
.verdict { font-weight: bold; border-left: 0.4rem solid #2e9e5b;
  padding: 0.25rem 0.75rem; overflow-wrap: anywhere; }
li { margin: 0.5rem 0; }
@media (min-width: 75rem) { .pair { display: grid; grid-template-columns: 1fr 1fr; } }
figure { margin: 1rem 0; min-width: 0; } figcaption { font-size: 0.875rem; }
.keras-glorot figure .scroll { max-height: none; }
.scroll > svg { display: block; min-width: 36rem; max-width: 100%; height: auto; }
th[scope=row] { font-weight: normal; }
:focus-visible { outline: 2px solid; outline-offset: 1px; }
</style>
</head>
<body>
<main class="keras-glorot">
<h1>Initialization of $name</h1>
$verdicts
$sections
<section>
<h2>Reproduce</h2>
<pre tabindex="0"><code>$command</code></pre>
<table>$facts</table>
</section>
</main>
</body>
</html>
"""
