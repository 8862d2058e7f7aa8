"""What `calibrate` does to whole networks: signal and gradient from end to end.

    KERAS_BACKEND=torch python benchmarks/evidence/zoo.py GROUP [MODEL ...]

GROUP is `issue`, `applications`, `hub`; `cost`, which measures passes and seconds alone, on
any backend; or `show`, which writes the report again.

Each model is measured on 8 examples of unit noise (64 px, or the least size that the
architecture takes; token ids for text): as Keras makes it, after `initialize` with
`gain="auto"`, after `calibrate` in two modes, and after AnyInit in its two modes if
`anyinit` is installed. With BatchNormalization as identity (its fresh moving statistics)
and as training sees it.

signal: std of the last kernel's output, before its activation, over the first's; gradient:
that of the first over the last's. These are kernels that the gradient reaches: none before
a softmax, none in branches that LayerScale switches off, and not the classifier. spread:
the least and the largest std of a kernel's output over the median. Each line is appended to
`--output` as soon as it is there, and is not measured again.
"""

import argparse
import functools
import importlib.util
import json
import math
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from keras_glorot import GlorotUniform, calibrate, initialize, propagate
from keras_glorot._keras.tree import Tree
from keras_glorot.tools.calibrate import measure_ends

# fmt: off
ISSUE = [
    "MobileNetV2", "ResNet50", "ResNet50V2", "EfficientNetB0", "Xception", "DenseNet121",
    "VGG16", "VGG19", "InceptionV3", "ConvNeXtTiny",
]
OTHERS = [
    "MobileNet", "MobileNetV3Small", "MobileNetV3Large", "NASNetMobile", "DenseNet169",
    "DenseNet201", "ConvNeXtSmall", "EfficientNetB1", "EfficientNetB2", "EfficientNetB3",
    "EfficientNetB4", "EfficientNetV2B0", "EfficientNetV2B1", "EfficientNetV2B2",
    "EfficientNetV2B3", "EfficientNetV2S", "InceptionResNetV2", "ResNet101",
    "ResNet101V2", "ResNet152", "ResNet152V2",
]
# fmt: on
SIZES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 96, "NASNetMobile": 64}


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def application(name):
    size = SIZES.get(name, 64)
    options = {"weights": None, "input_shape": (size, size, 3)}
    return getattr(keras.applications, name)(**options), noise(8, size, size, 3)


def dense(activation, depth=50):
    model = keras.Sequential([keras.Input((256,))])
    for _ in range(depth):
        model.add(layers.Dense(256, activation))
    model.add(layers.Dense(10))
    return model, noise(256, 256)


