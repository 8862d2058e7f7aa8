"""`GlorotUniform` and its siblings: distribution, seeds, bits, arguments, strings."""

import asyncio
import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import ml_dtypes
import numpy as np
import pytest
from scipy import stats

import keras_glorot
from keras_glorot import (
    GlorotNormal,
    GlorotOrthogonal,
    GlorotUniform,
    as_default,
    calculate_gain,
    compute_fans,
)
from keras_glorot._drawing.stream import TRUNCATED_STD
from keras_glorot._keras import call_site
from keras_glorot._keras.call_site import initializer_tables
from keras_glorot.arguments import check_choice

BOTH = pytest.mark.parametrize("cls", [GlorotUniform, GlorotNormal])
ALL = pytest.mark.parametrize("cls", [GlorotUniform, GlorotNormal, GlorotOrthogonal])
# About a million values each.
SHAPES = [(1000, 1000), (5, 400, 500), (3, 3, 333, 334), (3, 3, 3, 192, 193)]


def to_numpy(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def exact(initializer, shape):
    """The distribution, from the paper's formula and nothing of ours but the fans."""
    gain = {"tanh": 5 / 3}.get(initializer.gain, initializer.gain)
    std = gain * math.sqrt(2 / sum(compute_fans(shape)))
    if isinstance(initializer, GlorotUniform):
        return stats.uniform(-math.sqrt(3) * std, 2 * math.sqrt(3) * std)
    return stats.truncnorm(-2, 2, scale=std / stats.truncnorm(-2, 2).std())


@pytest.mark.parametrize(
    ("gain", "shape"), [*((1.0, shape) for shape in SHAPES), ("tanh", SHAPES[0])]
)
@BOTH
def test_distribution(cls, gain, shape):
    # Kolmogorov-Smirnov at significance 1e-3, std within 5 standard errors, bounds.
    initializer = cls(gain=gain, seed=2010)
    values = to_numpy(initializer(shape)).ravel().astype(np.float64)
    wanted = exact(initializer, shape)
    assert stats.kstest(values, wanted.cdf).pvalue > 1e-3
    kurtosis = wanted.moment(4) / wanted.var() ** 2
    error = math.sqrt((kurtosis - 1) / 4 / values.size)
    assert abs(values.std() / wanted.std() - 1) < 5 * error
    assert initializer.stddev(shape) == pytest.approx(wanted.std())
    assert abs(values).max() <= np.float32(wanted.support()[1])


@ALL
def test_bfloat16_mean_is_zero_and_values_are_float32_rounded(cls):
    shape = (1000, 1000)
    initializer = cls(seed=7)
    half = to_numpy(initializer(shape, dtype="bfloat16"))
    full = to_numpy(initializer(shape, dtype="float32"))
    assert half.tobytes() == full.astype(half.dtype).tobytes()
    values = half.astype(np.float64)
    assert abs(values.mean()) < 4 * initializer.stddev(shape) / math.sqrt(values.size)


# Bits of (3, 3, 16, 32), SHA-256's first 16 digits: one table for every backend.
GOLDEN = {
    (GlorotUniform, "float16"): "d66d2b640ce90015",
    (GlorotUniform, "bfloat16"): "1f1726f69cb574a4",
    (GlorotUniform, "float32"): "d2f32693861c800d",
    (GlorotUniform, "float64"): "0574cf6817e8909c",
    (GlorotNormal, "float16"): "b975b617fc32ea43",
    (GlorotNormal, "bfloat16"): "976daa0d8bb6f03c",
    (GlorotNormal, "float32"): "76a2b8419d986312",
    (GlorotNormal, "float64"): "faae3a6f1b77b2c4",
}


@pytest.mark.parametrize(("cls", "dtype"), GOLDEN)
def test_same_bits_on_every_backend(cls, dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless it is enabled")
    initializer = cls(gain="gelu", seed=42)
    values = to_numpy(initializer((3, 3, 16, 32), dtype=dtype))
    assert str(values.dtype) == dtype
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == GOLDEN[cls, dtype]


def test_textbook_numbers():
    assert GlorotUniform().limit((128, 256)) == 0.125
    assert GlorotUniform().stddev((128, 256)) == pytest.approx(math.sqrt(2 / 384))
    assert GlorotNormal().stddev((128, 256)) == pytest.approx(math.sqrt(2 / 384))
    assert pytest.approx(stats.truncnorm(-2, 2).std(), rel=1e-12) == TRUNCATED_STD


@ALL
def test_explicit_axes(cls):
    shape = (8, 64, 32)  # 8 experts
    initializer = cls(input_axes=[1], output_axes=(-1,), seed=1)
    assert initializer.stddev(shape) == pytest.approx(math.sqrt(2 / 96))
    std = to_numpy(initializer(shape)).std()
    assert std == pytest.approx(math.sqrt(2 / 96), rel=5 / math.sqrt(2 * 8 * 64 * 32))


# Seeds ---------------------------------------------------------------------------------


@ALL
def test_modes(cls):
    """He's and LeCun's stds, and Glorot's."""
    stds = {("relu", "fan_in"): 2 / 20, (1.0, "fan_in"): 1 / 20, (1.0, "fan_out"): 1 / 60}
    stds[1.0, "fan_avg"] = 2 / (20 + 60)
    for (gain, mode), variance in stds.items():
        initializer = cls(gain, seed=1, mode=mode)
        assert initializer.stddev((20, 60)) == pytest.approx(math.sqrt(variance), rel=1e-12)
        drawn = to_numpy(initializer((20, 60)))
        assert abs(drawn.std() / math.sqrt(variance) - 1) < 0.1
        np.testing.assert_array_equal(
            drawn, to_numpy(cls(gain, 1, [0], [1], mode)((20, 60)))
        )


@ALL
def test_int_seed_is_a_pure_function(cls):
    first, second = cls(seed=5), cls(seed=5)
    values = to_numpy(first((20, 30)))
    assert (values == to_numpy(first((20, 30)))).all()
    assert (values == to_numpy(second((20, 30)))).all()
    assert (values != to_numpy(cls(seed=6)((20, 30)))).any()
    assert to_numpy(cls(seed=-5)((2, 2))).tolist() != to_numpy(cls(seed=5)((2, 2))).tolist()
    assert np.isfinite(to_numpy(cls(seed=2**100)((2, 2)))).all()


@ALL
def test_gain_scales_one_and_the_same_draw(cls):
    # The gain is no part of the stream's key: by a power of two, equal to the last bit.
    assert (to_numpy(cls(4.0, seed=5)((9, 7))) == 4 * to_numpy(cls(seed=5)((9, 7)))).all()


@ALL
def test_no_seed_follows_set_random_seed(cls):
    draws = []
    one = other = cls()
    for _ in range(2):
        keras.utils.set_random_seed(11)
        one, other = cls(), cls()
        draws.append((to_numpy(one((4, 4))).tolist(), to_numpy(other((4, 4))).tolist()))
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]
    assert to_numpy(one((4, 4))).tolist() == draws[1][0]


@ALL
def test_seed_generator_advances(cls):
    initializer = cls(seed=keras.random.SeedGenerator(3))
    draws = [to_numpy(initializer((4, 4))).tolist() for _ in range(3)]
    assert draws[0] != draws[1] != draws[2] != draws[0]
    again = cls(seed=keras.random.SeedGenerator(3))
    assert [to_numpy(again((4, 4))).tolist() for _ in range(3)] == draws
    assert draws[0] != to_numpy(cls(seed=3)((4, 4))).tolist()


# Strings, scope, config ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("xavier_uniform", GlorotUniform),
        ("xavier_normal", GlorotNormal),
        ("xavier_orthogonal", GlorotOrthogonal),
        ("keras_glorot>GlorotOrthogonal", GlorotOrthogonal),
        ("keras_glorot>GlorotUniform", GlorotUniform),
        ("keras_glorot>GlorotNormal", GlorotNormal),
    ],
)
def test_strings(name, cls):
    assert type(keras.initializers.get(name)) is cls
    layer = keras.layers.Dense(3, kernel_initializer=name)
    layer.build((None, 2))
    assert type(layer.kernel_initializer) is cls
    assert abs(to_numpy(layer.kernel)).max() <= 2 * cls().stddev((2, 3)) / TRUNCATED_STD


