"""Holds the stream against the battery of statistical tests in `dieharder`.

    python benchmarks/evidence/dieharder.py [STREAM ...]

(Debian: apt-get install dieharder)

Streams of 32-bit words, each of which goes through `dieharder -a`, for an hour or so:

- `words-1`, `words-2`: the words of one tensor, seeds 1 and 2.
- `seeds`: those of 64 tensors with neighbouring seeds, word by word in turn.
- `states`: the same of 64 neighbouring states of a `SeedGenerator`.
- `shapes`: the same of 64 tensors whose lengths differ by one.
- `uniform`: the first 16 bits of float32 values, two in a word.
- `truncated_normal`: the same of what the exact distribution function makes of them.

The table of p-values goes to benchmarks/evidence/dieharder/STREAM.txt. About one p-value
in 100 is called WEAK by chance (p < 0.005 or > 0.995); FAILED means beyond 1e-6.
"""

import pathlib
import subprocess
import sys

import numpy as np
from scipy import special

from keras_glorot._drawing import stream

LENGTH = 1 << 60  # of the tensors: more than the battery takes
CHUNK = 1 << 18  # words that are made at a time

SEVERAL = {
    "words-1": [((1,), LENGTH)],
    "words-2": [((2,), LENGTH)],
    "seeds": [((seed,), LENGTH) for seed in range(64)],
    "states": [((5, counter), LENGTH) for counter in range(64)],
    "shapes": [((1,), LENGTH + i) for i in range(64)],
}
VALUES = ("uniform", "truncated_normal")


def raw_words(names):
    """The words of several tensors in turn, without end."""
    keys = [
        stream.stream_key("uniform", (length,), "float32", seed) for seed, length in names
    ]
    blocks = np.arange(CHUNK // 4 // len(keys), dtype=np.uint64)
    while True:
        words = [stream.words_of_blocks(blocks, key).reshape(-1) for key in keys]
        yield np.stack(words, axis=1)
        blocks += np.uint64(len(blocks))


def value_words(form):
    """The first bits of values, mapped to the uniform distribution by the exact one."""
    start = 0
    while True:
        region = ((start, start + 2 * CHUNK),)
        values = stream.draw(form, (LENGTH,), 1.0, "float32", (1,), region)
        values = values.astype(np.float64)
        if form == "truncated_normal":
            values = special.erf(values / np.sqrt(2)) / special.erf(np.sqrt(2))
        # A value that was rounded to the bound itself belongs to the last cell.
        bits = np.minimum((values + 1) * 2.0**15, 2**16 - 1).astype(np.uint16)
        yield bits
        start += 2 * CHUNK


def test(name):
    folder = pathlib.Path(__file__).with_name("dieharder")
    folder.mkdir(exist_ok=True)
    command = ["dieharder", "-a", "-g", "200"]
    chunks = value_words(name) if name in VALUES else raw_words(SEVERAL[name])
    with open(folder / f"{name}.txt", "w") as report:
        battery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=report)
        try:
            while battery.poll() is None:
                battery.stdin.write(next(chunks).tobytes())
        except BrokenPipeError:  # it has seen enough
            battery.wait()
    text = (folder / f"{name}.txt").read_text()
    print(name, {word: text.count(word) for word in ("PASSED", "WEAK", "FAILED")})


if __name__ == "__main__":
    for name in sys.argv[1:] or [*SEVERAL, *VALUES]:
        test(name)
