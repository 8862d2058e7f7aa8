"""`GlorotUniform` and its siblings: arguments, config, shape → distribution → draw."""

import contextlib
import functools
import math
import numbers
import random
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from typing import Any, NamedTuple

import keras

from keras_glorot import _backends as backends
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._drawing.stream import WEIGHT_DTYPES
from keras_glorot._keras.call_site import (
    CallSite,
    current_call_site,
    initializer_tables,
    seed_words,
)
from keras_glorot._keras.state import (
    is_random_seeded,
    is_shape_inference,
    unmoved_generators,
)
from keras_glorot.arguments import check_choice
from keras_glorot.fans import (
    MODES,
    Mode,
    compute_fans,
    fan_of,
    standardize_axes,
    standardize_shape,
)
from keras_glorot.gains import activation_gain, calculate_gain
from keras_glorot.layer_rules import kernel_activation, kernel_fans, kernel_matrices

__all__ = [
    "GLOROT",
    "GlorotNormal",
    "GlorotOrthogonal",
    "GlorotUniform",
    "as_default",
    "check_alone",
    "find_initializer",
    "is_unshared",
    "kernel_distribution",
    "standardize_seed",
    "with_config",
]

_NO_LAYER = CallSite()


class _Glorot(keras.initializers.Initializer):
    """All but the form of the distribution."""

    def __init__(
        self,
        gain: float | str = 1.0,
        seed: "int | keras.random.SeedGenerator | None" = None,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
        mode: Mode = "fan_avg",
    ):
        self.gain = _standardize_gain(gain)
        check_choice("mode", mode, MODES)
        self.mode = mode
        axes = standardize_axes(input_axes, output_axes)
        self.input_axes, self.output_axes = axes or (None, None)
        self._init_seed = seed = standardize_seed(seed)
        # Python's `random` is what `keras.utils.set_random_seed` governs.
        self.seed = random.getrandbits(63) if seed is None else seed
        self._is_unshared = is_unshared(seed)

    @backends.untouched
    def __call__(self, shape: Sequence[int], dtype: Any = None, layout: Any = None) -> Any:
        """Draws a kernel.

        Args:
            shape: Its shape, fully defined.
            dtype: A floating dtype: `float16`, `bfloat16`, `float32` or `float64`.
                Defaults to `keras.config.floatx()`.
            layout: On JAX, how the kernel is to be spread over devices: a
                `keras.distribution.TensorLayout` or a JAX sharding. Every device's part
                is drawn on its own; the full kernel is never materialized.

        Returns:
            A tensor of the backend.

        Raises:
            ValueError: If the shape is not fully defined, axes do not fit it, the dtype
                can't hold a weight, the values lie beyond the dtype's range or vanish in
                it, there is a layout on another backend than JAX, or several processes
                would draw without a seed.
            TypeError: If the shape does not hold integers, or the layout is none.
        """
        shape = standardize_shape(shape)
        dtype = keras.backend.standardize_dtype(dtype)
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(
                "Argument `dtype` must be a dtype that can hold a weight: one of "
                f"{', '.join(WEIGHT_DTYPES)}. Received: dtype={dtype}"
            )
        distribution = kernel_distribution(self, shape, current_call_site(self))
        if fault := distribution.range_fault(dtype):
            raise ValueError(
                f"Argument `gain` must be {fault}. "
                f"Received: gain={self.gain} for shape={shape}"
            )
        if is_shape_inference():
            return keras.ops.zeros(shape, dtype)  # nobody looks at the values
        if self._is_unshared and not backends.shares_new_variables():
            check_alone()
        seed = seed_words(self.seed)
        if backends.is_tracing() or not isinstance(seed, tuple):
            if distribution.matrices is not None:
                draw = functools.partial(distribution.draw, shape, dtype)
                return backends.program.call(draw, shape, dtype, seed, layout)
            form, scale = distribution.form, distribution.scale
            return backends.program.draw(form, shape, scale, dtype, seed, layout)
        draw_region = functools.partial(distribution.draw, shape, dtype, seed)
        if layout is not None:
            return backends.to_sharded_tensor(shape, layout, draw_region)
        return backends.to_tensor(draw_region())

    def stddev(self, shape: Sequence[int]) -> float:
        """The standard deviation of a kernel of this shape, without drawing it.

        `gain * sqrt(1 / fan)`, `fan` as `mode` has it, counted from explicit axes or
        else from the shape: no layer is known here, and with `gain="auto"` the gain is
        1. `compute_fans` and `layer_fans` tell more.
        """
        return kernel_distribution(self, standardize_shape(shape)).std

    def get_config(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, as the user wrote them."""
        config: dict[str, Any] = {}
        if self.gain != 1.0:
            config["gain"] = self.gain
        if self._init_seed is not None:
            config["seed"] = keras.saving.serialize_keras_object(self._init_seed)
        if self.input_axes is not None and self.output_axes is not None:
            config["input_axes"] = list(self.input_axes)
            config["output_axes"] = list(self.output_axes)
        if self.mode != "fan_avg":
            config["mode"] = self.mode
        return config

    def __repr__(self) -> str:
        arguments = self.get_config()
        if "seed" in arguments:
            arguments["seed"] = self._init_seed
        listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        return f"{type(self).__name__}({listed})"


@keras.saving.register_keras_serializable("keras_glorot")
class GlorotUniform(_Glorot):
    """Glorot (Xavier) uniform initializer.

    Draws from U(-limit, limit), `limit = gain * sqrt(6 / (fan_in + fan_out))`, whose
    variance is `gain² * 2 / (fan_in + fan_out)`. The fans are those of the layer being
    built, as `layer_fans` lists them; outside of layers the shape decides.

    Args:
        gain: Factor on the standard deviation: a positive float; the name of an
            activation, for `calculate_gain(name)`; or `"auto"`, for the gain of the
            `activation` of the layer being built: 1 where it has none, or SELU or
            softmax. Defaults to 1.
        seed: An int makes every call a pure function of seed, shape and distribution:
            the same bits on every backend. A `keras.random.SeedGenerator` advances with
            every call. `None` draws a seed once, from Python's `random`, so that
            `keras.utils.set_random_seed` governs it; several processes that draw without
            either get an error. Inside a traced program the program draws, with the same
            bits.
        input_axes: Axes of the kernel that one output sums over. With `output_axes`
            they decide the fans, whatever the layer. An axis in both belongs to the
            receptive field, an axis in neither is a batch axis (experts).
        output_axes: Axes of the kernel that one input is spread over.
        mode: The connections that set the scale, `fan` in `std = gain * sqrt(1 / fan)`:
            `"fan_avg"`, Glorot's `(fan_in + fan_out) / 2`; `"fan_in"`, which with
            `gain="relu"` is He's and with gain 1 LeCun's; or `"fan_out"`.

    Raises:
        ValueError: If the gain is not positive and finite or not a known name, the mode is
            none of the three, or axes are given on one side only.
        TypeError: If the gain, the seed or the axes are of a wrong type.

    Example:

    >>> GlorotUniform().limit((128, 256))
    0.125
    >>> he = GlorotUniform(gain="relu", mode="fan_in")
    >>> round(he.stddev((128, 256)), 4)  # sqrt(2 / 128)
    0.125
    >>> layer = keras.layers.Dense(256, kernel_initializer="xavier_uniform")
    >>> layer = keras.layers.Dense(
    ...     256, "tanh", kernel_initializer=GlorotUniform(gain="tanh", seed=1)
    ... )

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), eq. 16
    - [He et al., 2015](https://arxiv.org/abs/1502.01852), eq. 10
    """

    def limit(self, shape: Sequence[int]) -> float:
        """The bound of a kernel of this shape: `sqrt(3)` times `stddev(shape)`."""
        return kernel_distribution(self, standardize_shape(shape)).scale


@keras.saving.register_keras_serializable("keras_glorot")
class GlorotNormal(_Glorot):
    """Glorot (Xavier) normal initializer, truncated.

    Draws from a normal distribution truncated at two of its standard deviations, std',
    with `std' = std / 0.8796256610342398`, so that the truncated distribution has
    `std = gain * sqrt(2 / (fan_in + fan_out))`. No value exceeds `2 * std'`. In half
    precision the largest is rounded, and can exceed it by half a unit in the last place.

    Args:
        gain: As in `GlorotUniform`.
        seed: As in `GlorotUniform`; the two distributions share no bits.
        input_axes: As in `GlorotUniform`.
        output_axes: As in `GlorotUniform`.
        mode: As in `GlorotUniform`.

    Raises:
        ValueError, TypeError: As `GlorotUniform`.

    Example:

    >>> round(GlorotNormal().stddev((128, 256)), 5)
    0.07217
    >>> layer = keras.layers.Dense(256, kernel_initializer="xavier_normal")

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html)
    """


@keras.saving.register_keras_serializable("keras_glorot")
class GlorotOrthogonal(_Glorot):
    """Glorot (Xavier) orthogonal initializer.

    Draws a random orthogonal matrix, uniform over the orthogonal group, or some of its rows
    or columns, times `gain * sqrt(2 * max(rows, columns) / (fan_in + fan_out))`, with
    inputs as rows and outputs as columns. All singular values are equal, and the variance
    is that of its siblings, `gain² * 2 / (fan_in + fan_out)`. With as many outputs as
    inputs and gain 1 a layer keeps every length, at any depth, forward and back.

    There is a matrix of its own for each group of a convolution, each channel of a
    depthwise one, each expert, each gate of a recurrent kernel. The window of a
    convolution, also a transposed one, is zero but for one tap, the middle one (of an even
    window the one before, of a causal one the last): so the matrix is the map of each
    position, and it is larger than that of a dense layer by the root of the window's size
    in its entries' std. The std of the whole kernel, zeros included, is Glorot's. The map
    of the whole layer then has singular values that are all equal or, where a stride or a
    border leaves positions out, zero. A depthwise kernel of one output for each channel is
    a random sign.

    Args:
        gain: As in `GlorotUniform`.
        seed: As in `GlorotUniform`. A traced program calls the host for the draw, with the
            same bits, so TensorFlow can't have XLA compile it.
        input_axes: Axes of the kernel that are rows of the matrix. With `output_axes` they
            decide, whatever the layer. An axis in both is one of the window, an axis in
            neither is a batch axis, of which each index has its own matrix (experts).
        output_axes: Axes of the kernel that are columns of the matrix.
        mode: As in `GlorotUniform`.

    Raises:
        ValueError, TypeError: As `GlorotUniform`.

    Example:

    >>> kernel = keras.ops.convert_to_numpy(GlorotOrthogonal(seed=1)((64, 64)))
    >>> bool(np.allclose(kernel.T @ kernel, np.eye(64), atol=1e-6))
    True
    >>> layer = keras.layers.Conv2D(64, 3, kernel_initializer="xavier_orthogonal")

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html)
    - [Saxe et al., 2014](https://arxiv.org/abs/1312.6120), orthogonal kernels
    - [Xiao et al., 2018](https://arxiv.org/abs/1806.05393), section 3.3: one tap
    - [Mezzadri, 2007](https://arxiv.org/abs/math-ph/0609050), the uniform distribution
    """


GLOROT = (GlorotUniform, GlorotNormal, GlorotOrthogonal)


def kernel_distribution(
    initializer: _Glorot, shape: tuple[int, ...], site: CallSite = _NO_LAYER
) -> Distribution:
    """The distribution of a kernel of this shape, where it is made."""
    axes = standardize_axes(initializer.input_axes, initializer.output_axes)
    fans = compute_fans(shape, *axes) if axes else kernel_fans(shape, *site)
    gain = _numeric_gain(initializer.gain, site)
    fan_sum = 2 * max(1, fan_of(fans, initializer.mode))  # 1: as in Keras, without entries
    std = gain * math.sqrt(2 / fan_sum)
    match initializer:
        case GlorotUniform():
            # Not sqrt(3) times the std, whose last bit differs for two fifths of all sums.
            return Distribution("uniform", gain * math.sqrt(6 / fan_sum), std)
        case GlorotOrthogonal():
            return Distribution.orthogonal(std, kernel_matrices(shape, *site, axes))
    return Distribution.from_std("truncated_normal", std)


def _numeric_gain(gain: float | str, site: CallSite) -> float:
    if gain == "auto":
        return activation_gain(kernel_activation(*site))
    return calculate_gain(gain) if isinstance(gain, str) else gain


# Keras itself has no name "xavier". Strings can have the registered names, too.
_NAMES: dict[str, Any] = {
    "xavier_uniform": GlorotUniform,
    "xavier_normal": GlorotNormal,
    "xavier_orthogonal": GlorotOrthogonal,
    **{keras.saving.get_registered_name(cls): cls for cls in GLOROT},
}
for _table in initializer_tables():
    _table.update(_NAMES)


def find_initializer(identifier: Any) -> Any:
    """As `keras.initializers.get`; our names are known even if Keras does not know them."""
    if isinstance(identifier, str):
        identifier = _NAMES.get(identifier, identifier)
    return keras.initializers.get(identifier)


def with_config(initializer: Any, **changes: Any) -> Any:
    """A copy with other arguments."""
    with unmoved_generators():
        return type(initializer).from_config({**initializer.get_config(), **changes})


@contextlib.contextmanager
def as_default(gain: float | str = 1.0, variance_scaling: bool = False) -> Iterator[None]:
    """A scope in which Keras's strings `glorot_uniform` and `glorot_normal` are ours.

    These strings are the default of every Keras layer with a kernel, so models whose
    code can't be changed (`keras.applications`, KerasHub) can be built inside. Saved
    models keep the initializers they were saved with. Scopes nest. A scope holds for the
    thread or the asyncio task that opened it, and for tasks that are created inside it;
    `keras.utils.clear_session` does not end it. An object that a
    `keras.saving.custom_object_scope` has under one of these names comes first, where
    Keras looks there: for configs, and up to Keras 3.15 for strings.

    Args:
        gain: The gain of every initializer made in the scope, as in `GlorotUniform`.
        variance_scaling: Whether a `VarianceScaling` that is given by name or config
            becomes ours too, with `gain` in place of its scale and mode. EfficientNet
            names its initializers so.

    Raises:
        ValueError: If the gain is not positive and finite or not a known name.
        TypeError: If the gain is of a wrong type.
        RuntimeError: If this Keras, newer than those tested, looks names up elsewhere.

    Example:

    >>> with as_default():
    ...     layer = keras.layers.Dense(8)
    >>> layer.kernel_initializer
    GlorotUniform()
    """
    names = {"glorot_uniform", "glorot_normal"}
    if variance_scaling:
        names.add("VarianceScaling")
    token = _scope.set(_Scope(_standardize_gain(gain), names))
    try:
        with _redirection:
            yield
    finally:
        _scope.reset(token)


class _Scope(NamedTuple):
    """The gain of a scope, and the names of Keras that are ours in it."""

    gain: float | str
    names: Set[str]

    def make(self, name: str, config: Mapping[str, Any]) -> _Glorot:
        is_uniform = name == "glorot_uniform" or config.get("distribution") == "uniform"
        kept = config.keys() & {"seed", "input_axes", "output_axes"}
        cls = GlorotUniform if is_uniform else GlorotNormal
        return cls(self.gain, **{key: config[key] for key in kept})


_NO_SCOPE = _Scope(1.0, frozenset())
# The innermost one of this thread or asyncio task.
_scope = ContextVar("keras_glorot.as_default", default=_NO_SCOPE)


class _Detour:
    """Stands under one of Keras's names and asks the innermost scope of the caller."""

    ordinary: Any

    def __new__(cls) -> Any:
        return cls.from_config({})  # Keras 3.16 calls the class that a string names

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        scope = _scope.get()
        if cls.__name__ in scope.names:
            return scope.make(cls.__name__, config)
        return cls.ordinary.from_config(config)  # in another thread or task


class _Redirection:
    """Keeps detours in Keras's tables of names while a scope is open anywhere.

    Keras's own `custom_object_scope` would hold for all tasks of a thread alike, end with
    `clear_session`, and not reach the strings of Keras 3.16.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open_scopes = 0
        self.replaced: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        with self.lock:
            if not self.open_scopes:
                self._replace()
            self.open_scopes += 1

    def _replace(self) -> None:
        tables = initializer_tables()
        if not tables:
            raise RuntimeError(
                f"`as_default` can't change the names of Keras {keras.__version__}. Use "
                "`keras_glorot.initialize(model)`, or install a Keras version that "
                "keras_glorot was tested with."
            )
        self.replaced = [
            (table, name, table.get(name))
            for table in tables
            for name in ("glorot_uniform", "glorot_normal", "VarianceScaling")
        ]
        for table, name, previous in self.replaced:
            ordinary = getattr(keras.initializers, name) if previous is None else previous
            table[name] = type(name, (_Detour,), {"ordinary": ordinary})

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.open_scopes -= 1
            if self.open_scopes:
                return
            for table, name, previous in self.replaced:
                table.pop(name, None)
                if previous is not None:
                    table[name] = previous


_redirection = _Redirection()


def _standardize_gain(gain: float | str) -> float | str:
    if isinstance(gain, str):
        if gain != "auto":
            try:
                calculate_gain(gain)
            except ValueError as error:
                raise ValueError(
                    "Argument `gain` must be a positive float, 'auto' or the name of an "
                    f"activation that has a gain. Received: gain={gain!r}. {error}"
                ) from None
        return gain
    # bool is a number in Python, but `gain=True` is a slip.
    if isinstance(gain, bool) or not isinstance(gain, numbers.Real):
        raise TypeError(
            "Argument `gain` must be a positive float, 'auto' or the name of an "
            "activation; for a function use gain=calculate_gain(function). "
            f"Received: gain={gain} (of type {type(gain)})"
        )
    if not 0 < gain < math.inf:
        raise ValueError(
            f"Argument `gain` must be positive and finite. Received: gain={gain}"
        )
    return float(gain)


def standardize_seed(seed: Any) -> "int | keras.random.SeedGenerator | None":
    if isinstance(seed, Mapping):  # from a config
        seed = keras.saving.deserialize_keras_object(seed)
    if seed is None or isinstance(seed, keras.random.SeedGenerator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(
            "Argument `seed` must be an integer, a `keras.random.SeedGenerator` or "
            f"None. Received: seed={seed} (of type {type(seed)})"
        )
    return int(seed)


def is_unshared(seed: Any) -> bool:
    """Whether each process would have another seed in its place."""
    if isinstance(seed, keras.random.SeedGenerator):
        seed = seed.get_config()["seed"]
    return seed is None and not is_random_seeded()


def check_alone() -> None:
    """Raises an error where other processes would draw other weights."""
    count = backends.process_count()
    if count > 1:
        raise ValueError(
            "Argument `seed` must be given where several processes make the same weights: "
            "each would draw others. Or call `keras.utils.set_random_seed` in each process "
            "before initializers and layers are made, and again after `clear_session`. "
            f"Received: seed=None in one of {count} processes"
        )
