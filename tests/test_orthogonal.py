"""Random orthogonal matrices: frozen bits, orthogonal, uniform, whoever draws them."""

import hashlib
import math

import keras
import numpy as np
import pytest
from kernels import KERNELS, use_kernel
from scipy import stats

from keras_glorot import GlorotOrthogonal, audit, initialize
from keras_glorot._drawing import orthogonal, stream
from keras_glorot._drawing.matrices import Matrices
from keras_glorot._drawing.orthogonal import draw_orthogonal
from keras_glorot.fans import Fans

DTYPES = ("float16", "bfloat16", "float32", "float64")
# SHA-256 (first 16 digits) of the little-endian bytes. These may never change: raising
# `stream.VERSION` is the one way, and every user's weights change with it.
GOLDEN = {
    ("float16", (3, 3, 5, 7)): "048c8d55621d8a53",
    ("bfloat16", (3, 3, 5, 7)): "04a4f65899e83a08",
    ("float32", (3, 3, 5, 7)): "71be580d5f74ba4e",
    ("float64", (3, 3, 5, 7)): "5e553c1e4bb77252",
    ("float32", (130, 97)): "c8d4128865762933",
    ("float64", (97, 130)): "688195bbc70656a7",
}


def drawn(shape, dtype="float64", seed=5, matrices=None, region=None):
    matrices = matrices or Matrices.from_shape(shape)
    return draw_orthogonal(matrices, shape, 1.0, dtype, (seed,), region)


def defect(matrices):
    """The largest entry of QᵀQ - I, of the tall one of each matrix or its transpose."""
    tall = np.asarray(matrices, np.float64)
    if tall.shape[-2] < tall.shape[-1]:
        tall = tall.swapaxes(-1, -2)
    return np.abs(tall.swapaxes(-1, -2) @ tall - np.eye(tall.shape[-1])).max()


def digest(values):
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


# Bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "shape"), GOLDEN)
def test_golden_bits(dtype, shape, kernel, monkeypatch):
    use_kernel(kernel, monkeypatch)
    assert digest(drawn(shape, dtype)) == GOLDEN[dtype, shape]


MADE_OF = [
    Matrices.from_shape((1, 1)),
    Matrices.from_shape((31, 33)),
    Matrices.from_shape((200, 70)),
    Matrices.from_shape((65, 129)),
    Matrices((3, 3, 4, 12), (2,), (3,), (0, 1), parts=3),
    Matrices((5, 20), (0,), (1,), parts=4),
    Matrices((2, 5, 3, 4, 6), (1, 3), (2, 4)),
    Matrices((6, 4, 5), (2, 0), (1,)),
    Matrices((3, 16, 2), (), (2,), (0,), last_tap=True),
    Matrices((6, 5, 4), (1,), (0,), (2,)),
]


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("matrices", MADE_OF, ids=str)
def test_native_kernels_draw_the_bits_of_numpy(matrices, kernel, monkeypatch):
    for dtype in DTYPES:
        with monkeypatch.context() as patch:
            use_kernel("NumPy", patch)
            wanted = drawn(matrices.shape, dtype, matrices=matrices)
        with monkeypatch.context() as patch:
            use_kernel(kernel, patch)
            values = drawn(matrices.shape, dtype, matrices=matrices)
        assert values.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("matrices", MADE_OF, ids=str)
def test_a_region_has_the_bits_of_the_whole(matrices, native, monkeypatch):
    if not native:
        monkeypatch.setattr(stream, "native", None)
    rng = np.random.default_rng(0)
    whole = drawn(matrices.shape, "float32", matrices=matrices)
    for _ in range(5):
        region = tuple(
            tuple(sorted(rng.choice(size + 1, 2, replace=False).tolist()))
            for size in matrices.shape
        )
        part = drawn(matrices.shape, "float32", matrices=matrices, region=region)
        wanted = whole[tuple(slice(*bounds) for bounds in region)]
        assert part.shape == wanted.shape
        assert part.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("matrices", [MADE_OF[2], MADE_OF[4]], ids=str)
def test_threads_change_no_bit(matrices, monkeypatch):
    wanted = drawn(matrices.shape, matrices=matrices).tobytes()
    monkeypatch.setattr(orthogonal, "WORTH_THREADS", 1)
    for cores in (1, 2, 5):
        monkeypatch.setattr(stream, "available_cores", lambda cores=cores: cores)
        assert drawn(matrices.shape, matrices=matrices).tobytes() == wanted


