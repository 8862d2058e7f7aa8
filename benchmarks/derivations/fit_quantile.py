"""Derives the coefficients of `keras_glorot._drawing.stream`'s truncated-normal quantile.

float64 draws are made by it, and the table of knots for float32, whose error is printed.

With x uniform on (-1, 1), the quantile of a standard normal truncated at two standard
deviations is q(x) = sqrt(2) erfinv(x erf(sqrt(2))). It is odd, so q(x) / x is a function
of s = 1 - x². That function is interpolated by a ratio N(s) / D(s) of two polynomials
of one degree, in 60 decimal digits. All coefficients come out positive, so that
evaluating them for 0 <= s <= 1 loses no digits, and s = 0 (the bounds, q = ±2) is a
node, so that the bounds are exact.

Run it:  python benchmarks/derivations/fit_quantile.py     (needs mpmath and SciPy)
"""

import mpmath as mp
import numpy as np
from scipy import special

from keras_glorot._drawing import stream

# Nodes crowd towards s = 0, near the singularity at s = -0.0975 (x = 1 / erf(sqrt(2))):
# Chebyshev points u on [0, 1] pulled there by s = C u / (1 + C - u). Of 0.1, 0.2, 0.3,
# 0.5, 1 and 2, C = 0.5 gave the smallest error at every degree from 3 to 9.
C = mp.mpf("0.5")


def ratio(s):
    """q(x) / x as a function of s = 1 - x²."""
    scale = mp.erf(mp.sqrt(2))
    x = mp.sqrt(1 - s)
    if x == 0:
        return scale * mp.sqrt(mp.pi / 2)
    return mp.sqrt(2) * mp.erfinv(scale * x) / x


def crowded(u):
    return C * u / (1 + C - u)


def interpolate(degree):
    """Numerator and denominator, highest power first, the denominator's first being 1."""
    count = 2 * degree + 1
    nodes = [crowded((1 - mp.cos(mp.pi * j / (count - 1))) / 2) for j in range(count)]
    matrix, values = mp.matrix(count, count), mp.matrix(count, 1)
    for row, s in enumerate(nodes):
        values[row] = ratio(s)
        for power in range(degree + 1):
            matrix[row, power] = s**power
        for power in range(1, degree + 1):
            matrix[row, degree + power] = -values[row] * s**power
    solution = list(mp.lu_solve(matrix, values))
    numerator, denominator = solution[: degree + 1], [mp.mpf(1), *solution[degree + 1 :]]
    leading = denominator[-1]  # was found with D(0) = 1
    return [[c / leading for c in reversed(p)] for p in (numerator, denominator)]


def main():
    mp.mp.dps = 60
    numerator, denominator = interpolate(9)
    error = 0  # relative, of the quantile
    for s in (crowded(mp.mpf(j) / 1000) for j in range(1001)):
        fitted = mp.polyval(numerator, s) / mp.polyval(denominator, s)
        error = max(error, abs(fitted / ratio(s) - 1))
    print(f"# degree 9, relative error {mp.nstr(error, 2)}")
    for coefficients in (numerator, denominator[1:]):
        print(f"({', '.join(repr(float(c)) for c in coefficients)}),")
    print(f"# integer quantile: distribution function within {table_distance():.2g}")


def table_distance():
    """How far the table's distribution function is off, at 256 places of each segment."""
    words = np.arange(0, 2**31, 2**11, dtype=np.uint32)
    values = (stream.integer_quantile(words.copy()).view(np.int32) | 1) / 2**30
    exact = special.erf(values / np.sqrt(2)) / special.erf(np.sqrt(2))
    return abs(exact - (words + 0.5) / 2**31).max() / 2


if __name__ == "__main__":
    main()
