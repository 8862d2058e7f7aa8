"""`calibrate` on 40 small networks, told on a batch that it never saw.

    KERAS_BACKEND=torch python benchmarks/evidence/zoo.py  # goes on where it ended

Signal and gradient are measured by PyTorch's autograd, with nothing of the package: the
std of what each kernel puts out, and the length of the gradient there of `sum(c * outputs)`
with a random c. Both are told from the first kernel to the last, by straight lines through
their logarithms, without the outputs of the model and, in residual nets, the ends of
branches and the first kernel: these have the gradient of the whole sum. The
product of both is to be in [0.5, 2], or `calibrate` has to leave the kernels as they were.
AnyInit 0.4.0 is a peer to compare with (`pip install anyinit==0.4.0`), by its analytic
mode: the empirical one leaves these chains as they are.
"""

import importlib.util
import math
import time
from pathlib import Path

import keras
import numpy as np
import torch
from keras import layers, ops

from keras_glorot import calibrate, propagate

KERNELS = (layers.Dense, layers.Conv2D, layers.SeparableConv2D, layers.DepthwiseConv2D)


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def chain(make, shape, depth, activation, normalize=None, pool=False):
    """Activations are layers of their own, so that a hook sees what a kernel puts out."""
    model = keras.Sequential([keras.Input(shape)])
    for _ in range(depth):
        model.add(make())
        if normalize:
            model.add(normalize())
        model.add(layers.Activation(activation))
    if pool:
        model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10, name="head"))
    return model


def dense(activation, depth):
    return lambda: chain(lambda: layers.Dense(64), (64,), depth, activation)


def conv(activation, depth, make=layers.Conv2D, normalize=None):
    def kernel():
        return make(32, 3, padding="same")

    return lambda: chain(kernel, (12, 12, 8), depth, activation, normalize, pool=True)


def blocks(count, block, shape, normalize):
    def build():
        inputs = x = keras.Input(shape)
        x = layers.Dense(shape[-1], name="sum")(x)
        for i in range(count):
            x = block(layers.LayerNormalization()(x) if normalize else x, x, i)
        x = layers.GlobalAveragePooling1D()(x) if len(shape) == 2 else x
        return keras.Model(inputs, layers.Dense(10, name="head")(x))

    return build


def perceptron(h, x, i):
    h = layers.Activation("gelu")(layers.Dense(4 * x.shape[-1])(h))
    return x + layers.Dense(x.shape[-1], name=f"end{i}")(h)


def transformer(h, x, i):
    x = x + layers.MultiHeadAttention(4, x.shape[-1] // 4, name=f"end_of_attention{i}")(
        h, h
    )
    return perceptron(x, x, i)


def gated(h, x, i):
    gate = layers.Activation("silu")(layers.Dense(128)(h))
    return layers.Dense(x.shape[-1])(gate * layers.Dense(128)(h))


def highway(h, x, i):
    gate = ops.sigmoid(layers.Dense(x.shape[-1])(h))
    return gate * ops.relu(layers.Dense(x.shape[-1])(h)) + (1 - gate) * x


def square(z):
    return ops.relu(z) ** 2


ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "selu", "elu")
NETS = {
    **{f"{n} x Dense, {f}": dense(f, n) for f in ACTIVATIONS for n in (12, 30, 60)},
    **{f"{n} x Conv2D, {f}": conv(f, n) for f in ("relu", "gelu", "tanh") for n in (8, 16)},
    "12 x SeparableConv2D, tanh": conv("tanh", 12, layers.SeparableConv2D),
    "12 x Conv2D, BatchNorm, relu": conv("relu", 12, normalize=layers.BatchNormalization),
    "12 x Dense, softplus": dense("softplus", 12),
    "12 x Dense, sigmoid": dense("sigmoid", 12),
    "12 x Dense, relu squared": dense(square, 12),
    **{
        f"{n} residual blocks{', LayerNorm' * norm}": blocks(n, perceptron, (64,), norm)
        for n in (6, 24)
        for norm in (False, True)
    },
    **{
        f"{n} transformer blocks{', LayerNorm' * norm}": blocks(
            n, transformer, (8, 32), norm
        )
        for n in (4, 12)
        for norm in (False, True)
    },
    "4 gated layers": blocks(4, gated, (64,), False),
    "20 gated layers": blocks(20, gated, (64,), False),
    "50 highway layers": blocks(50, highway, (64,), False),
}