def separable():
    model = keras.Sequential([keras.Input((16, 16, 64))])
    for _ in range(20):
        model.add(layers.SeparableConv2D(64, 3, padding="same", activation="tanh"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    return model, noise(8, 16, 16, 64)


def transformer(normalized, blocks=24, width=64):
    def normalize(x):
        return layers.LayerNormalization()(x) if normalized else x

    inputs = x = keras.Input((16, width))
    for _ in range(blocks):
        branch = normalize(x)
        branch = layers.MultiHeadAttention(4, width // 4)(branch, branch)
        x = layers.Add()([x, branch])
        branch = layers.Dense(4 * width, "gelu")(normalize(x))
        x = layers.Add()([x, layers.Dense(width)(branch)])
    x = layers.GlobalAveragePooling1D()(normalize(x))
    return keras.Model(inputs, layers.Dense(10)(x)), noise(16, 16, width)


def gated(blocks=20, width=64):
    inputs = x = keras.Input((width,))
    for _ in range(blocks):
        x = layers.Multiply()([layers.Dense(width, "silu")(x), layers.Dense(width)(x)])
    return keras.Model(inputs, layers.Dense(10)(x)), noise(64, width)


SMALL = {
    "vocabulary_size": 100,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    "max_sequence_length": 16,
}
ROTARY = {
    "vocabulary_size": 100,
    "num_layers": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 64,
}


def _with(options, **changes):
    options = {**options, **changes}
    return {key: value for key, value in options.items() if value is not None}


IMAGE = {"image_shape": (64, 64, 3)}
HUB = {
    "BertBackbone": SMALL,
    "DistilBertBackbone": SMALL,
    "RobertaBackbone": SMALL,
    "GPT2Backbone": SMALL,
    "OPTBackbone": SMALL,
    "AlbertBackbone": _with(SMALL, embedding_dim=16),
    "DebertaV3Backbone": _with(SMALL, bucket_size=8),
    "FNetBackbone": _with(SMALL, num_heads=None),
    "ElectraBackbone": _with(
        SMALL, num_heads=4, vocab_size=100, embedding_dim=32, vocabulary_size=None
    ),
    "GPTNeoXBackbone": SMALL,
    "BloomBackbone": _with(SMALL, max_sequence_length=None),
    "GemmaBackbone": _with(ROTARY, head_dim=8),
    "LlamaBackbone": ROTARY,
    "MistralBackbone": ROTARY,
    "QwenBackbone": ROTARY,
    "Phi3Backbone": ROTARY,
    "ViTBackbone": {
        **IMAGE, "patch_size": 16, "num_layers": 4, "num_heads": 4, "hidden_dim": 32,
        "mlp_dim": 64,
    },
    "ResNetBackbone": {
        **IMAGE, "input_conv_filters": [64], "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 64, 128], "stackwise_num_blocks": [2, 2, 2],
        "stackwise_num_strides": [1, 2, 2], "block_type": "basic_block",
    },
    "DenseNetBackbone": {
        **IMAGE, "stackwise_num_repeats": [4, 4, 4], "compression_ratio": 0.5,
        "growth_rate": 16,
    },
    "MiTBackbone": {
        **IMAGE, "layerwise_depths": [2, 2, 2, 2], "num_layers": 4,
        "layerwise_num_heads": [1, 1, 2, 2], "layerwise_sr_ratios": [8, 4, 2, 1],
        "max_drop_path_rate": 0.1, "layerwise_patch_sizes": [7, 3, 3, 3],
        "layerwise_strides": [4, 2, 2, 2], "hidden_dims": [16, 32, 48, 64],
    },
}  # fmt: skip


def hub(name):
    import keras_hub

    model = getattr(keras_hub.models, name)(**HUB[name])
    inputs = {}
    for key, tensor in model.input.items() if isinstance(model.input, dict) else ():
        shape = (8, *(size or 12 for size in tensor.shape[1:]))
        ids = np.random.default_rng(1).integers(0, 100, shape)
        inputs[key] = ids if "token_ids" in key else np.ones(shape, "int32")
        if "segment" in key:
            inputs[key] = np.zeros(shape, "int32")
    return model, inputs or noise(8, 64, 64, 3)


PLAIN = {
    "50 x Dense(256, gelu)": lambda: dense("gelu"),
    "50 x Dense(256, silu)": lambda: dense("silu"),
    "50 x Dense(256, tanh)": lambda: dense("tanh"),
    "20 x SeparableConv2D(64, tanh)": separable,
    "transformer, 24 blocks, no norm": lambda: transformer(False),
    "transformer, 24 blocks, pre-LN": lambda: transformer(True),
    "20 gated blocks": gated,
}
GROUPS = {
    "issue": {name: lambda name=name: application(name) for name in ISSUE} | PLAIN,
    "applications": {name: lambda name=name: application(name) for name in OTHERS},
    "hub": {name: lambda name=name: hub(name) for name in HUB},
}


COST = [
    "50 x Dense(256, gelu)",
    "MobileNetV2",
    "ResNet50",
    "transformer, 24 blocks, pre-LN",
]
GROUPS["cost"] = {name: GROUPS["issue"][name] for name in COST}


def ends(model, x, training, on_path=None):
    """Signal of the last kernel over the first; gradient of the first over the last."""
    forward, backward, on_path = measure_ends(model, x, training, on_path)
    return [forward, backward], on_path


def seconds_of(work):
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


def passes_of(table):
    return int(table.note.split()[-2])


def calibrated(model, x, training, mode):
    found, seconds = seconds_of(
        lambda: calibrate(model, x, mode=mode, training=training, verbose=False)
    )
    hidden = [row for row in found.rows[:-1] if row["std"] and row["target"] != "off path"]
    stds = np.array([row["std"] for row in hidden])
    stds /= np.median(stds)
    worst = int(np.argmax(np.abs(np.log(stds))))
    measured, on_path = ends(model, x, training)
    return {
        "ends": measured,
        "spread": [float(stds.min()), float(stds.max())],
        "worst": [hidden[worst]["path"], float(stds[worst])],
        "seconds": seconds,
        "passes": passes_of(found),
        "note": found.note,
        "codes": sorted({finding.code for finding in found.findings}),
    }, on_path


def by_anyinit(build, training, on_path, modes):
    if importlib.util.find_spec("anyinit") is None:
        return None
    anyinit = importlib.import_module("anyinit")
    results = {}
    for mode in modes:
        model, x = build()
        # It takes no dictionary of inputs, but may take a list.
        batch = list(x.values()) if isinstance(x, dict) else x
        shape = None if isinstance(x, dict) else tuple(x.shape)
        given = shape if mode == "analytic" else batch
        try:
            _, seconds = seconds_of(
                functools.partial(anyinit.initialize, model, mode, given)
            )
        except Exception as error:
            results[mode] = f"{type(error).__name__}: {error}"[:80]
            continue
        results[mode] = {"ends": ends(model, x, training, on_path)[0], "seconds": seconds}
    return results


def measure_cost(name, build, anyinit_modes):
    """One record: passes and CPU seconds as training sees the model, no figures."""
    keras.utils.set_random_seed(0)
    model, x = build()
    initialize(model, GlorotUniform(gain="auto"), seed=0, verbose=False)
    _, of_propagate = seconds_of(lambda: propagate(model, x, verbose=False))
    found, of_calibrate = seconds_of(lambda: calibrate(model, x, verbose=False))
    peer = by_anyinit(build, True, None, ["empirical"]) if anyinit_modes else None
    return {
        "model": name,
        "backend": keras.backend.backend(),
        "cost": {
            "passes": passes_of(found),
            "calibrate": of_calibrate,
            "propagate": of_propagate,
            "anyinit": peer and peer["empirical"],
        },
    }


def measure(name, build, anyinit_modes):
    """One record: all that is known of a model."""
    record = {"model": name, "backend": keras.backend.backend()}
    keras.utils.set_random_seed(0)
    model, x = build()
    stock = model.get_weights()
    norms = [
        each for each in Tree(model).layers if isinstance(each, layers.BatchNormalization)
    ]
    for training in (False, True) if norms else (True,):
        view = "training" if training else "identity"
        if not norms:
            view = "-"
        result = {}
        for mode in ("balanced", "forward"):
            initialize(model, GlorotUniform(gain="auto"), seed=0, verbose=False)
            result[mode], on_path = calibrated(model, x, training, mode)
        initialize(model, GlorotUniform(gain="auto"), seed=0, verbose=False)
        result["auto"] = ends(model, x, training, on_path)[0]
        show = functools.partial(propagate, model, x, training=training)
        _, result["propagate seconds"] = seconds_of(show)
        model.set_weights(stock)
        result["stock"] = ends(model, x, training, on_path)[0]
        if not training or not norms:
            result["anyinit"] = by_anyinit(build, training, on_path, anyinit_modes)
        record[view] = result
    return record


HEADING = """\
# What `calibrate` does to whole networks: signal / gradient from end to end

Written by `benchmarks/evidence/zoo.py`, which says what is measured. A signal or a
gradient of 1 keeps its scale.

- norm: BatchNormalization as identity or as training sees it; "-": there is none.
- AnyInit: version 0.4.0, the mode whose worse end is nearer to 1.
- product: signal times gradient in balanced mode, to be in [0.5, 2].
- ratio: signal over gradient. It belongs to the structure: both can be in [0.5, 2] only
  where it is in [0.25, 4].
- spread: the least and the largest std of a kernel's output over the median; worst: the
  kernel that is furthest from it.
- passes, s: of `calibrate`, in CPU seconds on one thread.
- missed: the bounds that do not hold: `product`; `each` of the two in [0.5, 2], if the
  ratio allows it; `forward` mode's signal in [0.8, 1.25]; `spread` within a factor of 4;
  `peer`: of AnyInit's two, the worse is nearer to 1.

Why bounds are missed:

- `spread` in gated blocks: a gate multiplies two functions of its input, so the sum of
  both gradients doubles at each of the 20 on the way back, whatever the factors: the ratio
  is near 1e-6. A product of 1 then asks for a signal of 1e-3 from end to end, and a
  factor of 4 to both sides of the median allows 1/16 at the least. No scale meets both.
- `each` in ResNet50 and Bloom: the limit is missed by 0.3 % and 1.1 %, less than the 2 %
  at which the passes stop. One more pass gives ResNet50 1.95 / 0.53.
- `spread` in ViT, probably: its first kernel stays in proportion to the positions added
  to it.
- `spread` in ResNet152 and EfficientNetV2S: with a ratio below 0.002, ends within a factor
  of 4 to both sides of the median can't bring the product to 2. In ResNet101 and the other
  EfficientNetV2 the ratio is 0.003: `calibrate` brings the product to 1.4, and one end is
  up to 4.5 times off.
- `spread` in EfficientNetB2: the others have a std of 7, the level at which the gradient
  changes least; kernels before a sigmoid have 1.
"""
COST_HEADING = """
Passes and CPU seconds of `calibrate` (balanced) by backend, with what JAX needs to compile,
beside `propagate`, which is one pass:
"""


def _pair(values):
    return "" if values is None else " / ".join(f"{value:.2g}" for value in values)


def _off(pair):
    """How far the worse of the two is from 1, in logarithms."""
    return max(abs(math.log(value)) for value in pair)


def _anyinit_pair(results):
    """The better of the modes: None if none gives a number."""
    pairs = [each["ends"] for each in results.values() if isinstance(each, dict)]
    pairs = [p for p in pairs if all(v > 0 and math.isfinite(v) for v in p)]
    return min(pairs, key=_off, default=None)


def _peer_text(results):
    return (_pair(_anyinit_pair(results)) or "fails") if results else ""


def _missed(result):
    forward, backward = result["balanced"]["ends"]
    low, high = result["balanced"]["spread"]
    allowed = 0.25 <= forward / backward <= 4
    peer = _anyinit_pair(result.get("anyinit") or {})
    holds = {
        "product": 0.5 <= forward * backward <= 2,
        "each": not allowed or all(0.5 <= value <= 2 for value in (forward, backward)),
        "forward": 0.8 <= result["forward"]["ends"][0] <= 1.25,
        "spread": low >= 0.25 and high <= 4,
        "peer": not peer or _off((forward, backward)) <= _off(peer),
    }
    return ", ".join(name for name, is_held in holds.items() if not is_held)


def _views(records):
    for record in records:
        for view in ("-", "identity", "training"):
            if view in record:
                yield record, view, record[view]


def ends_table(records):
    for record, view, result in _views(records):
        forward, backward = result["balanced"]["ends"]
        path, times = result["balanced"]["worst"]
        yield {
            "model": record["model"],
            "norm": view,
            "stock": _pair(result["stock"]),
            'gain="auto"': _pair(result["auto"]),
            "AnyInit": _peer_text(result.get("anyinit")),
            "balanced": _pair((forward, backward)),
            "product": f"{forward * backward:.2f}",
            "ratio": f"{forward / backward:.2g}",
            "forward mode": _pair(result["forward"]["ends"]),
            "spread": _pair(result["balanced"]["spread"]),
            "worst": f"{path}, {times:.2g}",
            "passes": result["balanced"]["passes"],
            "s": f"{result['balanced']['seconds']:.1f}",
            "missed": _missed(result),
        }


def cost_table(records):
    for record in records:
        cost = record["cost"]
        peer = cost["anyinit"]
        seconds = f"{peer['seconds']:.1f}" if isinstance(peer, dict) else "fails"
        yield {
            "model": record["model"],
            "backend": record["backend"],
            "passes": cost["passes"],
            "calibrate s": f"{cost['calibrate']:.1f}",
            "propagate s": f"{cost['propagate']:.1f}",
            "AnyInit empirical s": "" if peer is None else seconds,
        }


def table(lines):
    lines = list(lines)
    rows = [list(lines[0]), ["---"] * len(lines[0])] if lines else []
    rows += [line.values() for line in lines]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def report(records):
    records = list(records)
    failed = [
        f"- {record['model']} ({record['backend']}): {record['error']}"
        for record in records
        if "error" in record
    ]
    whole = [record for record in records if not {"cost", "error"} & set(record)]
    costs = [record for record in records if "cost" in record]
    lines = [HEADING, *table(ends_table(whole)), COST_HEADING, *table(cost_table(costs))]
    lines += ["", "Not measured:", "", *failed] if failed else []
    return "\n".join([*lines, ""])


def key_of(record):
    return record["model"], record["backend"], "cost" in record


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("group", choices=[*GROUPS, "show"])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "zoo.jsonl")
    parser.add_argument(
        "--anyinit",
        nargs="*",
        choices=["analytic", "empirical"],
        default=["analytic", "empirical"],
        help="its modes; the empirical one takes minutes on deep networks",
    )
    options = parser.parse_args()
    done = {}
    if options.output.exists():
        for line in options.output.read_text().splitlines():
            record = json.loads(line)
            done[key_of(record)] = record
    if options.group != "show":
        group = GROUPS[options.group]
        backend = keras.backend.backend()
        is_cost = options.group == "cost"
        work = measure_cost if is_cost else measure
        names = options.models or list(group)
        names = [name for name in names if (name, backend, is_cost) not in done]
        with Progress(transient=True) as bar:
            for name in bar.track(names, description=options.group):
                try:
                    record = work(name, group[name], options.anyinit)
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"[:200]
                    record = {"model": name, "backend": backend, "error": text}
                done[name, backend, is_cost] = record
                with options.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    text = report(done.values())
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    Console().print(Markdown(text))


if __name__ == "__main__":
    main()