def test_import_leaves_keras_names_alone():
    for name in ("glorot_uniform", "glorot_normal", "GlorotUniform", "GlorotNormal"):
        assert type(keras.initializers.get(name)).__module__.startswith("keras.")
    assert (
        type(keras.layers.Dense(1).kernel_initializer) is keras.initializers.GlorotUniform
    )


def test_as_default():
    with as_default():
        assert type(keras.layers.Dense(1).kernel_initializer) is GlorotUniform
        assert type(keras.initializers.get("glorot_normal")) is GlorotNormal
        with as_default(gain="tanh"):
            assert keras.layers.Dense(1).kernel_initializer.gain == "tanh"
        assert keras.layers.Dense(1).kernel_initializer.gain == 1.0
        attention = keras.layers.MultiHeadAttention(2, 4)
        assert type(attention._kernel_initializer) is GlorotUniform
    assert (
        type(keras.layers.Dense(1).kernel_initializer) is keras.initializers.GlorotUniform
    )


def test_as_default_keeps_the_custom_objects_around_it():
    class Halves(keras.initializers.Ones):
        pass

    halves = {"class_name": "halves", "config": {}}  # no string: Keras 3.16 takes none
    with keras.saving.custom_object_scope({"halves": Halves}), as_default():
        layer = keras.layers.Dense(1, bias_initializer=halves)
    assert type(layer.bias_initializer) is Halves
    assert type(layer.kernel_initializer) is GlorotUniform


