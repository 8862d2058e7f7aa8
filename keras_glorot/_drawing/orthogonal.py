"""From a seed to random orthogonal matrices: NumPy only, the same bits on every machine.

This belongs to the contract of the stream; `stream` has keys (the form is 2) and blocks
of words. All other arithmetic is in float64, in the order given here; no product is fused
with a sum.

**Matrices.** A kernel holds `total` matrices (`matrices.py`), numbered in row-major order.
One with more columns than rows is the transpose of a tall one. A tall one, of R rows and C
columns, is the first C columns of H[0] H[1] ... H[C - 1], column j times the sign s[j]. It
has the distribution of the Q of normal numbers whose R has a positive diagonal: uniform
over orthogonal matrices (Stewart 1980, Mezzadri 2007).

**Normal numbers.** Let P be C rounded up to a multiple of 4. Number x[i, k] of matrix m is
element (m R + i) P + k of the stream, four elements to a block of words. The words (w, a)
of a block, first or last two, give two elements, by Box and Muller. Let (w + 1/2) / 2**32
be f 2**e, with f above sqrt(1/2), at most sqrt(2); g = (f - 1) / (f + 1); L = e ln 2 +
g LOG(g²). The odd integer a | 1 is an angle, 2**32 a full turn. Let q be the nearest
quarter turn, t what is left times pi / 2**31. The pair is the cosine and the sine,
COSINE(t²) and SINE(t²) t, swapped if q is odd, negated as q says, times sqrt(-2 L), rounded
to float32. The polynomials are below, in Horner's order.

**Reflections.** H[k] = I - 2 v vᵀ / vᵀv. Here v[i] is 0 for i < k and x[i, k] for i > k;
v[k] is x[k, k] plus (if it is below 0, minus) the root of the sum of all x[i, k]², i from k
up, rounded to float32. s[k] is -1, or 1 if x[k, k] is below 0.

**Blocks.** Reflections b to b + 31, b = 0, 32, ..., are one block, with S[k, l] the sum of
v[i, k] v[i, l]. The last block is applied first. To apply it to a column p: W[k] is the sum
of v[i, k] p[i]. Then, for k from the last down, S[k, l] W[l] is added to W[k] for l from
k + 1 up, and W[k] is multiplied by -2 / S[k, k]. Last, v[i, k] W[k] is added to p[i], for k
from b up. All sums over i start at b and go up.

**Result.** Entries are multiplied by `scale`. For any other dtype than float64 they are
then rounded to float32, and from there to half precision.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_glorot._drawing import stream
from keras_glorot._drawing.matrices import Matrices, span
from keras_glorot._drawing.stream import Bounds, Key

__all__ = ["draw_orthogonal"]

WIDTH = 32  # reflections in a block
# Columns that one thread works on at a time: natively, and with NumPy.
NATIVE_PANEL = 64
NUMPY_PANEL = 256
# Up to so many values, a thread makes a whole matrix.
SMALL = 1 << 15
# Fewer products of a matrix than this are not worth a thread.
WORTH_THREADS = 1 << 24
PER_MATRIX = 5000  # that the smallest takes as long as
PIECE = 1 << 15  # blocks of words, for NumPy
SUMS = (WIDTH + 1) * WIDTH  # of a block of reflections, with its signs
_VECTORS, _PANELS, _MATRICES = range(3)  # the phases of the native kernel

LN2, ROOT2 = math.log(2), math.sqrt(2)
LOG = (2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
SINE = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(5, -1, -1))
COSINE = tuple((-1) ** n / math.factorial(2 * n) for n in range(6, -1, -1))


def draw_orthogonal(
    matrices: Matrices,
    shape: tuple[int, ...],
    scale: float,
    dtype: str,
    seed_words: Sequence[int],
    region: Bounds | None = None,
) -> np.ndarray:
    """Draws a kernel of orthogonal matrices, or a region of it.

    Args:
        matrices: How the kernel is made of them.
        shape: The kernel's shape.
        scale: Their singular values.
        dtype: `float16`, `bfloat16`, `float32` or `float64`.
        seed_words: One or more Python integers, of any size and sign.
        region: A start and a stop for each axis. It costs the reflections of the matrices
            that it has a part of, and less than them for what it holds.

    Returns:
        A new C-contiguous array, aligned to 64 bytes.
    """
    key = stream.stream_key("orthogonal", shape, dtype, seed_words)
    source = _Source(key, matrices, scale, dtype)
    extents = shape if region is None else tuple(stop - start for start, stop in region)
    out, memory = stream.empty(extents, dtype)
    if not out.size:
        return out
    if matrices.window:
        out[...] = 0
    if region is not None and out.shape != shape:
        _fill_region(out, region, source)
        return out
    target = matrices.split(out)
    if target.flags.c_contiguous:
        start = target.ctypes.data - out.ctypes.data
        source.draw_all(memory[start : start + target.nbytes])
    else:
        drawn, memory = stream.empty(target.shape, dtype)
        source.draw_all(memory)
        target[...] = drawn
    return out


def _fill_region(out: np.ndarray, region: Bounds, source: "_Source") -> None:
    """Matrix by matrix: of each the rows and columns between the region's outermost."""
    m = source.matrices
    for piece in m.pieces(region, m.taps()):
        rows, columns = piece.indices(m.inputs), piece.indices(m.outputs)
        values = source.draw_area(piece.number, (span(rows), span(columns)))
        values = values[np.ix_(rows - rows[0], columns - columns[0])]
        view = m.view(out, region, piece.bounds)
        view[...] = values.reshape(view.shape)


