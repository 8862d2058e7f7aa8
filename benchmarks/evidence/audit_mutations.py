"""Planted faults that `audit` finds, and its findings where there is none.

    python benchmarks/evidence/audit_mutations.py  # on all three backends, some minutes
    KERAS_BACKEND=torch python benchmarks/evidence/audit_mutations.py --json --seeds 5

Each fault is planted into a model that was audited without a finding. It counts as found
if the finding that it calls for is there, at the weight that it was planted in. Then each
architecture is drawn with many seeds, by `initialize` and by Keras itself, and audited:
every warning or error is a false one. The whole run writes `audit_mutations.md`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

# The tests plant a few of these faults.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))

from planted_faults import (
    ARCHITECTURES,
    FAULTS,
    STOCK,
    audit_fault,
    declared_wrongly,
    false_findings,
)

BACKENDS = ("tensorflow", "jax", "torch")
RESULT = Path(__file__).with_suffix(".md")


NOT_LOOKED_FOR = (
    "Not looked for, and not found while std, mean, bounds and form "
    "of the whole weight stay right: units of another scale (one column times 0.1 or 1e-6, "
    "or half of them smaller and half larger), copies that are scaled or noisy, sorted "
    "values, circulant and symmetric matrices."
)


def run(seeds: int) -> dict[str, Any]:
    faults = [audit_fault(fault) for fault in FAULTS]
    false = {make.__name__: false_findings(make, seeds) for make in ARCHITECTURES}
    return {"faults": faults, "false": false, "keras": keras.__version__}


def run_elsewhere(backend: str, seeds: int) -> dict[str, Any]:
    """In a process of its own: Keras chooses its backend when it is imported."""
    command = [sys.executable, __file__, "--json", "--seeds", str(seeds)]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, dict[str, Any]], seeds: int) -> str:
    """The results by backend, as Markdown."""
    found = [all(r["faults"][i][1] for r in results.values()) for i in range(len(FAULTS))]
    false = sum(len(each) for r in results.values() for each in r["false"].values())
    versions = {result["keras"] for result in results.values()}
    lines = [
        "# Planted faults that `audit` finds",
        "",
        "Made by `python benchmarks/evidence/audit_mutations.py` with Keras "
        f"{', '.join(sorted(versions))} on {', '.join(results)}.",
        "",
        f"**{sum(found)} of {len(FAULTS)} faults are found on all backends.** A fault is "
        "found if the finding that it calls for is there, at the weight that it was "
        "planted in. Other codes are consequences of the same fault.",
        "",
        f"**{false} false findings** in {seeds} seeds x {len(ARCHITECTURES)} architectures "
        f"x {len(results)} backends, each drawn three ways: by `initialize` with "
        "`GlorotUniform` and `GlorotNormal`, where any finding is false, and by Keras with "
        f"one of up to {len(STOCK)} other initializers in turn, where any warning or error "
        "is.",
        "",
        NOT_LOOKED_FOR,
        "",
        "| fault | model | weight | finding | found | all codes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for i, fault in enumerate(FAULTS):
        codes = sorted({code for r in results.values() for code in r["faults"][i][0]})
        cells = [
            fault.what,
            fault.make.__name__,
            f"`{fault.path}`",
            f"`{fault.code}`",
            "yes" if found[i] else "**no**",
            " ".join(codes) if fault.make is not declared_wrongly else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| architecture | false findings |", "| --- | --- |"]
    for make in ARCHITECTURES:
        count = sum(len(result["false"][make.__name__]) for result in results.values())
        lines.append(f"| {make.__name__} | {count} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="only the backend in use")
    parser.add_argument("--seeds", type=int, default=100)
    options = parser.parse_args()
    if options.json:
        print(json.dumps(run(options.seeds)))
        return
    results = {backend: run_elsewhere(backend, options.seeds) for backend in BACKENDS}
    text = report(results, options.seeds)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