def test_as_default_for_variance_scaling_by_name():
    config = {"class_name": "VarianceScaling", "config": {"scale": 2.0}}
    uniform = {"class_name": "VarianceScaling", "config": {"distribution": "uniform"}}
    with as_default():
        assert type(keras.initializers.get(config)) is keras.initializers.VarianceScaling
    with as_default("relu", variance_scaling=True):
        assert type(keras.initializers.get(uniform)) is GlorotUniform
        initializer = keras.initializers.get(config)
    assert type(initializer) is GlorotNormal
    assert initializer.get_config() == {"gain": "relu"}


def test_as_default_keeps_what_a_config_says():
    config = {"class_name": "glorot_normal", "config": {"seed": 7}}
    scaling = {"class_name": "VarianceScaling", "config": {"scale": 2.0, "seed": 7}}
    with as_default("tanh", variance_scaling=True):
        for named in (config, scaling):
            initializer = keras.initializers.get(named)
            assert type(initializer) is GlorotNormal
            assert initializer.get_config() == {"gain": "tanh", "seed": 7}


def test_as_default_ends_with_an_error():
    with pytest.raises(RuntimeError, match="inside"), as_default():
        raise RuntimeError("inside")
    assert (
        type(keras.layers.Dense(1).kernel_initializer) is keras.initializers.GlorotUniform
    )
    with pytest.raises(ValueError, match="Argument `gain`"), as_default(gain=-1):
        pass


def test_as_default_holds_for_its_own_thread():
    seen = []
    with as_default():
        thread = threading.Thread(
            target=lambda: seen.append(type(keras.initializers.get("glorot_uniform")))
        )
        thread.start()
        thread.join()
    assert seen == [keras.initializers.GlorotUniform]


@ALL
@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ({}, {}),
        ({"gain": 1}, {}),
        ({"gain": 2}, {"gain": 2.0}),
        ({"gain": np.float32(0.5)}, {"gain": 0.5}),
        ({"gain": "tanh"}, {"gain": "tanh"}),
        ({"gain": "auto", "seed": 0}, {"gain": "auto", "seed": 0}),
        ({"seed": np.int64(3)}, {"seed": 3}),
        (
            {"input_axes": (0,), "output_axes": [-1, 1]},
            {"input_axes": [0], "output_axes": [-1, 1]},
        ),
        ({"mode": "fan_avg"}, {}),
        ({"gain": "relu", "mode": "fan_in"}, {"gain": "relu", "mode": "fan_in"}),
    ],
)
def test_config(cls, arguments, config):
    initializer = cls(**arguments)
    assert initializer.get_config() == config
    assert json.loads(json.dumps(config)) == config
    for copy in (cls.from_config(config), initializer.clone()):
        assert type(copy) is cls
        assert copy.get_config() == config
    listed = ", ".join(f"{name}={value!r}" for name, value in config.items())
    assert repr(initializer) == f"{cls.__name__}({listed})"