def by_hooks(model, x):
    """Change of the signal forward and of the gradient back, from first kernel to last."""
    seen = []

    def hooked(call):
        def hooked_call(*args, **kwargs):
            output = call(*args, **kwargs)
            output.retain_grad()
            seen.append(output)
            return output

        return hooked_call

    hidden = [each for each in model.layers if isinstance(each, KERNELS)]
    hidden = [each for each in hidden if not each.name.startswith(("sum", "end", "head"))]
    for layer in hidden:
        layer.call = hooked(layer.call)
    outputs = model(
        torch.tensor(x), training=any("batch" in each.name for each in model.layers)
    )
    outputs.backward(torch.tensor(noise(9, *outputs.shape)))
    for layer in hidden:
        del layer.call
    s = np.log([float(z.detach().std()) for z in seen])
    g = np.log([float(z.grad.norm()) for z in seen])
    rise = (len(s) - 1) * np.polyfit(range(len(s)), np.stack([s, -g], 1), 1)[0]
    return np.exp(rise)


def by_peer(build, x, fresh):
    """The product after AnyInit."""
    if not importlib.util.find_spec("anyinit"):
        return "—"
    import anyinit

    keras.utils.set_random_seed(0)
    model = build()
    try:
        anyinit.initialize(model, "analytic", x, seed=0)
    except Exception:  # of another package: anything
        return "fails"
    return f"{math.prod(by_hooks(model, fresh)):.2g}"


def measure(name, build):
    keras.utils.set_random_seed(0)
    model = build()
    shape = model.input_shape[1:]
    x, fresh = noise(1, 64, *shape), noise(2, 64, *shape)
    with np.errstate(all="ignore"):
        before = by_hooks(model, fresh)
        start = time.process_time()
        propagate(model, x, verbose=False)
        middle = time.process_time()
        table = calibrate(model, x, verbose=False)
        seconds = time.process_time() - middle
        after = by_hooks(model, fresh)
        peer = by_peer(build, x, fresh)
    is_left = all(row["factor"] == 1 for row in table)
    found = any(each.code == "unreached" for each in table.findings)
    state = "scaled" if not is_left else "refused" if found else "left"
    passes = table.note.split()[-1].rstrip(".")
    product = math.prod(after)
    ok = "yes" if 0.5 <= product <= 2 or state == "refused" else "no"
    cost = seconds / (middle - start)
    pairs = [" / ".join(f"{each:.2g}" for each in pair) for pair in (before, after)]
    after = pairs[1], f"{product:.2g}", ok
    cells = name, pairs[0], state, *after, peer, passes, f"{cost:.1f}"
    return f"| {' | '.join(map(str, cells))} |"


def main():
    lines = [f"# `calibrate` on {len(NETS)} small networks", ""]
    lines += [*(__doc__ or "").strip().splitlines()[4:], ""]
    lines += [
        "Passes are over half of the batch; cost: CPU time over that of `propagate`.",
        "",
    ]
    lines += ["| net | before: signal / gradient | kernels | after | product | holds "
              "| AnyInit's product | passes | cost |", "|" + " --- |" * 9]  # fmt: skip
    path = Path(__file__).with_suffix(".md")
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {line.split(" | ")[0]: line for line in old if line.startswith("| ")}
    for name, build in NETS.items():
        lines.append(done.get(f"| {name}") or measure(name, build))
        print(lines[-1], flush=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
