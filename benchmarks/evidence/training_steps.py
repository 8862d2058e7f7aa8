"""A process that trains nets with JAX, one after the other.

`Trainer` starts it. It reads pickled requests and writes what came of them. A net is
compiled once, for all starts, seeds and learning rates.
"""

import functools
import os
import pickle
import subprocess
import sys
import time

# On one core, as PyTorch's part.
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
ENVIRONMENT = {"KERAS_BACKEND": "jax", "XLA_FLAGS": ONE_CORE}


class Trainer:
    """Calls the function `train` below in a process of its own."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ENVIRONMENT,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.__exit__(*error)  # closes its input, so that it ends

    def __call__(self, *request):
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


def serve():
    import keras  # here alone with JAX

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not come between the answers
    latest = None
    while True:
        try:
            name, *request = pickle.load(requests)
        except EOFError:
            return
        if name != latest:
            compiled.cache_clear()  # the programs of the net before
            keras.backend.clear_session()
            latest = name
        pickle.dump(train(name, *request), answers)
        answers.flush()


def train(name, weights, rate, x, y, places, held_out):
    """The loss of each update, scores on what was held out, the hint, CPU seconds."""
    import numpy as np

    run, began = compiled(name), time.process_time()
    losses, scores, hint = run(weights, rate, x, y, places, held_out)
    losses, scores = np.asarray(losses), [float(score) for score in scores]
    return losses, scores, float(hint), time.process_time() - began


@functools.lru_cache(maxsize=1)
def compiled(name):
    import adam
    import jax
    from training_nets import NETS

    net = NETS[name]
    model = net.build()
    rest = [variable.value for variable in model.non_trainable_variables]

    def outputs(weights, x):
        # Batch statistics also in the test: the moving ones take more updates than these.
        return model.stateless_call(weights, rest, x, training=True)[0]

    def loss(weights, x, y):
        return net.loss(outputs(weights, x), y)

    def update(x, y, rate, state, places):
        return adam.update(loss, rate, state, jax.tree.map(lambda a: a[places], (x, y)))

    def hint(weights, x, y):
        """The rate at which one signed step moves the outputs by std 1."""
        steps = jax.tree.map(jax.numpy.sign, jax.grad(loss)(weights, x, y))
        moved = jax.jvp(lambda w: outputs(w, x), [weights], [steps])[1]
        return 1 / jax.tree.leaves(moved)[0].std()

    @jax.jit
    def run(weights, rate, x, y, places, held_out):
        """Adam with Keras's defaults."""
        state, losses = jax.lax.scan(
            functools.partial(update, x, y, rate), adam.start(weights), places
        )
        scores = [net.score(outputs(state[0], x), y) for x, y in held_out]
        first = jax.tree.map(lambda a: a[: 2 * places.shape[1]], (x, y))
        return losses, scores, hint(weights, *first)

    return run


if __name__ == "__main__":
    serve()
