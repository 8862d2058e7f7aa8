"""Where a drawn array comes to live: no copy, no sharing, no whole tensor when sharded."""

import multiprocessing
import os
import subprocess
import sys
import tracemalloc

import keras
import numpy as np
import pytest

from keras_glorot import GlorotNormal, GlorotOrthogonal, GlorotUniform, audit, initialize
from keras_glorot import _backends as backends
from keras_glorot._drawing import stream
from keras_glorot._drawing.stream import draw
from keras_glorot.initializers import kernel_distribution

BACKEND = keras.backend.backend()
only = {
    name: pytest.mark.skipif(name != BACKEND, reason=f"about the {name} backend")
    for name in ("tensorflow", "jax", "torch")
}
DTYPES = ("float16", "bfloat16", "float32")


def address(tensor):
    if BACKEND == "jax":
        return tensor.unsafe_buffer_pointer()
    if BACKEND == "torch":
        return tensor.data_ptr()
    import tensorflow as tf

    # bfloat16 has no DLPack in NumPy; the bits are the same memory.
    bits = tf.bitcast(tensor, tf.uint16) if tensor.dtype == tf.bfloat16 else tensor
    return np.from_dlpack(bits).ctypes.data


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tensor_adopts_the_array(dtype):
    array = draw("uniform", (64, 33), 1.0, dtype, (1,))
    wanted = array.copy()
    tensor = backends.to_tensor(array)
    assert address(tensor) == array.ctypes.data
    assert keras.backend.standardize_dtype(tensor.dtype) == dtype
    assert tuple(tensor.shape) == (64, 33)
    result = np.asarray(keras.ops.convert_to_numpy(tensor))
    assert result.tobytes() == wanted.tobytes()


@only["jax"]
def test_a_new_shape_compiles_nothing(caplog):
    import jax

    with jax.log_compiles():
        GlorotUniform(seed=1)((37, 41))
    assert not caplog.records


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,)])
def test_odd_shapes(shape, dtype):
    tensor = GlorotUniform(seed=1)(shape, dtype=dtype)
    assert tuple(tensor.shape) == shape
    assert keras.backend.standardize_dtype(tensor.dtype) == dtype


def test_training_one_layer_leaves_its_twin_alone():
    # Both kernels are one draw; if they shared memory, an update would show in both.
    initializer = GlorotUniform(seed=1)
    layers = [keras.layers.Dense(4, kernel_initializer=initializer) for _ in range(2)]
    for layer in layers:
        layer.build((None, 3))
    before = layers[1].get_weights()[0]
    layers[0].kernel.assign_add(np.ones((3, 4)))
    np.testing.assert_array_equal(layers[1].get_weights()[0], before)
    np.testing.assert_array_equal(layers[0].get_weights()[0], before + 1)


@only["torch"]
def test_meta_device_draws_nothing(monkeypatch):
    def fail(*arguments):
        raise AssertionError("drawn")

    monkeypatch.setattr("keras_glorot._drawing.distributions.draw", fail)
    with keras.device("meta"):
        assert GlorotUniform()((1 << 20, 1 << 20)).is_meta


@only["torch"]
@pytest.mark.parametrize("tool", [initialize, audit])
def test_weights_without_values_are_refused(tool):
    with keras.device("meta"):
        layer = keras.layers.Dense(3)
        layer.build((None, 4))
    with pytest.raises(ValueError, match=r"dense.*/kernel must have values.*meta device"):
        tool(layer)


@only["torch"]
def test_a_layer_that_is_built_in_pytorch_s_meta_device():
    """Keras does not follow it: weights are on Keras's device, with values."""
    import torch

    initializer = GlorotUniform(seed=1)
    with torch.device("meta"):
        layer = keras.layers.Dense(3, kernel_initializer=initializer)
        layer.build((None, 4))
    np.testing.assert_array_equal(layer.get_weights()[0], array_of(initializer((4, 3))))