@ALL
def test_is_an_initializer_but_no_variance_scaling(cls):
    assert issubclass(cls, keras.initializers.Initializer)
    assert not issubclass(cls, keras.initializers.VarianceScaling)
    assert keras.saving.get_registered_name(cls) == f"keras_glorot>{cls.__name__}"


def test_version():
    assert keras_glorot.__version__.count(".") == 2


# Shapes, dtypes, bad input -------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    "shape", [(), (5,), (0,), (3, 0), (0, 0), [2, 3], (np.int64(2), 3)]
)
def test_any_rank_and_zero_sizes(cls, shape):
    values = to_numpy(cls(seed=1)(shape))
    assert values.shape == tuple(shape)
    stock = keras.initializers.GlorotUniform()(tuple(int(n) for n in shape))
    assert values.shape == to_numpy(stock).shape
    assert math.isfinite(cls().stddev(shape))


def test_low_ranks_have_keras_fans():
    assert GlorotUniform().limit(()) == pytest.approx(math.sqrt(3))
    assert GlorotUniform().limit((6,)) == pytest.approx(math.sqrt(0.5))


@ALL
def test_dtype_defaults_to_floatx(cls):
    keras.config.set_floatx("float16")
    try:
        assert keras.backend.standardize_dtype(cls()((2, 2)).dtype) == "float16"
    finally:
        keras.config.set_floatx("float32")


@ALL
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "string"])
def test_dtypes_that_hold_no_weight(cls, dtype):
    with pytest.raises(ValueError, match=r"dtype"):
        cls()((2, 2), dtype=dtype)


def test_bounds_beyond_the_dtype():
    with pytest.raises(ValueError, match=r"Argument `gain` must be smaller.*float16"):
        GlorotUniform(gain=1e6)((2, 2), dtype="float16")
    assert to_numpy(GlorotUniform(gain=1e4)((2, 2), dtype="float16")).max() < 65504


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_that_would_vanish_in_the_dtype(cls, dtype):
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    # In this shape the std is the gain over 8.
    with pytest.raises(ValueError, match=rf"Argument `gain` must be larger.*{dtype}"):
        cls(gain=7 * smallest)((64, 64), dtype)
    assert to_numpy(cls(gain=9 * smallest)((64, 64), dtype)).any()


@ALL
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"gain": 0}, ValueError),
        ({"gain": -1.0}, ValueError),
        ({"gain": math.nan}, ValueError),
        ({"gain": math.inf}, ValueError),
        ({"gain": "no_such"}, ValueError),
        ({"gain": "softmax"}, ValueError),
        ({"gain": True}, TypeError),
        ({"gain": None}, TypeError),
        ({"gain": [1.0]}, TypeError),
        ({"gain": 1j}, TypeError),
        ({"gain": math.tanh}, TypeError),
        ({"seed": 1.0}, TypeError),
        ({"seed": "1"}, TypeError),
        ({"seed": True}, TypeError),
        ({"seed": (1, 2)}, TypeError),
        ({"input_axes": [0]}, ValueError),
        ({"output_axes": [0]}, ValueError),
        ({"input_axes": [0.0], "output_axes": [1]}, TypeError),
        ({"input_axes": [True], "output_axes": [1]}, TypeError),
        ({"input_axes": 0, "output_axes": 1}, TypeError),
        ({"input_axes": "0", "output_axes": "1"}, TypeError),
        ({"mode": "fan_sum"}, ValueError),
        ({"mode": 2}, ValueError),
    ],
)
def test_bad_arguments(cls, arguments, error):
    with pytest.raises(error, match=r"Arguments? `.*Received: \w+="):
        cls(**arguments)


@ALL
@pytest.mark.parametrize("axes", [([2], [0]), ([-3], [0]), ([0, -2], [1]), ([0, 0], [1])])
def test_axes_that_do_not_fit_the_shape(cls, axes):
    initializer = cls(input_axes=axes[0], output_axes=axes[1])
    for use in (initializer, initializer.stddev):
        with pytest.raises(
            ValueError, match=r"Argument `input_axes` must .*shape=\(4, 5\)"
        ):
            use((4, 5))