def test_half_precision_is_the_float32_draw_rounded():
    full = drawn((3, 3, 20, 30), "float32")
    for dtype in ("float16", "bfloat16"):
        half = drawn((3, 3, 20, 30), dtype)
        assert half.tobytes() == full.astype(half.dtype).tobytes()


# What is drawn ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 7), (64, 64), (40, 90), (90, 40), (512, 512)]
)
def test_orthogonal(shape):
    # What rounding each entry to float32 leaves: n products of errors of 2**-25 / sqrt(n).
    assert defect(drawn(shape, "float32")) < 5e-7
    assert defect(drawn(shape, "float64")) < 3e-14


def test_product_of_reflections():
    """Against the definition, in whole matrices: no blocks, no panels, no order."""
    rows, columns = 75, 41
    matrices = Matrices.from_shape((rows, columns))
    key = stream.stream_key("orthogonal", (rows, columns), "float64", (5,))
    source = orthogonal._Source(key, matrices, 1.0, "float64")
    x = np.tril(source._normals(0)).astype(np.float64)
    product = np.eye(rows)
    for k in range(columns):
        v = x[:, k].copy()
        v[k] += math.copysign(np.linalg.norm(v), v[k])
        product = product @ (np.eye(rows) - 2 * np.outer(v, v) / (v @ v))
    wanted = product[:, :columns] * -np.sign(np.diagonal(x))
    # The only difference: one value of each vector was rounded to float32.
    np.testing.assert_allclose(drawn((rows, columns)), wanted, atol=1e-6)


def test_normal_numbers():
    words = np.random.default_rng(0).integers(0, 1 << 32, (250_000, 4), np.uint32)
    values = orthogonal._normals_of_words(words)
    assert stats.kstest(values.ravel(), stats.norm.cdf).pvalue > 1e-3
    radius = np.sqrt(-2 * np.log((words[:, ::2] + 0.5) / 2**32))
    angle = (words[:, 1::2] | 1).view(np.int32) / 2**31 * math.pi
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    np.testing.assert_allclose(values.reshape(pairs.shape), pairs, rtol=1e-6, atol=1e-9)
    # The ends of the range, by hand: the smallest and the largest radius are numbers.
    ends = np.array([[0, 0, 0xFFFFFFFF, 0], [0, 1 << 31, 1 << 31, 1 << 30]], np.uint32)
    assert np.isfinite(orthogonal._normals_of_words(ends)).all()