def test_shape_inference_draws_nothing(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "keras_glorot._drawing.distributions.draw",
        lambda *a, **k: drawn.append(a) or draw(*a, **k),
    )

    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(5, kernel_initializer="xavier_uniform")

        def call(self, x):
            return self.dense(x) + keras.ops.sum(self.dense.kernel)

    Late()(np.ones((2, 3), "float32"))
    assert len(drawn) == 1


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.filterwarnings("ignore:os.fork")
def test_after_a_fork(native, monkeypatch):
    if not native:
        monkeypatch.setattr(stream, "native", None)
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)  # so that threads are at work
    monkeypatch.setattr(stream, "NATIVE_PIECE", 1 << 12)
    monkeypatch.setattr(stream, "NUMPY_PIECE", 1 << 12)
    arguments = ("truncated_normal", (300, 300), 1.0, "float32", (5,))
    wanted = draw(*arguments).tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(draw(*arguments).tobytes() == wanted))
    child.start()
    assert queue.get()
    child.join()


@pytest.mark.slow
def test_in_a_spawned_process():
    arguments = ("truncated_normal", (3000, 1000), 1.0, "float32", (5,))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        [there] = pool.starmap(draw, [arguments])
    assert there.tobytes() == draw(*arguments).tobytes()


# Inside traced programs ----------------------------------------------------------------

ALL = [GlorotUniform, GlorotNormal, GlorotOrthogonal]


def array_of(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def program(function, compiled):
    """A program that the backend makes of a function without arguments."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=compiled)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import torch

    return torch.compile(function, backend="eager")


def program_of_state(initializer, shape, dtype):
    """A function of a `SeedGenerator`'s state, for JAX to trace."""

    def draw_with(state):
        variable = initializer.seed.state
        with keras.StatelessScope(state_mapping=[(variable, state)]):
            return initializer(shape, dtype)

    return draw_with


# One shape of more elements than TensorFlow counts in a row, with a rest.
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((dtype, shape) for dtype in DTYPES for shape in ((3, 3, 5, 7), (5, 20011))),
        *(("float32", shape) for shape in ((1,), (0, 4))),
    ],
)
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_draws_the_same_bits(cls, dtype, shape, compiled):
    if compiled and (BACKEND != "tensorflow" or cls is GlorotOrthogonal):
        pytest.skip("one way to trace")
    for seed in (5, -(2**70)) if dtype == "float32" else (5,):
        wanted = array_of(cls(seed=seed)(shape, dtype))
        drawn = program(lambda seed=seed: cls(seed=seed)(shape, dtype), compiled)()
        assert array_of(drawn).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_program_draws_the_same_bits_for_a_generator(cls, compiled):
    # Its state is a symbol in the program; it advances there as outside.
    if compiled and (BACKEND != "tensorflow" or cls is GlorotOrthogonal):
        pytest.skip("one way to trace")
    shape, seed = (37, 41), 2**32 - 5
    if BACKEND == "torch":
        seed = 2**31 - 5  # Keras can't make a larger one there
    outside = cls(seed=keras.random.SeedGenerator(seed))
    wanted = [array_of(outside(shape)).tobytes() for _ in range(3)]
    assert len(set(wanted)) == 3
    inside = cls(seed=keras.random.SeedGenerator(seed))
    if BACKEND == "jax":
        import jax

        traced = jax.jit(program_of_state(inside, shape, "float32"))
        states = [inside.seed.state.value + np.uint32([0, i]) for i in range(3)]
        drawn = [traced(state) for state in states]
    else:
        traced = program(lambda: inside(shape), compiled)
        drawn = [traced() for _ in range(3)]
    assert [array_of(tensor).tobytes() for tensor in drawn] == wanted


