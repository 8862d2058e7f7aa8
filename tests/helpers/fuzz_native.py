"""Calls the native kernel with arguments at random: it fills its part of `out`, or raises.

`python tests/helpers/fuzz_native.py FILE COUNT` does it COUNT times with a build of
`_native.c`, in a process of its own, which a wrong kernel would end.
`tests/test_native.py` runs it.
"""

import array
import importlib.util
import random
import sys
from typing import Any

import numpy as np

ITEMS = (2, 2, 4, 8)
KNOTS, COEFFICIENTS = 4 * 4097, 8 * 19
HUGE = (2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1)


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def right_arguments(rng: random.Random, clones: int) -> list[Any]:
    """As `sampling` gives them: a part of a region of a tensor."""
    dtype, size = rng.randrange(4), rng.choice([0, 1, 5, 700, 5000])
    first, last = sorted((rng.randint(0, size), rng.randint(0, size)))
    axes = [(rng.randint(1, 9), rng.randrange(2**40)) for _ in range(rng.randrange(4))]
    return [
        rng.randrange(-1, clones),
        bytearray(size * ITEMS[dtype]),
        dtype,
        rng.randrange(2),
        (rng.randrange(2**32), rng.randrange(2**32)),
        rng.choice([1.0, 1e-9, 3e38, 1e300]),
        rng.randbytes(KNOTS),
        rng.randbytes(COEFFICIENTS),
        first,
        last,
        rng.choice([0, rng.randrange(2**40), rng.choice(HUGE)]),
        rng.choice([1, 7, 512, 4099, rng.choice(HUGE)]),
        array.array("Q", [number for axis in axes for number in axis]),
    ]


def wrong_arguments(rng: random.Random) -> list[Any]:
    """One for each place."""
    number = rng.choice([-1, 0, 4, rng.randrange(9), *HUGE, -(2**31), None, 0.5])
    content: Any = rng.choice(
        [
            b"",
            b"short",
            None,
            np.zeros(rng.randrange(9999), rng.choice(["i1", "f4", "f8"])),
            memoryview(bytearray(999))[::2],
        ]
    )
    zeros = array.array("Q", [3, 1, 0, 1])
    return [
        number,
        rng.choice([content, bytes(99), bytearray(99)]),
        number,
        number,
        rng.choice([(), (1,), (1, 2, 3), (-1, 2**40), None, "ab"]),
        rng.choice([float("nan"), float("inf"), -0.0, -1e308, "x"]),
        rng.choice([content, bytes(KNOTS - 4)]),
        rng.choice([content, bytes(COEFFICIENTS + 8)]),
        number,
        number,
        number,
        number,
        rng.choice([content, zeros, bytes(b"\1" * 16 * 65)]),
    ]


def fuzz(native: Any, count: int) -> None:
    for seed in range(count):
        rng = random.Random(seed)
        arguments = right_arguments(rng, len(native.CLONES))
        wrong = wrong_arguments(rng)
        places = rng.sample(range(len(wrong)), rng.choice([0, 1, 1, 2, 5]))
        for place in places:
            arguments[place] = wrong[place]
        _, out, dtype, *_, first, last, _, _, _ = arguments
        before = bytes(out) if isinstance(out, bytearray) else None
        try:
            native.fill(*arguments)
        except (BufferError, OverflowError, TypeError, ValueError):
            assert places, f"seed {seed}: right arguments are refused"
            first = last = 0
            dtype = 0
        if before is not None:
            start, stop = first * ITEMS[dtype], last * ITEMS[dtype]
            assert out[:start] == before[:start], f"seed {seed}: written before the part"
            assert out[stop:] == before[stop:], f"seed {seed}: written behind the part"
        if not places:
            filled = bytes(out)
            native.fill(0, *arguments[1:])  # in plain C
            assert out == filled, f"seed {seed}: the instruction sets differ"
        with_words = [tuple(rng.choices([0, 1, *HUGE, -1], k=k)) for k in (4, 2)]
        native.philox(*with_words)


if __name__ == "__main__":
    fuzz(load(sys.argv[1]), int(sys.argv[2]))
