"""`calibrate`: both of Glorot's constraints, held on the whole network by measurement."""

import contextlib
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot.keras_bridge import sublayers
from keras_glorot.recording import _DIFFERENTIATE, _LOOPS, _call, _checked, _target, moments
from keras_glorot.variables import describe

ops: Any = keras.ops
tree: Any = keras.tree


class Site(NamedTuple):
    """A layer whose kernels share a factor."""

    path: str
    layer: Any  # the one that is called
    owner: Any  # the one that holds kernels and activation
    kernels: tuple
    fixed: bool  # forward only


def _sites(model):
    weights = describe(model)
    loops = {}
    for layer in sublayers(model):
        if isinstance(layer, _LOOPS):
            loops = {id(inner): layer for inner in sublayers(layer)} | loops
    by_owner, owners = {}, {}
    for weight in weights:
        owner, variable = weight.owner, weight.variable
        if owner is None or not weight.is_kernel:
            continue
        if weight.distribution is not None and weight.distribution.form == "constant":
            continue
        by_owner.setdefault(id(owner), []).append(variable)
        owners[id(owner)] = owner
    sites = []
    for key, kernels in by_owner.items():
        owner = owners[key]
        layer = loops.get(key, owner)
        if isinstance(layer, keras.layers.RNN) or not owner.trainable:
            continue
        name = owner.name
        gate = getattr(getattr(owner, "activation", None), "__name__", "")
        fixed = gate in ("sigmoid", "hard_sigmoid") or "query" in name or "key" in name
        sites.append(Site(kernels[0].path, layer, owner, tuple(kernels), fixed))
    return sites


class Pass:
    """One pass: each kernel is rescaled as its layer is called; gradients come back."""

    def __init__(self, model, x, y=None, loss=None, seed=0, training=True):
        self.model, self.loss, self.seed, self.training = model, loss, seed, training
        self.x, self.y = _checked(x, y, loss)
        self.sites = _sites(model)
        self.variables = model.variables
        self.passes = 0

    def run(self, targets):
        """Log targets of the sites -> per call (site, std before, gradient std, size); factors"""
        self.passes += 1
        info = []

        def run(new_probe, values, x):
            info.clear()
            stats, factors, raws = [], {}, []

            @ops.custom_gradient
            def identity(tensor, probe):
                def gradient(*args, upstream=None):
                    upstream = args[0] if upstream is None else upstream
                    return upstream, moments(upstream)

                return tensor, gradient

            scope = keras.StatelessScope(zip(self.variables, values, strict=True))

            def tap(z, i):
                info.append((i, int(np.prod(z.shape))))
                stats.append(moments(ops.stop_gradient(z)))
                return identity(z, new_probe(2))

            @contextlib.contextmanager
            def listen(i, site):
                layer, owner = site.layer, site.owner
                attributes = vars(layer)
                call = layer.call
                before = dict(attributes)

                def listening(*args, **kwargs):
                    biases = [
                        v for v in owner.weights if v.name == "bias"
                    ]
                    held = [(b, scope.get_current_value(b)) for b in biases]
                    activation = getattr(owner, "activation", None)
                    if callable(activation):
                        vars(owner)["activation"] = keras.activations.linear
                    for b, value in held:
                        scope.add_update((b, ops.zeros_like(value)))
                    try:
                        z = call(*args, **kwargs)
                    finally:
                        for update in held:
                            scope.add_update(update)
                        if callable(activation):
                            vars(owner)["activation"] = activation
                    first = tree.flatten(z)[0]
                    raw = moments(ops.stop_gradient(first))[1]
                    if i not in factors:
                        f = ops.where(raw > 0, ops.exp(targets[i]) / raw, 1.0)
                        factors[i] = ops.stop_gradient(f)
                        for kernel in site.kernels:
                            value = scope.get_current_value(kernel)
                            power = factors[i] ** (1 / len(site.kernels))
                            scope.add_update((kernel, value * ops.cast(power, value.dtype)))
                    raws.append(raw)
                    index = len(raws)
                    if callable(activation):
                        done = []

                        def tapped(z, *a, **k):
                            if not done:
                                done.append(True)
                                z = tap(z, i)
                            return activation(z, *a, **k)

                        vars(owner)["activation"] = tapped
                        try:
                            return call(*args, **kwargs)
                        finally:
                            vars(owner)["activation"] = activation
                    outputs = call(*args, **kwargs)
                    flat = tree.flatten(outputs)
                    flat[0] = tap(flat[0], i)
                    return tree.pack_sequence_as(outputs, flat)

                attributes["call"] = listening
                try:
                    yield
                finally:
                    del attributes["call"]
                    if "call" in before:
                        attributes["call"] = before["call"]

            @contextlib.contextmanager
            def batch_statistics(layer):
                attributes = vars(layer)
                call = layer.call

                def in_training(*args, **kwargs):
                    kwargs["training"] = True
                    return call(*args, **kwargs)

                attributes["call"] = in_training
                try:
                    yield
                finally:
                    del attributes["call"]

            with scope, contextlib.ExitStack() as stack:
                for i, site in enumerate(self.sites):
                    stack.enter_context(listen(i, site))
                if self.training:
                    for layer in sublayers(self.model):
                        if isinstance(layer, keras.layers.BatchNormalization):
                            stack.enter_context(batch_statistics(layer))
                outputs = _call(self.model, x)
            ordered = [factors.get(i, ops.ones(())) for i in range(len(self.sites))]
            return _target(outputs, self.y, self.loss, self.seed), (stats, ops.stack(ordered))

        values = [v.value for v in self.variables]
        differentiate = _DIFFERENTIATE[keras.backend.backend()]
        (stats, factors), gradients = differentiate(run, values, self.x)
        s = np.array([ops.convert_to_numpy(t)[1] for t in stats], float)
        g = np.array([ops.convert_to_numpy(t)[1] for t in gradients], float)
        calls = np.array([i for i, _ in info])
        sizes = np.array([n for _, n in info], float)
        return calls, s, g, sizes, np.asarray(ops.convert_to_numpy(factors), float)


