"""The charts at the top of the documentation's pages on evidence, from the tables there.

    python benchmarks/evidence/charts.py            # writes docs/evidence/charts/
    python benchmarks/evidence/charts.py --check    # ends with 1 if one of them is old

A chart is a table of bars in HTML: it has the page's colours, and screen readers read it.
"""

import argparse
import re
import sys
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHARTS = ROOT / "docs" / "evidence" / "charts"
RESULTS = Path("benchmarks/evidence")


def rows(page, first_head):
    """The rows of the page's table whose first column has this head, by its heads."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_head} |"))
    heads = cells(lines[start])
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield dict(zip(heads, cells(line), strict=True))


def cells(line):
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().strip("*` ") for cell in inner.split("|")]


def number(cell):
    """The first number of a cell such as `**51.64 ± 2.45**`."""
    found = re.search(r"[-+.\de]+", cell)
    assert found is not None, cell
    return float(found[0])


def stock():
    """The std that Keras 3.15 draws, over the right one: 1 is right."""
    for row in rows("docs/evidence/stock.md", "layer"):
        yield row["layer"].replace("`", ""), number(row["Keras 3.15"]), row["Keras 3.15"]


def training():
    """Test accuracy in % on images, without normalization but in the last bar of a net."""
    starts = {"stock": "stock Keras", "gain auto": "gain auto", "isometric": "isometric"}
    lines = list(rows(RESULTS / "training.md", "net |  | stock"))
    for alone, after in zip(lines[::2], lines[1::2], strict=True):
        cells = {name: alone[head] for head, name in starts.items()}
        left = after["isometric"] == "="
        cells["then calibrate"] = alone["isometric"] if left else after["isometric"]
        cells["stock Keras, normalized"] = alone["normalized"]
        for name, cell in cells.items():
            if cell != "—":
                yield f"{alone['net']}, {name}", number(cell), cell.replace("*", "")


def paper_table1():
    """Test error in %, of what learned within the updates; less is better."""
    for row in rows(RESULTS / "paper_table1.md", "dataset | activation | initialization"):
        if row["activation"] != "sigmoid":
            label = f"{row['dataset']}, {row['activation']}, {row['initialization']}"
            yield label, number(row["error"]), row["error"]


def drawing():
    """How many times longer Keras's own initializer takes, the lesser of two runs."""
    for row in rows("benchmarks/speed/drawing.md", "case | backend | against | run 1"):
        least = min(number(row["run 1"]), number(row["run 2"]))
        if row["against"] == "Keras" and "new shapes" not in row["case"]:
            yield f"{row['case']}, {row['backend']}", least, f"{least:.2g}"


def lora():
    """Test accuracy in % of the new digits, with SGD."""
    for row in rows(RESULTS / "lora.md", "optimizer | learning rate"):
        for scale in ("stock", "right"):
            if row["optimizer"] == "SGD":
                label = f"rate {row['learning rate']}, {scale}"
                yield label, number(row[scale]), row[scale]


def zoo():
    """Networks whose signal and gradient both stay within a factor of 10."""
    found = list(rows(RESULTS / "zoo.md", "net | before: signal / gradient"))
    heads = {"before: signal / gradient": "stock Keras", "after": "calibrate"}
    for head, label in heads.items():
        level = sum(is_level(row[head]) for row in found)
        yield label, level / len(found), f"{level} of {len(found)}"


def is_level(ends):
    values = [float(end) for end in ends.split(" / ")]
    return all(0.1 <= value <= 10 for value in values)


def model_zoo():
    """Models with a finding, by its code."""
    found = list(rows(RESULTS / "model_zoo.md", "model | weights"))
    heads = {"found on the stock model": "stock", "found after": "after `initialize`"}
    counts = Counter(
        (code, head)
        for row in found
        for head in heads
        for code in set(re.findall(r"\d+ ([a-z-]+):", row[head]))
    )
    for code in sorted({code for code, _ in counts}):
        for head, when in heads.items():
            text = f"{counts[code, head]} of {len(found)}"
            yield f"{code}, {when.replace('`', '')}", counts[code, head] / len(found), text


def findings():
    """Networks in which `propagate` finds something."""
    for kind, head in (("healthy", "network | epochs"), ("sick", "network | findings")):
        found = [row["findings"] != "–" for row in rows(RESULTS / "findings.md", head)]
        yield kind, sum(found) / len(found), f"{sum(found)} of {len(found)}"


def audit_mutations():
    """Planted faults that are found, by the code of their finding."""
    found = list(rows(RESULTS / "audit_mutations.md", "fault | model"))
    for code, count in Counter(row["finding"] for row in found).most_common():
        right = sum(row["found"] == "yes" for row in found if row["finding"] == code)
        yield code, right / count, f"{right} of {count}"


def explorable():
    """The largest difference from `propagate` by setting, in standard errors."""
    for row in rows("docs/evidence/explorable.md", "setting | depth"):
        columns = ("std", "gradient", "mean", "idle", "between")
        worst = max(number(row[name]) for name in columns if row[name])
        yield row["setting"], worst, f"{worst:.1f}"


ALL = [
    stock,
    training,
    paper_table1,
    drawing,
    lora,
    zoo,
    model_zoo,
    findings,
    audit_mutations,
    explorable,
]


def draw(chart):
    bars = list(chart())
    longest = max(value for _, value, _ in bars)
    lines = [f"<caption>{escape(re.sub('`', '', chart.__doc__))}</caption>"]
    for label, value, text in bars:
        bar = f'<span style="width: {100 * value / longest:.1f}%"></span>'
        lines.append(
            f'<tr><th scope="row">{escape(label)}</th><td>{bar}</td>'
            f"<td>{escape(text)}</td></tr>"
        )
    return '<table class="bars">\n' + "\n".join(lines) + "\n</table>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    old = []
    for chart in ALL:
        path, text = CHARTS / f"{chart.__name__}.html", draw(chart)
        if options.check:
            old += [path.name] if path.read_text(encoding="utf-8") != text else []
        else:
            path.write_text(text, encoding="utf-8")
    if old:
        sys.exit(f"Old: {', '.join(old)}. Run `python benchmarks/evidence/charts.py`.")


if __name__ == "__main__":
    main()