def test_a_float64_program():
    # The uniform has the same bits, the normal all but the last: XLA fuses operations.
    if BACKEND == "jax":
        pytest.skip("JAX has no float64 unless it is told to")
    for cls in (GlorotUniform, GlorotNormal):
        wanted = array_of(cls(seed=5)((33, 65), "float64"))
        for compiled in (False, True):
            drawn = program(lambda cls=cls: cls(seed=5)((33, 65), "float64"), compiled)()
            if compiled and cls is GlorotNormal:
                np.testing.assert_allclose(array_of(drawn), wanted, rtol=1e-14)
            else:
                assert array_of(drawn).tobytes() == wanted.tobytes()


@only["jax"]
def test_float64_programs_of_jax():
    import jax

    wanted = {form: draw(form, (33, 65), 0.3, "float64", (5, 0)) for form in FORMS}
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else x64_of_old_jax():
        for form, values in wanted.items():
            state = np.uint32([5, 0])
            traced = jax.jit(
                lambda state, form=form: backends.program.draw(
                    form, (33, 65), 0.3, "float64", state
                )
            )
            np.testing.assert_allclose(traced(state), values, rtol=1e-14)
            if form == "uniform":
                assert np.asarray(traced(state)).tobytes() == values.tobytes()


def x64_of_old_jax():
    from jax.experimental import enable_x64

    return enable_x64()


FORMS = ("uniform", "truncated_normal")


@only["jax"]
def test_vmap_calls_the_host_for_each_state():
    import jax

    initializer = GlorotOrthogonal(seed=keras.random.SeedGenerator(9))
    states = np.uint32([[9, 0], [9, 1], [10, 0]])
    drawn = jax.vmap(program_of_state(initializer, (5, 7), "float32"))(states)
    distribution = kernel_distribution(initializer, (5, 7))
    for values, state in zip(np.asarray(drawn), states.tolist(), strict=True):
        wanted = distribution.draw((5, 7), "float32", state)
        assert values.tobytes() == wanted.tobytes()


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch makes no such program")
def test_a_program_has_no_constant_of_orthogonal_values():
    def traced():
        return GlorotOrthogonal(seed=5)((512, 512))

    if BACKEND == "jax":
        import jax

        assert len(jax.jit(traced).lower().as_text()) < 10_000
    else:
        import tensorflow as tf

        graph = tf.function(traced).get_concrete_function().graph.as_graph_def()
        assert graph.ByteSize() < 10_000


@only["jax"]
def test_vmap_draws_each_state():
    import jax

    initializer = GlorotNormal(seed=keras.random.SeedGenerator(9))
    states = np.uint32([[9, 0], [9, 1], [10, 0]])
    drawn = jax.vmap(program_of_state(initializer, (5, 7), "float32"))(states)
    for values, (seed, counter) in zip(np.asarray(drawn), states.tolist(), strict=True):
        scale = kernel_distribution(initializer, (5, 7)).scale
        wanted = draw("truncated_normal", (5, 7), scale, "float32", (seed, counter))
        assert values.tobytes() == wanted.tobytes()


@only["jax"]
def test_elements_of_large_tensors_are_counted_in_64_bits(monkeypatch):
    # At the far corner of 3 * 2**31 elements, and of a row that is longer than 2**32.
    import jax

    for shape in ((3, 1 << 14, 1 << 17), (5, 3, (1 << 32) - 7)):
        corner = [np.arange(max(size - 3, 0), size, dtype=np.uint32) for size in shape]
        grids = np.meshgrid(*corner, indexing="ij")
        monkeypatch.setattr(
            jax.lax, "broadcasted_iota", lambda _, __, axis, grids=grids: grids[axis]
        )
        halves = backends.program.indices(shape, np.uint32(0))
        low, high = (np.asarray(half, np.int64) for half in halves)
        wanted = np.ravel_multi_index([grid.astype(np.int64) for grid in grids], shape)
        np.testing.assert_array_equal(low + (high << 32), wanted)


