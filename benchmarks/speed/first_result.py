"""How long it takes until somebody who copies the README's first blocks sees a result.

    python benchmarks/speed/first_result.py [BACKEND ...]

Each backend runs the first three Python blocks as one script in a process of its own,
imports and all: lines of code, seconds of wall and of CPU time.
"""

import os
import pathlib
import re
import resource
import subprocess
import sys
import time

README = pathlib.Path(__file__).parents[2] / "README.md"


def main(backends):
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)[:3]
    code = "\n".join(blocks)
    lines = sum(1 for line in code.splitlines() if line.strip() and line.strip()[0] != "#")
    for backend in backends:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        environment = {**os.environ, "KERAS_BACKEND": backend}
        subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True
        )
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{backend:10} {lines} lines, {wall:.1f} s, {cpu:.1f} s of CPU time")


if __name__ == "__main__":
    main(sys.argv[1:] or ["tensorflow", "jax", "torch"])