@ALL
@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((None, 3), ValueError),
        ((-1, 3), ValueError),
        ((2.0, 3), TypeError),
        (("a", 3), TypeError),
        ((True, 3), TypeError),
        ([np.ones(2), 3], TypeError),
        (5, TypeError),
        (None, TypeError),
    ],
)
def test_bad_shapes(cls, shape, error):
    for use in (cls(), cls().stddev):
        with pytest.raises(error, match=r"Argument `shape` must .*Received: shape="):
            use(shape)


@ALL
def test_unknown_config_keys(cls):
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        cls.from_config({"gain": 2.0, "scale": 2.0})


def test_autograph_leaves_the_call_alone(caplog):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("AutoGraph is TensorFlow's")
    import tensorflow as tf

    logger = tf.get_logger()
    level, propagate = logger.level, logger.propagate
    logger.setLevel("WARNING")
    logger.propagate = True
    try:
        initializers = (GlorotUniform(seed=1), GlorotNormal(seed=2))
        values = tf.function(lambda: [each((3, 4)) for each in initializers])()
        tf.function(lambda: GlorotUniform("tanh")((2, 2)))()
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
    assert caplog.text == ""
    assert (to_numpy(values[0]) == to_numpy(initializers[0]((3, 4)))).all()


# as_default in tasks and with Keras's own scopes -----------------------------------------


def default_kernel():
    return keras.layers.Dense(1).kernel_initializer


def is_stock():
    return type(default_kernel()) is keras.initializers.GlorotUniform


# Where Keras looks for objects that users registered: strings, up to Keras 3.15 only.
NAMED: list = [{"class_name": "glorot_uniform", "config": {}}]
if keras.__version__ < "3.16":
    NAMED.append("glorot_uniform")


def test_as_default_holds_for_its_own_task():
    seen = {}

    async def task(gain, before, inside):
        await asyncio.sleep(before)
        with as_default(gain=gain):
            await asyncio.sleep(inside)  # the other task opens or closes its scope
            seen[gain] = default_kernel().gain
            seen["child"] = await asyncio.create_task(child())
            seen["thread"] = (await asyncio.to_thread(default_kernel)).gain
        seen[f"after {gain}"] = is_stock()

    async def child():
        return default_kernel().gain

    async def main():
        await asyncio.gather(task(2.0, 0, 0.1), task(3.0, 0.05, 0.1))
        seen["main"] = is_stock()

    asyncio.run(main())
    assert seen == {
        2.0: 2.0,
        3.0: 3.0,
        "child": 3.0,
        "thread": 3.0,
        "after 2.0": True,
        "after 3.0": True,
        "main": True,
    }
    assert is_stock()


def test_as_default_outlives_clear_session():
    with as_default(gain="tanh"):
        keras.utils.clear_session()
        assert default_kernel().gain == "tanh"
        with keras.saving.custom_object_scope({"other": GlorotNormal}):
            assert default_kernel().gain == "tanh"
    assert is_stock()


def test_as_default_puts_everything_back():
    table = keras.saving.get_custom_objects()
    before = dict(table)
    with as_default(), pytest.raises(RuntimeError), as_default():
        raise RuntimeError
    assert table == before


@pytest.mark.parametrize("named", NAMED)
def test_as_default_leaves_registered_objects_to_other_threads(named, monkeypatch):
    table, mine = keras.saving.get_custom_objects(), keras.initializers.Ones
    monkeypatch.setitem(table, "glorot_uniform", mine)
    with as_default(), ThreadPoolExecutor(1) as pool:
        other = pool.submit(keras.initializers.get, named).result()
        assert type(keras.initializers.get(named)) is GlorotUniform
    assert table["glorot_uniform"] is mine
    assert type(other) is mine


@pytest.mark.parametrize("named", NAMED)
def test_an_explicit_custom_object_comes_first(named):
    mine = {"glorot_uniform": keras.initializers.Ones}
    with keras.saving.custom_object_scope(mine), as_default():
        assert type(keras.initializers.get(named)) is keras.initializers.Ones
    with as_default(), keras.saving.custom_object_scope(mine):
        assert type(keras.initializers.get(named)) is keras.initializers.Ones


