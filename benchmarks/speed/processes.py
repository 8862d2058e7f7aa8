"""Time and memory of `initialize` and `audit` where a model spans two processes.

    KERAS_BACKEND=jax python benchmarks/speed/processes.py --rank 0 &
    KERAS_BACKEND=jax python benchmarks/speed/processes.py --rank 1

Two kernels of 8192 x 8192 are spread over two processes of this machine with two devices
each. Prints for each process the resident memory, sampled every millisecond, beyond what
it held before, and what stays of it.
"""

import argparse
import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import keras
import numpy as np
from whole_models import measure, resident_bytes

import keras_glorot

GIB = 1 << 30


def spanning_model(side: int) -> keras.Model:
    mesh = keras.distribution.DeviceMesh(
        (2, 2), ("batch", "model"), keras.distribution.list_devices()
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = ("batch", "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    layers = [
        keras.layers.Dense(side, kernel_initializer=keras_glorot.GlorotUniform(seed=seed))
        for seed in range(2)
    ]
    return keras.Sequential([keras.Input((side,)), *layers])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", default="127.0.0.1:29571")
    parser.add_argument("--side", type=int, default=8192)
    options = parser.parse_args()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.address, 2, options.rank)

    def tell(work, seconds, peak, before):
        kept = (resident_bytes() - before) / GIB
        print(
            f"process {options.rank}: {work} {seconds:.2f} s, peak {peak / GIB:.2f} GiB, "
            f"{kept:.2f} GiB stay",
            flush=True,
        )

    np.asarray(jax.jit(lambda: jax.numpy.zeros(8))())  # so that the first start is over
    before = resident_bytes()
    model, seconds, peak = measure(spanning_model, options.side)
    tell("build", seconds, peak, before)
    held = sum(
        shard.data.nbytes
        for layer in model.layers
        for shard in layer.kernel.value.addressable_shards
    )
    print(f"process {options.rank}: its share of the kernels has {held / GIB:.2f} GiB")
    for work, arguments in (
        (keras_glorot.initialize, (model, "xavier_uniform", 0)),
        (keras_glorot.initialize, (model, "xavier_normal", 0)),
        (keras_glorot.audit, (model,)),
        (keras_glorot.audit, (model,)),
    ):
        before = resident_bytes()
        table, seconds, peak = measure(work, *arguments)
        tell(f"{work.__name__} ({len(table.findings)} findings)", seconds, peak, before)
    time.sleep(1)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