_WEIGHTS = {"forward": 0.0, "balanced": 0.5, "backward": 1.0}


def calibrate(model, x, y=None, loss=None, *, mode="balanced", layers=None, seed=0,
              verbose="auto", level=1.0, passes=8, training=True):  # fmt: skip
    """PROTOTYPE. Scales each kernel by one factor, in place; returns what was measured.

    `mode`: "forward", "balanced", "backward", or a number between: weight of the gradient.
    `level`: geometric mean of the std of the kernels' outputs (pre-activation).
    """
    weight = _WEIGHTS.get(mode, mode)
    p = Pass(model, x, y, loss, seed, training)
    n = len(p.sites)
    base = np.full(n, np.log(level), "float32")
    targets, best = base, (np.inf,)
    for _ in range(passes):
        calls, s, g, sizes, factors = p.run(targets)
        rows = _balance(p.sites, calls, s, g, sizes)
        S, G = rows["s"], rows["g"]
        fit = (1 - weight) * np.var(S) + weight * np.var(G)
        if fit < best[0] * 0.98 or weight == 0:
            best = (fit, targets, factors, rows, (calls, s, g))
        if weight == 0 or len(S) < 2:
            break
        want = weight * (S + G - G.mean())
        want += np.log(level) - want.mean()
        ratio = abs((S[0] + G[0]) - (S[-1] + G[-1]))  # the structure's
        limit = max(np.log(4) * 0.95, ratio * weight * 0.6)
        want = np.clip(want, np.median(want) - limit, np.median(want) + limit)
        new = base.copy()
        new[rows["i"]] = want
        if np.abs(new - targets).max() < 0.03:
            break
        targets = new
    _, targets, factors, rows, (calls, s, g) = best
    for site, factor in zip(p.sites, factors, strict=True):
        for kernel in site.kernels:
            kernel.assign(kernel.value * float(factor) ** (1 / len(site.kernels)))
    F = float(np.exp(rows["s"][-1] - rows["s"][0]))
    B = float(np.exp(rows["g"][0] - rows["g"][-1]))
    return {"forward": F, "backward": B, "factors": factors, "targets": np.exp(targets),
            "paths": [site.path for site in p.sites], "passes": p.passes}  # fmt: skip


def _balance(sites, calls, s, g, sizes):
    """Log std of the signal and of the gradient of the kernels that the gradient reaches.

    Off the path: where less than a hundredth of it comes by.
    """
    share = s * g * np.sqrt(sizes)
    left = np.maximum.accumulate(share)
    right = np.maximum.accumulate(share[::-1])[::-1]
    on = (share > 0.01 * np.minimum(left, right)) & (g > 0) & (s > 0)
    order, S, G = [], {}, {}
    last = calls[-1]
    for k, i in enumerate(calls):
        if on[k] and not sites[i].fixed and i != last:
            if i not in S:
                order.append(i)
            S.setdefault(i, []).append(np.log(s[k]))
            G.setdefault(i, []).append(np.log(g[k]))
    return {"i": order, "s": np.array([np.mean(S[i]) for i in order]),
            "g": np.array([np.mean(G[i]) for i in order])}  # fmt: skip
