"""Pictures of tables. matplotlib is imported when one is drawn.

Colors are told apart in grey too, and by their marks; text and axes have the colors of the
user's style. Names of layers are drawn as they are: no `$` in them is a formula.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_glorot.tables.view import Picture, Row, fold, printable

__all__ = [
    "NAMES_DOWN",
    "OFF_COLOR",
    "RATIOS",
    "STDS",
    "fold_names",
    "new_axes",
]

# Readable on light and on dark, and in grey.
_SIGNAL, _GRADIENT, _SOUND = "#2a6fbb", "#f09a30", "#8a8a8a"
OFF_COLOR = "#d13438"  # of what has a finding
# More lines than that can't be read beside each other, or below each other.
_NAMES_ACROSS, NAMES_DOWN = 24, 48


def _ratio_rows(table: Any) -> list[Row]:
    off = _off(table)
    return [
        row
        for row in table.rows
        if (row["fan_in"] is not None and row["ratio"] is not None) or row["path"] in off
    ]


def _std_rows(table: Any) -> list[Row]:
    rows = table.rows[:-1] if table.layout.has_total else table.rows
    return [row for row in rows if row["std"] or row["gradient_std"]]


def _off(table: Any) -> dict[str, str]:
    """By path of each row with a warning or an error, the code of the first one."""
    found = [each for each in table.findings if each.severity != "info"]
    return {finding.path: finding.code for finding in reversed(found)}


def _draw_ratios(
    table: Any, rows: list[Row], ax: Any = None, scaled: Iterable[Row] = ()
) -> Any:
    """A dot per kernel, in the order of the model from the top down.

    Where there is no room for all names, those with a finding have one. Kernels without
    spread stand at the left edge, those that are not finite at the right one.
    """
    off = _off(table)
    count = len(rows)
    room = min(max(count, 10), NAMES_DOWN)  # for lines of names
    ax = ax or new_axes(7, 1.2 + 0.14 * room)[0]
    ratios = np.array([row["ratio"] or 0.0 for row in rows], float)
    usual = _positive([*rows, *scaled], "ratio")
    # At least a factor of two to each side, so that chance looks as small as it is.
    left, right = min(0.5, *usual, 1) / 1.3, max(2.0, *usual, 1) * 1.3
    places = np.where(np.isnan(ratios), right, np.clip(ratios, left, right))
    is_off = np.array([row["path"] in off for row in rows])
    depth = np.arange(1, count + 1)

    ax.axvline(1, color=_SOUND, linewidth=1)
    size = 16 if count <= 100 else 5
    ax.scatter(places[~is_off], depth[~is_off], size, color=_SOUND,
               rasterized=count > 1000)  # fmt: skip
    ax.hlines(
        depth[is_off], left, places[is_off], color=OFF_COLOR, alpha=0.3, linewidth=0.8
    )
    ax.scatter(places[is_off], depth[is_off], size * 1.5, color=OFF_COLOR,
               marker="D", clip_on=False, zorder=3)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(left, right)
    ax.set_ylim(count + 0.8, 0.2)
    _plain_ticks(ax.xaxis, right / left)
    ax.set_xlabel("std over expected std")
    ax.set_ylabel("kernels, input to output")
    _name_kernels(ax, rows, off, np.abs(np.log(places)), room)
    title = f"{is_off.sum()} of {count} have an error or a warning"
    ax.set_title(title, loc="left", fontsize=10)
    return ax


def _name_kernels(
    ax: Any, rows: list[Row], off: dict[str, str], weights: np.ndarray, room: int
) -> None:
    """Beside the dots; where there is no room, only the heaviest that are off."""
    count = len(rows)
    names, lines = fold_names((row["path"] for row in rows), 48)
    named = list(range(count))
    if count * lines > room:
        allowed = [i for i in named if rows[i]["path"] in off]
        named = _spread(weights, allowed, lines * count / room)
    codes = [off.get(rows[i]["path"]) for i in named]
    labels = [
        names[i] if code in (None, "std") else f"{names[i]} ({code})"
        for i, code in zip(named, codes, strict=True)
    ]
    ax.set_yticks([i + 1 for i in named], labels, fontsize=7, parse_math=False)
    for code, label in zip(codes, ax.get_yticklabels(), strict=True):
        if code:
            label.set_color(OFF_COLOR)
    ax.tick_params("y", length=0)


def _positive(rows: Iterable[Row], *keys: str) -> list[float]:
    """The values that a logarithmic axis can show."""
    values = (row[key] for row in rows for key in keys)
    return [value for value in values if value and 0 < value < math.inf]


def _spread(weights: np.ndarray, allowed: list[int], apart: float) -> list[int]:
    """The heaviest positions, none so near another that their names overlap."""
    named: list[int] = []
    for i in sorted(allowed, key=lambda i: -weights[i]):
        if all(abs(i - other) >= apart for other in named):
            named.append(i)
    return sorted(named)


def _draw_stds(
    table: Any, rows: list[Row], ax: Any = None, scaled: Iterable[Row] = ()
) -> Any:
    """Signal and gradient by depth.

    No lines join the points: calls side by side may belong to two branches.
    """
    count = len(rows)
    ax = ax or new_axes(4 + 0.14 * min(max(count, 6), 40), 3.8)[0]
    depth = np.arange(1, count + 1)
    size = 5 if count <= 40 else 3
    series = (
        ("std", "signal, forward", "o", _SIGNAL),
        ("gradient_std", "gradient, backward", "s", _GRADIENT),
    )
    for key, label, marker, color in series:
        stds = np.array([row[key] or math.nan for row in rows], float)
        fill = color if marker == "o" else "none"
        ax.plot(
            depth, stds, marker, color=color, markerfacecolor=fill, markersize=size,
            markeredgewidth=0.8, label=label, rasterized=count > 1000)  # fmt: skip
    ax.update_datalim([(1, std) for std in _positive(scaled, "std", "gradient_std")])
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 10 * low:  # level numbers should look level
        middle = math.sqrt(low * high)
        low, high = middle / 10**0.5, middle * 10**0.5
        ax.set_ylim(low, high)
    _plain_ticks(ax.yaxis, high / low)
    ax.set_ylabel("standard deviation")
    ax.grid(axis="y", alpha=0.3)
    names, lines = fold_names((row["path"] for row in rows), 36)
    if count * lines <= _NAMES_ACROSS:
        ax.set_xticks(depth, names, rotation=45, ha="right", rotation_mode="anchor",
                      fontsize=8, parse_math=False)  # fmt: skip
    else:
        ax.set_xlabel("layers, input to output")
    ax.set_title(table.summary or table.kind, loc="left", fontsize=10)
    ax.legend(fontsize=8)
    return ax


RATIOS = Picture("The std of each kernel over the expected one", _ratio_rows, _draw_ratios)
STDS = Picture("The std of signal and gradient by depth", _std_rows, _draw_stds)


def fold_names(paths: Iterable[str], letters: int) -> tuple[list[str], int]:
    """Whole names, and how many lines one may take."""
    names = ["\n".join(fold(printable(path), letters)) for path in paths]
    return names, 1 + max(name.count("\n") for name in names)


def _plain_ticks(axis: Any, span: float) -> None:
    """0.1, 0.2, 0.5, 1 and not powers of ten, where there is room."""
    from matplotlib.ticker import LogLocator

    steps = (1, 2, 5) if span < 1e3 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def new_axes(width: float, height: float, columns: int = 1) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError(
            "Plots need matplotlib: `pip install keras-glorot[plot]`."
        ) from None
    size = (width, height)
    _, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    return axes[0]
