"""Where a drawn array comes to live: no copy, no sharing, no whole tensor when sharded."""

import multiprocessing
import os
import tracemalloc

import keras
import numpy as np
import pytest

from keras_glorot import GlorotNormal, GlorotUniform, backends, sampling
from keras_glorot.sampling import draw

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
    import torch

    def fail(*arguments):
        raise AssertionError("drawn")

    monkeypatch.setattr("keras_glorot.distributions.draw", fail)
    for scope in (torch.device("meta"), keras.device("meta")):
        with scope:
            assert GlorotUniform()((1 << 20, 1 << 20)).is_meta


def test_shape_inference_draws_nothing(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "keras_glorot.distributions.draw", lambda *a, **k: drawn.append(a) or draw(*a, **k)
    )

    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(5, kernel_initializer="xavier_uniform")

        def call(self, x):
            return self.dense(x) + keras.ops.sum(self.dense.kernel)

    Late()(np.ones((2, 3), "float32"))
    assert len(drawn) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.filterwarnings("ignore:os.fork")
def test_after_a_fork(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 1 << 12)  # so that threads are at work
    arguments = ("truncated_normal", (300, 300), 1.0, "float32", (5,))
    wanted = draw(*arguments).tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(draw(*arguments).tobytes() == wanted))
    child.start()
    assert queue.get()
    child.join()


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
@pytest.mark.parametrize("cls", [GlorotUniform, GlorotNormal])
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

    monkeypatch.setattr("keras_glorot.distributions.draw", recording)
    monkeypatch.setattr(sampling, "CHUNK", 1 << 15)
    monkeypatch.setattr(sampling, "PIECE", 1 << 14)
    monkeypatch.setattr(sampling, "available_cores", lambda: 1)
    shape = (2048, 1024)
    tracemalloc.start()
    GlorotNormal(seed=5)(shape, layout=layout)
    # The arrays themselves stay: on this machine they are the devices' memory.
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shard = 4 * shape[0] * shape[1] // 8
    assert drawn == [shard] * 8
    assert peak < 8 * shard + 5 * 4 * (1 << 14) + 100_000


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