@only["tensorflow"]
@pytest.mark.parametrize("shape", [(5, 1 << 14, 1 << 17), (1 << 31,)])
def test_a_program_of_tensorflow_counts_elements_in_64_bits(shape):
    # XLA makes no more of the tensor than the program returns.
    import tensorflow as tf

    def corner():
        drawn = backends.program.draw("uniform", shape, 1.0, "float32", (5,))
        return drawn[tuple(slice(size - 1, size) for size in shape[:-1])][..., -3:]

    region = tuple((size - 1, size) for size in shape[:-1])
    region += ((shape[-1] - 3, shape[-1]),)
    wanted = draw("uniform", shape, 1.0, "float32", (5,), region)
    drawn = tf.function(corner, jit_compile=True)()
    assert array_of(drawn).tobytes() == wanted.tobytes()


@only["tensorflow"]
@pytest.mark.parametrize("cls", ALL)
def test_a_program_of_tensorflow_refuses_a_layout(cls):
    import tensorflow as tf

    with pytest.raises(ValueError, match="Argument `layout` must be left out on the tens"):
        tf.function(lambda: cls(seed=5)((2, 3), layout=5))()


@only["jax"]
@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_a_program_divides_the_draw_among_devices(name, eight_devices):
    import jax

    mesh_shape, axes, spec = SPECS[name]
    mesh = jax.sharding.Mesh(eight_devices.reshape(mesh_shape), axes)
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    initializer, shape = GlorotNormal(seed=5), (64, 104)
    wanted = np.asarray(initializer(shape))
    traced = jax.jit(lambda: initializer(shape, layout=layout))
    drawn = traced()
    assert drawn.sharding.is_equivalent_to(layout, 2)
    assert np.asarray(drawn).tobytes() == wanted.tobytes()
    # No device has an array of the whole tensor's size, and none sends anything.
    text = traced.lower().compile().as_text()
    assert "[64,104]" not in text
    assert "all-" not in text


@only["jax"]
def test_in_a_shard_map(eight_devices):
    import jax

    shard_map = getattr(jax, "shard_map", None)
    if shard_map is None:
        from jax.experimental.shard_map import shard_map
    mesh = jax.sharding.Mesh(eight_devices, ("x",))
    split = jax.sharding.PartitionSpec("x")
    initializer = GlorotNormal(seed=keras.random.SeedGenerator(9))
    one = program_of_state(initializer, (5, 7), "float32")
    states = np.uint32([[9, i] for i in range(8)])
    drawn = jax.jit(
        shard_map(lambda s: one(s[0])[None], mesh=mesh, in_specs=split, out_specs=split)
    )(states)
    scale = kernel_distribution(initializer, (5, 7)).scale
    for values, state in zip(np.asarray(drawn), states.tolist(), strict=True):
        wanted = draw("truncated_normal", (5, 7), scale, "float32", state)
        assert values.tobytes() == wanted.tobytes()


@only["jax"]
def test_the_table_is_the_largest_constant():
    import jax

    def traced():
        return GlorotNormal(seed=5)((512, 512))

    text = jax.jit(traced).lower().as_text()
    assert len(text) < 200_000  # the table is 33,000 digits of them


