"""Several processes on this machine that run one program together.

`python tests/helpers/together.py NAME RANK ADDRESS` is one of two; the last line that
it prints is its result, in JSON.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

COUNT = 2


def run_together(backend, name):
    """The results of a function of this module, called in each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": str(root),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, name, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(COUNT)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def join(rank, port):
    """Makes this process one of those that run together."""
    address = f"127.0.0.1:{port}"
    match os.environ["KERAS_BACKEND"]:
        case "jax":
            import jax

            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(address, COUNT, rank)
        case "torch":
            from torch import distributed

            distributed.init_process_group(
                "gloo", f"tcp://{address}", rank=rank, world_size=COUNT
            )
        case "tensorflow":
            workers = [f"127.0.0.1:{port + i}" for i in range(COUNT)]
            task = {"type": "worker", "index": rank}
            os.environ["TF_CONFIG"] = json.dumps(
                {"cluster": {"worker": workers}, "task": task}
            )


def plain_model(kernel_initializer=None):
    import keras

    kernel_initializer = kernel_initializer or keras.initializers.GlorotUniform(seed=5)
    layers = [
        keras.layers.Dense(
            32, "relu", kernel_initializer=kernel_initializer, name=f"hidden_{i}"
        )
        for i in range(6)
    ]
    head = keras.layers.Dense(
        8,
        kernel_initializer=kernel_initializer,
        bias_initializer=keras.initializers.RandomNormal(stddev=0.1, seed=5),
        name="head",
    )
    model = keras.Sequential([keras.Input((16,)), *layers, head], name="plain")
    model.compile("adam")
    model.optimizer.build(model.trainable_variables)
    return model


def batch():
    import numpy as np

    return np.random.default_rng(0).standard_normal((64, 16)).astype("float32")


def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return None


def whole(variable):
    """All values of a variable, also those of other processes."""
    import keras
    import numpy as np

    if keras.backend.backend() == "jax":
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(variable.value, tiled=True))
    return np.asarray(keras.ops.convert_to_numpy(variable))


def digests(model):
    """Of what each variable holds."""
    return {
        variable.path: hashlib.sha256(whole(variable).tobytes()).hexdigest()
        for variable in model.weights
    }


def plant_faults(model):
    """A twin, a zero column, a column that repeats one elsewhere, an infinity."""
    import numpy as np

    kernels = [model.get_layer(f"hidden_{i}").kernel for i in range(1, 5)]
    values = [whole(kernel).copy() for kernel in kernels]
    values[1] = -values[0].T
    values[2][:, 3] = 0
    values[2][:, 31] = values[2][:, 5]
    values[3][31, 31] = np.inf
    for kernel, value in zip(kernels, values, strict=True):
        kernel.assign(value)


def findings(table):
    return [[finding.code, finding.path, finding.message] for finding in table.findings]


def look(model):
    """What the tools say of a model, before and after faults are planted in it."""
    import keras_glorot

    seen = {
        "initialized": digests(model),
        "audit": findings(keras_glorot.audit(model)),
        "propagate": keras_glorot.propagate(model, batch()).rows,
        "calibrate": keras_glorot.calibrate(model, batch()).rows,
        "calibrated": digests(model),
    }
    table = keras_glorot.initialize(model, "isometric", seed=1)
    seen["pairs"] = [row["pairs"] for row in table]
    seen["isometric"] = digests(model)
    seen["audit of pairs"] = findings(keras_glorot.audit(model))
    keras_glorot.initialize(model, seed=1)
    plant_faults(model)
    return {**seen, "faults": findings(keras_glorot.audit(model))}


def on_jax(rank):
    import jax
    import keras
    import numpy as np

    import keras_glorot
    from keras_glorot._drawing import distributions

    errors = [
        error_of(keras_glorot.GlorotUniform(), (4, 4)),
        error_of(keras_glorot.GlorotUniform(seed=keras.random.SeedGenerator()), (4, 4)),
        error_of(keras_glorot.initialize, plain_model()),
    ]
    mesh = keras.distribution.DeviceMesh(
        (2, 2), ("batch", "model"), keras.distribution.list_devices()
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = ("batch", "model")
    layouts["head/bias"] = ("batch",)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    model = plain_model()
    drawn, draw = [], distributions.draw

    def recording(*arguments):
        array = draw(*arguments)
        drawn.append(array.size)
        return array

    distributions.draw = recording
    keras_glorot.initialize(model, seed=1)
    distributions.draw = draw
    seen = look(model)
    kernel = model.get_layer("hidden_0").kernel.value
    differs = error_of(keras_glorot.propagate, model, batch() + rank)
    foreign = error_of(
        keras_glorot.initialize,
        model,
        lambda shape, dtype=None: np.full(shape, rank, dtype),
        seed=2,
    )
    return {
        "errors": errors,
        "drawn": drawn,
        "spans": not kernel.is_fully_addressable,
        "is_spread": len({str(shard.index) for shard in kernel.addressable_shards}),
        "other x": differs,
        "other values": foreign,
        "processes": jax.process_count(),
        **seen,
    }


def on_torch(rank):
    import keras
    import torch

    import keras_glorot

    model = plain_model()
    before = digests(model)
    errors = [
        error_of(keras_glorot.GlorotUniform(), (4, 4)),
        error_of(keras_glorot.initialize, model),
        error_of(plain_model, kernel_initializer="xavier_uniform"),
    ]
    assert digests(model) == before
    keras_glorot.initialize(torch.nn.parallel.DistributedDataParallel(model).module, seed=1)
    initialized = digests(model)
    keras.utils.set_random_seed(3)
    seeded = []
    for _ in range(2):
        seeded.append(digests(plain_model(kernel_initializer="xavier_uniform")))
        keras.utils.clear_session()  # which forgets the seed: `random` goes on
    return {"errors": errors, "initialized": initialized, "seeded": seeded}


def on_tensorflow(rank):
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    import keras_glorot

    with strategy.scope():
        model = plain_model(kernel_initializer="xavier_uniform")
    unseeded = digests(model)
    errors = [error_of(keras_glorot.initialize, model)]
    assert digests(model) == unseeded
    keras_glorot.initialize(model, seed=1)
    return {"errors": errors, "unseeded": unseeded, "initialized": digests(model)}


if __name__ == "__main__":
    function, rank, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    join(rank, port)
    print(json.dumps(globals()[function](rank)))