class TestUniform:
    """Moments and angles of many small matrices; each test at significance 1e-3 or less."""

    COUNT = 20_000

    def many(self, rows, columns, seed=1):
        shape = (self.COUNT, rows, columns)
        return drawn(shape, seed=seed, matrices=Matrices(shape, (1,), (2,)))

    @pytest.mark.parametrize("size", [2, 3, 8, 33])
    def test_entries(self, size):
        # (entry + 1) / 2 has a beta distribution, wherever it stands.
        wanted = stats.beta((size - 1) / 2, (size - 1) / 2, -1, 2)
        matrices = self.many(size, size)
        places = [(0, 0), (size - 1, size - 1), (0, size - 1), (size - 1, 0), (1, 1)]
        chances = [stats.kstest(matrices[:, i, j], wanted.cdf).pvalue for i, j in places]
        assert min(chances) > 1e-3 / len(places)

    @pytest.mark.parametrize(("rows", "columns"), [(2, 2), (9, 4), (4, 9), (5, 5)])
    def test_first_two_moments_of_every_entry(self, rows, columns):
        matrices = self.many(rows, columns)
        long = max(rows, columns)
        deviation = math.sqrt(1 / long / self.COUNT)
        assert np.abs(matrices.mean(0)).max() < 5 * deviation
        squares = matrices**2
        deviation = math.sqrt((3 / (long * (long + 2)) - 1 / long**2) / self.COUNT)
        assert np.abs(squares.mean(0) - 1 / long).max() < 5 * deviation

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_fixed_rotation_changes_nothing(self, side):
        """The angle between a column, or a row, and a fixed direction."""
        size = 6
        fixed = np.random.default_rng(0).standard_normal(size)
        fixed /= np.linalg.norm(fixed)
        matrices = self.many(size, size)
        cosines = matrices[:, :, 0] @ fixed if side == "left" else matrices[:, 0] @ fixed
        wanted = stats.beta((size - 1) / 2, (size - 1) / 2, -1, 2)
        assert stats.kstest(cosines, wanted.cdf).pvalue > 1e-3

    def test_traces_of_powers(self):
        """Diaconis and Shahshahani 1994: E tr Qᵏ is 1 for even k and 0 for odd k; the
        variance is k. (QR without its signs: E tr Q is not 0.)"""
        matrices = self.many(12, 12)
        power = matrices
        for k in range(1, 4):
            traces = np.trace(power, axis1=1, axis2=2)
            deviation = math.sqrt(k / self.COUNT)
            assert abs(traces.mean() - (k % 2 == 0)) < 5 * deviation
            # Its fourth moment is all but a normal one's.
            assert abs(traces.var() / k - 1) < 5 * math.sqrt(2 / self.COUNT)
            power = power @ matrices

    def test_determinants_are_of_both_signs(self):
        for size in (1, 2, 5):
            positive = (np.linalg.det(self.many(size, size)) > 0).sum()
            assert abs(positive - self.COUNT / 2) < 4 * math.sqrt(self.COUNT / 4)

    def test_angles_of_the_plane(self):
        matrices = self.many(2, 2)
        angles = np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])
        assert stats.kstest(angles, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3

    def test_matrices_of_a_kernel_are_independent(self):
        matrices = self.many(3, 3)
        products = (matrices[1:] * matrices[:-1]).mean(0)
        assert np.abs(products).max() < 5 / 3 / math.sqrt(self.COUNT)


# The kernel ------------------------------------------------------------------------------


def to_numpy(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def test_std_is_that_of_all_values():
    for shape in [(6, 6), (5, 9), (3, 3, 8, 4), (7,), (), (2, 4, 3, 5)]:
        initializer = GlorotOrthogonal(gain=0.7, seed=1)
        values = to_numpy(initializer(shape)).astype(np.float64)
        std = math.sqrt((values**2).mean())
        assert std == pytest.approx(initializer.stddev(shape), rel=1e-6)


def test_a_window_has_one_tap():
    for window, tap in [((3, 3), (1, 1)), ((4, 2), (1, 0)), ((1, 5), (0, 2))]:
        values = to_numpy(GlorotOrthogonal(seed=1)((*window, 6, 6)))
        assert defect(values[tap]) < 1e-6
        assert np.count_nonzero(values) == 36


def test_empty():
    assert GlorotOrthogonal(seed=1)((0, 4)).shape == (0, 4)
    assert GlorotOrthogonal(seed=1)((0, 3, 4, 5)).shape == (0, 3, 4, 5)


def test_explicit_axes():
    shape = (8, 6, 6)  # 8 experts
    values = to_numpy(GlorotOrthogonal(seed=1, input_axes=[1], output_axes=[2])(shape))
    assert defect(values) < 1e-6
    assert len({matrix.tobytes() for matrix in values}) == 8


def test_a_window_may_come_last():
    initializer = GlorotOrthogonal(seed=1, input_axes=[1, 2], output_axes=[0, 2])
    values = to_numpy(initializer((5, 5, 3)))  # as PyTorch has it
    assert defect(values[..., 1]) < 1e-6
    assert np.count_nonzero(values) == 25


def test_fans_of_a_rule_tell_the_axes():
    shape = (8, 6, 4)
    assert Matrices.from_fans(shape, Fans(6, 4)).total == 8
    assert Matrices.from_fans(shape, Fans(48, 32)).total == 1


@pytest.mark.skipif(stream.native is None, reason="about the native kernel")
def test_the_native_kernel_refuses_what_would_write_elsewhere():
    out, vectors, sums = bytearray(4 * 35), bytearray(4 * 7 * 32), bytearray(8 * 33 * 32)
    right = [-1, out, 2, 0, (1, 2), 1.0, 0, 7, 5, False, (0, 7, 0, 5), vectors, sums, 0, 1]
    multiply = stream.native.multiply
    multiply(*right)
    short = bytearray(8)
    wrong = [(0, 9), (2, 4), (3, 3), (7, 4), (8, 0), (10, (0, 8, 0, 5)), (10, (0, 7, 3, 6))]
    wrong += [(10, (2, 2, 0, 5)), (1, short), (11, short), (12, short), (14, 2)]
    for place, value in wrong:
        arguments = [*right]
        arguments[place] = value
        with pytest.raises(ValueError, match="would not give"):
            multiply(*arguments)
    arguments = [*right]
    arguments[3], arguments[14] = 2, 2  # two matrices in the memory of one
    with pytest.raises(ValueError, match="would not give"):
        multiply(*arguments)


# The same bits for every backend, through the initializer.
DRAWN = {
    "float16": "c7e1c4f0b9a708fd",
    "bfloat16": "b58cdf09c617d1b0",
    "float32": "8e563c744a81f61a",
    "float64": "91ab3ee23c7cfcf2",
}


@pytest.mark.parametrize("dtype", DRAWN)
def test_same_bits_on_every_backend(dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless it is enabled")
    values = to_numpy(GlorotOrthogonal(gain="gelu", seed=42)((3, 3, 16, 32), dtype=dtype))
    assert str(values.dtype) == dtype
    assert digest(values) == DRAWN[dtype]


# `audit` ---------------------------------------------------------------------------------


def model_of_all_kinds():
    layers = keras.layers
    x = keras.Input((12, 12, 32))
    y = layers.Conv2D(32, 3, padding="same")(x)
    y = layers.Conv2D(64, 3, groups=2, strides=2)(y)
    y = layers.DepthwiseConv2D(2)(y)
    y = layers.SeparableConv2D(40, 3, padding="same", depth_multiplier=2)(y)
    y = layers.Conv2DTranspose(33, 3)(y)
    y = layers.Reshape((-1, 33))(y)
    y = layers.MultiHeadAttention(4, 16)(y, y)
    y = layers.Conv1D(32, 3, padding="causal")(y)
    y = layers.EinsumDense("abc,cd->abd", (None, 48))(y)
    y = layers.LSTM(64, recurrent_initializer="xavier_orthogonal")(y)
    return keras.Model(x, layers.Dense(64, name="scores")(y))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gain", ["auto", 1.0])
def test_audit_finds_it_sound_in_every_layer(dtype, gain):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = model_of_all_kinds()
    finally:
        keras.config.set_dtype_policy(policy)
    initialize(model, GlorotOrthogonal(gain), seed=1)
    assert not audit(model).findings


def test_audit_finds_what_was_declared_sound():
    layer = keras.layers.SimpleRNN(16, recurrent_initializer="xavier_orthogonal")
    layer.build((None, 5, 8))
    assert not audit(layer).findings
    for initializer in ("xavier_orthogonal", GlorotOrthogonal(2.0, seed=1)):
        layer = keras.layers.DepthwiseConv1D(3, depthwise_initializer=initializer)
        layer.build((None, 5, 64))
        assert not audit(layer).findings


def replace_row(kernel):
    flat = kernel.reshape(-1, kernel.shape[-1])
    at = np.flatnonzero(np.abs(flat).sum(-1))[3]
    row = np.random.default_rng(1).standard_normal(flat.shape[1])
    flat[at] = row / np.linalg.norm(row) * np.linalg.norm(flat[at])


def swap_sign(kernel):
    flat = kernel.reshape(-1, kernel.shape[-1])
    at = np.flatnonzero(np.abs(flat).sum(-1))[3]
    flat[at, np.abs(flat[at]).argmax()] *= -1


@pytest.mark.parametrize("fault", [replace_row, swap_sign])
@pytest.mark.parametrize("path", ["conv2d", "conv2d_1", "conv2d_transpose", "scores"])
def test_audit_finds_a_broken_matrix(path, fault):
    keras.backend.clear_session()
    model = model_of_all_kinds()
    initialize(model, "xavier_orthogonal", seed=1)
    kernel = model.get_layer(path).kernel
    values = to_numpy(kernel).copy()
    fault(values)
    kernel.assign(values)
    (finding,) = audit(model).findings
    assert (finding.code, finding.path) == ("form", f"{path}/kernel")


def test_audit_finds_a_tap_off_the_middle():
    layer = keras.layers.Conv2D(32, 3, kernel_initializer=GlorotOrthogonal(seed=1))
    layer.build((None, 9, 9, 32))
    layer.kernel.assign(np.roll(to_numpy(layer.kernel), 1, axis=0))
    findings = {finding.code: finding.message for finding in audit(layer).findings}
    assert findings == {"form": "Beside the tap it is not zero."}


@pytest.mark.parametrize("shape", [(512, 512), (2048, 300), (64, 4096)])
def test_audit_finds_one_row_of_a_large_matrix(shape):
    layer = keras.layers.Dense(shape[1], kernel_initializer=GlorotOrthogonal(seed=1))
    layer.build((None, shape[0]))
    assert not audit(layer).findings
    values = to_numpy(layer.kernel).copy()
    replace_row(values)
    layer.kernel.assign(values)
    assert [finding.code for finding in audit(layer).findings] == ["form"]