def test_as_default_in_many_threads_at_once():
    def work(gain):
        for _ in range(30):
            with as_default(gain=gain):
                assert keras.initializers.get("glorot_uniform").gain == gain
            stock = keras.initializers.get("glorot_uniform")
            assert type(stock) is keras.initializers.GlorotUniform

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, float(i)) for i in range(1, 9)]:
            done.result()
    assert "glorot_uniform" not in keras.saving.get_custom_objects()


def test_saved_initializers_are_left_alone_by_as_default():
    saved = keras.initializers.serialize(keras.initializers.VarianceScaling(2.0))
    with as_default("relu", variance_scaling=True):
        loaded = keras.initializers.deserialize(saved)
    assert type(loaded) is keras.initializers.VarianceScaling


# On a Keras that looks for strings where nobody knows -----------------------------------


@pytest.fixture
def keras_without_tables(monkeypatch):
    """No table of names is found that Keras would look into."""
    monkeypatch.setattr(call_site, "_are_searched", lambda tables: False)
    initializer_tables.cache_clear()
    with pytest.warns(UserWarning, match="strings such as"):
        initializer_tables()
    yield
    initializer_tables.cache_clear()


@pytest.mark.usefixtures("keras_without_tables")
def test_as_default_says_that_it_has_no_effect():
    message = "`as_default` can't change the names"
    with pytest.raises(RuntimeError, match=message), as_default():
        pass
    assert is_stock()


def test_initialize_does_not_need_keras_to_know_our_names(monkeypatch):
    for table in initializer_tables():
        monkeypatch.delitem(table, "xavier_uniform")
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    with pytest.raises((TypeError, ValueError), match="xavier_uniform"):
        keras.initializers.get("xavier_uniform")
    assert keras_glorot.initialize(layer).rows[0]["done"] == "GlorotUniform"


# More bad input --------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    "shape", [b"ab", bytearray(b"ab"), "", {2, 3}, {2: 3}, frozenset()]
)
def test_shapes_without_order(cls, shape):
    for use in (cls(), cls().stddev, compute_fans):
        with pytest.raises(TypeError, match=r"Argument `shape` must be a sequence"):
            use(shape)


@ALL
def test_axes_in_bytes(cls):
    with pytest.raises(TypeError, match=r"Argument `input_axes` must be a sequence"):
        cls(input_axes=b"\x00", output_axes=b"\x01")


@ALL
def test_layouts_that_are_none(cls):
    error = TypeError if keras.backend.backend() == "jax" else ValueError
    with pytest.raises(error, match=r"Argument `layout` must be .*Received: layout=5"):
        cls()((2, 3), layout=5)


@pytest.mark.parametrize(
    ("gain", "meant"), [("rleu", "relu"), ("Tanh", "tanh"), ("geluu", "gelu")]
)
def test_misspelled_gains(gain, meant):
    with pytest.raises(
        ValueError, match=rf"Argument `gain` must .*Did you mean '{meant}'\?"
    ):
        GlorotUniform(gain)
    with pytest.raises(ValueError, match=r"Received: nonlinearity='qqqq'\.$"):
        calculate_gain("qqqq")


@pytest.mark.parametrize(
    ("value", "is_right"),
    [
        ("auto", True),
        (True, True),
        (0, True),
        ("always", False),
        (2, False),
        (None, False),
        (np.zeros(2), False),
        ([True], False),
    ],
)
def test_choices(value, is_right):
    choices = ("auto", True, False)
    if is_right:
        assert check_choice("verbose", value, choices) is None
        return
    message = r"Argument `verbose` must be one of 'auto', True, False\. Received: verbose="
    with pytest.raises(ValueError, match=message):
        check_choice("verbose", value, choices)


@ALL
def test_a_config_whose_seed_is_another_object(cls):
    seed = keras.saving.serialize_keras_object(keras.layers.Dense(1))
    with pytest.raises(TypeError, match="Argument `seed` must be an integer"):
        cls.from_config({"seed": seed})