@only["tensorflow"]
def test_a_saved_model_draws(tmp_path):
    import tensorflow as tf

    class Drawing(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.generator = keras.random.SeedGenerator(3)

        def call(self, x):
            normal = GlorotNormal(seed=self.generator)((300, 200))
            return normal + x, GlorotUniform(seed=5)((300, 200)) + x

    wanted = [
        array_of(GlorotNormal(seed=keras.random.SeedGenerator(3))((300, 200))),
        array_of(GlorotUniform(seed=5)((300, 200))),
    ]
    layer = Drawing()
    layer.build(())
    archive = keras.export.ExportArchive()
    archive.track(layer)
    archive.add_endpoint("draw", layer, [tf.TensorSpec((), tf.float32)])
    archive.write_out(str(tmp_path), verbose=False)
    # Neither of the two drawn tensors is in the file.
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 200_000
    loaded = tf.saved_model.load(str(tmp_path))
    drawn = loaded.draw(tf.constant(0.0))
    for tensor, array in zip(drawn, wanted, strict=True):
        assert tensor.numpy().tobytes() == array.tobytes()


# Sharding ------------------------------------------------------------------------------


@pytest.fixture
def eight_devices():
    import jax

    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 JAX devices")
    return np.array(devices[:8])


SPECS = {
    "rows": ((8,), ("x",), ("x", None)),
    "columns": ((8,), ("x",), (None, "x")),
    "blocks": ((2, 4), ("x", "y"), ("x", "y")),
    "blocks on one axis": ((2, 4), ("x", "y"), (("x", "y"), None)),
    "replicated in part": ((2, 4), ("x", "y"), (None, "y")),
    "replicated": ((8,), ("x",), ()),
}


@only["jax"]
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("cls", ALL)
def test_sharded_bytes_are_the_whole_ones(cls, name, eight_devices):
    import jax

    mesh_shape, axes, spec = SPECS[name]
    mesh = jax.sharding.Mesh(eight_devices.reshape(mesh_shape), axes)
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    initializer = cls(seed=5)
    whole = np.asarray(initializer((64, 104)))
    sharded = initializer((64, 104), layout=layout)
    assert sharded.sharding.is_equivalent_to(layout, 2)
    assert np.asarray(sharded).tobytes() == whole.tobytes()
    # Replicas may not share memory: a donated buffer is written to.
    pointers = [shard.data.unsafe_buffer_pointer() for shard in sharded.addressable_shards]
    assert len(set(pointers)) == 8


@only["jax"]
@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_no_array_is_larger_than_a_shard_and_its_scratch(name, eight_devices, monkeypatch):
    import jax

    mesh_shape, axes, spec = SPECS[name]
    mesh = jax.sharding.Mesh(eight_devices.reshape(mesh_shape), axes)
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    drawn = []

    def recording(*arguments):
        array = draw(*arguments)
        drawn.append(array.nbytes)
        return array

    monkeypatch.setattr("keras_glorot._drawing.distributions.draw", recording)
    monkeypatch.setattr(stream, "native", None)  # which has all of it on its stack
    monkeypatch.setattr(stream, "NUMPY_PIECE", 1 << 14)
    monkeypatch.setattr(stream, "available_cores", lambda: 1)
    shape = (2048, 1024)
    tracemalloc.start()
    GlorotNormal(seed=5)(shape, layout=layout)
    # The arrays themselves stay: on this machine they are the devices' memory.
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shard = 4 * shape[0] * shape[1] // 8
    assert drawn == [shard] * 8
    assert peak < 8 * shard + 10 * 4 * (1 << 14) + 100_000


@only["jax"]
def test_keras_distribution(eight_devices):
    mesh = keras.distribution.DeviceMesh(
        (2, 4), ("batch", "model"), keras.distribution.list_devices()[:8]
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["dense.*kernel"] = (None, "model")
    distribution = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )
    initializer = GlorotUniform(seed=5)
    whole = np.asarray(initializer((32, 64)))
    try:
        keras.distribution.set_distribution(distribution)
        layer = keras.layers.Dense(64, kernel_initializer=initializer)
        layer.build((None, 32))
        kernel = layer.kernel.value
    finally:
        keras.distribution.set_distribution(None)
    parts = {
        tuple((part.start, part.stop) for part in shard.index)
        for shard in kernel.addressable_shards
    }
    assert len(parts) == 4
    assert np.asarray(kernel).tobytes() == whole.tobytes()


@pytest.fixture
def sharded_layer(eight_devices):
    """A layer whose kernel is spread over eight devices, in two copies of four parts."""
    import jax

    layer = keras.layers.Dense(104, kernel_initializer=GlorotUniform(seed=5))
    layer.build((None, 64))
    mesh = jax.sharding.Mesh(eight_devices.reshape(2, 4), ("x", "y"))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "y"))
    layer.kernel.assign(jax.device_put(layer.kernel.value, layout))
    return layer


