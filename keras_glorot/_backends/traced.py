"""The draw of a program that TensorFlow or JAX traces: it has no array to start from.

The program makes the bits that `stream` has the contract of. Each element makes its block
anew and takes one word of it. That is four times the work, and still the fastest that XLA
has: all is one loop that writes nothing but the result, and that XLA divides among devices,
as each of them needs it. A program of TensorFlow has that loop compiled by XLA as well: as
a graph of single operations it would write an array after each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_glorot._drawing import stream

__all__ = ["Program"]

cast: Any = keras.ops.cast
where: Any = keras.ops.where


class Program:
    """A program that a backend traces: its own words are the methods that come last."""

    def draw(
        self,
        form: Any,
        shape: tuple[int, ...],
        scale: float,
        dtype: str,
        seed_words: Sequence[int] | Any,
        layout: Any = None,
    ) -> Any:
        """Has the program that is being traced draw a tensor: `stream.draw`'s bits.

        Only a float64 truncated normal may differ, in its last digits: XLA fuses products
        with sums.

        Args:
            form, shape, scale, dtype: As in `stream.draw`.
            seed_words: Python integers, or the symbol of a `SeedGenerator`'s state.
            layout: On JAX, how the tensor is to be spread over devices.
        """

        def values(*key: Any) -> Any:
            zero = self.unknown_zero()
            key = tuple(word + zero for word in key)
            low, high = self.indices(shape, zero)
            if dtype == "float64":
                return self._float64_uniform(low, high, key)
            return cast(self._float32_values(form, low, high, scale, key), dtype)

        key = self._key(form, shape, dtype, seed_words)
        key = [keras.ops.convert_to_tensor(word, "uint32") for word in key]
        drawn = self.compiled(values)(*key)
        if dtype == "float64":  # outside of TensorFlow's compilation: its bits stay
            if form == "truncated_normal":
                drawn = stream.truncated_normal_quantile(drawn)
            drawn = drawn * scale
        return drawn if layout is None else self.spread(drawn, layout)

    def call(
        self,
        draw: Callable[[Sequence[int]], np.ndarray],
        shape: tuple[int, ...],
        dtype: str,
        seed_words: Sequence[int] | Any,
        layout: Any = None,
    ) -> Any:
        """Has the program that is being traced call a function each time it runs.

        Args:
            draw: From seed words to an array.
            shape, dtype: The array's.
            seed_words, layout: As in `draw`.
        """
        states = [] if isinstance(seed_words, tuple) else [seed_words]

        def call(*states: Any) -> np.ndarray:
            words = [stream.state_words(np.asarray(state)) for state in states]
            return draw(*words or [seed_words])

        tensor = self.host_call(call, states, shape, dtype)
        return tensor if layout is None else self.spread(tensor, layout)

    def _key(self, form: Any, shape: tuple[int, ...], dtype: str, seed_words: Any) -> Any:
        """The tensor's key: two integers, or two symbols."""
        if isinstance(seed_words, tuple):
            return stream.stream_key(form, shape, dtype, seed_words)
        static = stream.static_key(form, shape, dtype)
        words = seed_words[0], seed_words[1]
        digits = [half for word in words for half in self.halves(word)]
        return self._philox(digits, tuple(np.uint32(word) for word in static))[:2]

    def _float32_values(
        self, form: Any, low: Any, high: Any, scale: float, key: Any
    ) -> Any:
        words = self._words(low, high, 2, key)
        odd, late = _has_bit(low, 0), _has_bit(low, 1)
        word = where(late, where(odd, words[3], words[2]), where(odd, words[1], words[0]))
        if form == "truncated_normal":
            word = self._interpolate(word)
            scale = 2 * scale
        odd_integer = cast(word | np.uint32(1), "int32")
        return cast(odd_integer, "float32") * np.float32(scale / 2**31)

    def _float64_uniform(self, low: Any, high: Any, key: Any) -> Any:
        """Uniform on [-1, 1]."""
        words = self._words(low, high, 1, key)
        second = _has_bit(low, 0)
        first_half = cast(where(second, words[2], words[0]), "uint64")
        second_half = cast(where(second, words[3], words[1]), "uint64")
        word = cast(first_half | second_half * np.uint64(1 << 32), "int64")
        return cast(word // np.int64(1 << 10) | np.int64(1), "float64") * 2.0**-53

    def _words(self, low: Any, high: Any, bits: int, key: Any) -> Any:
        """The block of each element, whose number's last bits are its place in it."""
        block_low = low // np.uint32(1 << bits) | high * np.uint32(1 << (32 - bits))
        return self._philox((block_low, high // np.uint32(1 << bits), *key), key)

    def _philox(self, counter: Sequence[Any], key: Any) -> Any:
        """`stream.philox` of arrays of counters."""
        m0, m1 = 0xD2511F53, 0xCD9E8D57
        c0, c1, c2, c3 = counter
        k0, k1 = key
        with np.errstate(over="ignore"):  # words wrap
            for _ in range(10):
                c0, c1, c2, c3 = (
                    self.high_product(c2, m1) ^ c1 ^ k0,
                    c2 * np.uint32(m1),
                    self.high_product(c0, m0) ^ c3 ^ k1,
                    c0 * np.uint32(m0),
                )
                k0, k1 = k0 + np.uint32(0x9E3779B9), k1 + np.uint32(0xBB67AE85)
        return c0, c1, c2, c3

    def _interpolate(self, words: Any) -> Any:
        """`stream.integer_quantile`, without its work in place."""
        sign = words // np.uint32(1 << 31) * np.uint32(0xFFFFFFFF)
        magnitude = words ^ sign
        segment = cast(magnitude // np.uint32(1 << 19), "int32")
        position = magnitude & np.uint32((1 << 19) - 1)
        knots = stream.knots().astype(np.uint32)
        low = self.take(knots, segment)
        rise = self.take(knots, segment + np.int32(1)) - low
        # rise * position // 2**19 without a product of more than 32 bits.
        value = rise * (position & np.uint32(511)) // np.uint32(1 << 9)
        value = (value + rise * (position // np.uint32(1 << 9))) // np.uint32(1 << 10) + low
        return value * np.uint32(2) ^ sign

    def unknown_zero(self) -> Any:
        """A 0 of which the compiler knows nothing.

        Whatever depends on it is left to the program. Of the rest the compiler would make
        constants, which takes it a minute for 1e8 values.
        """
        raise NotImplementedError

    def indices(self, shape: tuple[int, ...], zero: Any) -> tuple[Any, Any]:
        """The low and the high word of each element's number in row-major order.

        Args:
            shape: The tensor's shape.
            zero: From `unknown_zero`.
        """
        raise NotImplementedError

    def take(self, table: np.ndarray, indices: Any) -> Any:
        raise NotImplementedError

    def host_call(
        self, function: Callable, states: list[Any], shape: tuple[int, ...], dtype: str
    ) -> Any:
        """An array of a shape and dtype that a function of the host makes of symbols."""
        raise NotImplementedError

    def halves(self, word: Any) -> tuple[Any, Any]:
        """The low and the high digit of a word of a `SeedGenerator`'s state."""
        return cast(word, "uint32"), cast(word // np.int64(1 << 32), "uint32")

    def high_product(self, a: Any, b: int) -> Any:
        """The high word of a product of two words."""
        if isinstance(a, np.generic):
            return np.uint32(int(a) * b >> 32)
        product = cast(a, "uint64") * np.uint64(b)
        return cast(product // np.uint64(1 << 32), "uint32")

    def compiled(self, function: Callable) -> Callable:
        return function

    def spread(self, drawn: Any, layout: Any) -> Any:
        """The tensor, divided among devices."""
        raise ValueError(
            f"Argument `layout` must be left out on the {keras.backend.backend()} backend: "
            "only JAX spreads a kernel over devices while it is drawn. Received: "
            f"layout={layout}"
        )


def _has_bit(word: Any, place: int) -> Any:
    return keras.ops.equal(word & np.uint32(1 << place), np.uint32(1 << place))