class _Source:
    """All that the matrices of a kernel are drawn from.

    Args:
        key: The tensor's key.
        matrices: How many, and of which sizes.
        scale: Their singular values.
        dtype: That they are rounded to.
    """

    def __init__(self, key: Key, matrices: Matrices, scale: float, dtype: str):
        self.key = key
        self.matrices = matrices
        self.scale = scale
        self.dtype = dtype
        self.shape = matrices.rows, matrices.columns
        self.rows, self.columns = max(self.shape), min(self.shape)  # of the tall matrix
        self.blocks = self.rows * (-(-self.columns // 4))  # of words, for each matrix

    def draw_all(self, memory: memoryview) -> None:
        """All matrices, one after the other, into memory that holds just these."""
        size = self.rows * self.columns
        count = self.matrices.total
        whole = (0, self.shape[0]), (0, self.shape[1])
        if stream.native and size <= SMALL:
            self._run_native(_MATRICES, count, memory, 0, whole)
            return
        size *= np.dtype(self.dtype).itemsize
        for number in range(count):
            self._draw(memory[number * size : (number + 1) * size], number, whole)

    def draw_area(self, number: int, area: Bounds) -> np.ndarray:
        """Rows and columns of one matrix."""
        out, memory = stream.empty(tuple(b - a for a, b in area), self.dtype)
        self._draw(memory, number, area)
        return out

    def _draw(self, memory: memoryview, number: int, area: Bounds) -> None:
        if not stream.native:
            self._draw_by_numpy(memory, number, area)
            return
        blocks, panels = -(-self.columns // WIDTH), -(-self.columns // NATIVE_PANEL)
        values = WIDTH * (blocks * self.rows - WIDTH * (blocks * (blocks - 1) // 2))
        work = np.empty(values, np.float32).data, np.empty(blocks * SUMS).data
        self._run_native(_VECTORS, blocks, memory, number, area, *work)
        self._run_native(_PANELS, panels, memory, number, area, *work)

    def _run_native(
        self, phase: int, count: int, memory: Any, number: int, area: Bounds, *work: Any
    ) -> None:
        """Makes blocks of vectors, panels or matrices, on threads if that is worth it."""
        transposed = self.shape != (self.rows, self.columns)
        if transposed:
            area = area[::-1]
        code = stream.WEIGHT_DTYPES.index(self.dtype)

        def make(start: int, stop: int) -> None:
            if phase == _PANELS:  # the last one is the most work: it comes first
                start, stop = count - stop, count - start
            stream.native.multiply(
                -1, memory, code, phase, self.key, self.scale, number * self.blocks,
                self.rows, self.columns, transposed, (*area[0], *area[1]),
                *(work or (bytearray(), bytearray())), start, stop,
            )  # fmt: skip

        cost, pieces = self.rows * self.columns**2, count
        if phase == _MATRICES:
            cost = count * (cost + PER_MATRIX)
            pieces = -(-cost // WORTH_THREADS)
        if cost < WORTH_THREADS:
            make(0, count)
            return
        stream.share(make, count, -(-count // pieces))

    def _draw_by_numpy(self, memory: memoryview, number: int, area: Bounds) -> None:
        matrix = self._tall_matrix(number)
        if self.shape != matrix.shape:
            matrix = matrix.T
        values = matrix[tuple(slice(*bounds) for bounds in area)] * self.scale
        out = np.ndarray(values.shape, self.dtype, memory)
        with np.errstate(under="ignore"):
            if self.dtype != "float64":
                values = values.astype(np.float32)
            np.copyto(out, values, casting="unsafe")  # rounds to nearest even

    def _tall_matrix(self, number: int) -> np.ndarray:
        x = np.tril(self._normals(number))
        signs = np.where(np.diagonal(x) < 0, 1.0, -1.0)
        matrix = np.zeros(x.shape)
        np.fill_diagonal(matrix, signs)
        for top in reversed(range(0, self.columns, WIDTH)):
            v = x[top:, top : top + WIDTH].astype(np.float64)
            lengths = np.sqrt(np.add.accumulate(v * v)[-1])
            first = np.diagonal(v)
            np.fill_diagonal(v, np.where(first < 0, first - lengths, first + lengths))
            v = v.astype(np.float32).astype(np.float64)
            sums = _products(v, v)
            # The columns before these are zero in all of these rows.
            for left in range(top, self.columns, NUMPY_PANEL):
                panel = matrix[top:, left : left + NUMPY_PANEL]
                products = _products(v, panel)
                for k in reversed(range(len(products))):
                    for m in range(k + 1, len(products)):
                        products[k] += sums[k, m] * products[m]
                    products[k] *= -2 / sums[k, k]
                for k, product_ in enumerate(products):
                    panel += np.multiply.outer(v[:, k], product_)
        return matrix

    def _normals(self, number: int) -> np.ndarray:
        """The numbers of one tall matrix, in float32."""
        start, stop = number * self.blocks, (number + 1) * self.blocks
        normals = np.empty((self.blocks, 4), np.float32)
        for first in range(start, stop, PIECE):
            last = min(first + PIECE, stop)
            words = stream.words_of_blocks(
                np.arange(first, last, dtype=np.uint64), self.key
            )
            normals[first - start : last - start] = _normals_of_words(words)
        return normals.reshape(self.rows, -1)[:, : self.columns]


def _products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The transpose of one times the other: a sum over rows, in their order."""
    total = np.zeros((one.shape[1], other.shape[1]))
    for left, right in zip(one, other, strict=True):
        total += np.multiply.outer(left, right)
    return total


def _normals_of_words(words: np.ndarray) -> np.ndarray:
    """Two normal numbers for each two words."""
    angles = words[:, 1::2] | 1
    fraction, exponent = np.frexp(words[:, ::2] + 0.5)
    small = 2 * fraction <= ROOT2
    fraction = np.where(small, 2 * fraction, fraction)
    g = (fraction - 1) / (fraction + 1)
    logarithm = (exponent - 32 - small) * LN2 + g * _polynomial(LOG, g * g)
    radius = np.sqrt(-2 * logarithm)
    quarters = (angles + 0x20000000) >> 30
    t = (angles - (quarters << 30)).view(np.int32) * (math.pi / 2**31)
    sine, cosine = _polynomial(SINE, t * t) * t, _polynomial(COSINE, t * t)
    is_odd = quarters & 1 == 1
    x, y = np.where(is_odd, sine, cosine), np.where(is_odd, cosine, sine)
    x = radius * np.where(quarters + 1 & 2, -x, x)
    y = radius * np.where(quarters & 2, -y, y)
    return np.stack([x, y], -1).reshape(len(words), 4)


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Horner's order."""
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