@only["jax"]
def test_looking_leaves_no_copy_on_the_host(sharded_layer):
    kernel = sharded_layer.kernel.value
    assert not audit(sharded_layer).findings
    assert kernel._npy_value is None
    assert all(shard.data._npy_value is None for shard in kernel.addressable_shards)


@only["jax"]
@pytest.mark.parametrize("initializer", ["xavier_uniform", "he_normal", "orthogonal"])
def test_initialize_draws_each_part_once(initializer, sharded_layer, monkeypatch):
    plain = keras.layers.Dense(104)
    plain.build((None, 64))
    initialize(plain, initializer, seed=1)
    drawn, layout = [], sharded_layer.kernel.value.sharding

    def recording(*arguments):
        array = draw(*arguments)
        drawn.append(array.shape)
        return array

    monkeypatch.setattr("keras_glorot._drawing.distributions.draw", recording)
    initialize(sharded_layer, initializer, seed=1)
    kernel = sharded_layer.kernel.value
    assert drawn == [(64, 26)] * (0 if initializer == "orthogonal" else 4)
    assert kernel.sharding.is_equivalent_to(layout, 2)
    assert np.asarray(kernel).tobytes() == array_of(plain.kernel).tobytes()


@only["jax"]
def test_audit_of_a_sharded_kernel_is_that_of_a_whole_one(sharded_layer):
    plain = keras.layers.Dense(104, kernel_initializer=GlorotUniform(seed=5))
    plain.build((None, 64))
    values = array_of(plain.kernel).copy()
    values[:, 100] = 0
    values[:, 7] = -values[:, 90]
    tables = []
    for layer in (plain, sharded_layer):
        layer.name = "dense"
        backends.assign(layer.kernel, values)
        tables.append(audit(layer))
    assert {each.code for each in tables[0].findings} >= {"zero-slice", "repeated-slice"}
    assert tables[0].findings == tables[1].findings
    assert len(sharded_layer.kernel.value.addressable_shards) == 8


def test_the_file_of_no_other_backend_is_imported():
    files = {name for name in only if f"keras_glorot._backends.{name}" in sys.modules}
    assert files == {BACKEND}


@pytest.mark.slow
def test_other_backends_of_keras_draw_the_same_bits():
    """And all that needs no gradients: `numpy` stands for `openvino` and what will come."""
    source = """
import keras, numpy as np, keras_glorot
model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7), keras.layers.Dense(3)])
keras_glorot.initialize(model, "xavier_normal", seed=1)
assert not keras_glorot.audit(model).findings
assert "jax" not in keras_glorot._backends.to_tensor.__module__
try:
    keras_glorot.propagate(model, np.ones((4, 5)))
except RuntimeError as error:
    print(error)
generator = keras_glorot.GlorotUniform(seed=keras.random.SeedGenerator(9))
print([generator((5, 6)).tobytes().hex(), model.layers[0].kernel.value.tobytes().hex()])
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "numpy"},
        check=True,
    )
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(7), keras.layers.Dense(3)]
    )
    initialize(model, "xavier_normal", seed=1)
    drawn = GlorotUniform(seed=keras.random.SeedGenerator(9))((5, 6))
    wanted = [array_of(each).tobytes().hex() for each in (drawn, model.layers[0].kernel)]
    error = "Gradients need KERAS_BACKEND to be tensorflow, jax or torch."
    assert done.stdout.splitlines() == [error, str(wanted)]


def test_an_assigned_value_can_be_given_back():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    before, held = array_of(layer.kernel).copy(), backends.held_value(layer.kernel)
    backends.assign(layer.kernel, -before)
    np.testing.assert_array_equal(array_of(layer.kernel), -before)
    backends.assign(layer.kernel, held)
    np.testing.assert_array_equal(array_of(layer.kernel), before)
