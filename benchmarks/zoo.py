"""What `calibrate` does to whole networks: signal and gradient from end to end.

    KERAS_BACKEND=torch python benchmarks/zoo.py issue|applications|hub|show [MODEL ...]

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
import json
import math
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Grid

from keras_glorot import GlorotUniform, calibrate, initialize, propagate
from keras_glorot.calibration import measure_ends
from keras_glorot.keras_bridge import sublayers

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


def ends(model, x, training, on_path=None):
    """Signal of the last kernel over the first; gradient of the first over the last."""
    forward, backward, on_path = measure_ends(model, x, training, on_path)
    return [forward, backward], on_path


def calibrated(model, x, training, mode):
    begin = time.process_time()
    table = calibrate(model, x, mode=mode, training=training, verbose=False)
    seconds = time.process_time() - begin
    hidden = [row for row in table.rows[:-1] if row["std"] and row["target"] != "off path"]
    stds = np.array([row["std"] for row in hidden])
    measured, on_path = ends(model, x, training)
    return {
        "ends": measured,
        "spread": [
            float(stds.min() / np.median(stds)),
            float(stds.max() / np.median(stds)),
        ],
        "seconds": seconds,
        "passes": int(table.note.split()[-2]),
        "note": table.note,
        "codes": sorted({finding.code for finding in table.findings}),
    }, on_path


def by_anyinit(build, training, on_path, modes):
    try:
        import anyinit
    except ImportError:
        return None
    results = {}
    for mode in modes:
        model, x = build()
        # It takes no dictionary of inputs, but may take a list.
        batch = list(x.values()) if isinstance(x, dict) else x
        shape = None if isinstance(x, dict) else tuple(x.shape)
        begin = time.process_time()
        try:
            anyinit.initialize(model, mode, shape if mode == "analytic" else batch)
        except Exception as error:
            results[mode] = f"{type(error).__name__}: {error}"[:80]
            continue
        seconds = time.process_time() - begin
        results[mode] = {"ends": ends(model, x, training, on_path)[0], "seconds": seconds}
    return results


def measure(name, build, anyinit_modes):
    """One record: all that is known of a model."""
    record = {"model": name, "backend": keras.backend.backend()}
    keras.utils.set_random_seed(0)
    model, x = build()
    stock = model.get_weights()
    norms = [
        each for each in sublayers(model) if isinstance(each, layers.BatchNormalization)
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
        begin = time.process_time()
        propagate(model, x, training=training)
        result["propagate seconds"] = time.process_time() - begin
        model.set_weights(stock)
        result["stock"] = ends(model, x, training, on_path)[0]
        if not training or not norms:
            result["anyinit"] = by_anyinit(build, training, on_path, anyinit_modes)
        record[view] = result
    return record


def _pair(values):
    if values is None:
        return ""
    return " / ".join(f"{value:.2g}" for value in values)


def _anyinit_pair(results):
    """The better of the two modes: the nearer to 1, in logarithms."""
    if not results:
        return ""
    pairs = [each["ends"] for each in results.values() if isinstance(each, dict)]
    pairs = [p for p in pairs if all(v > 0 and math.isfinite(v) for v in p)]
    if not pairs:
        return "fails"
    return _pair(min(pairs, key=lambda p: sum(abs(math.log(v)) for v in p)))


def show(records):
    grid = Grid(title="signal / gradient from end to end")
    for column in ("model", "norm", "stock", "gain=auto", "AnyInit", "balanced", "product",
                   "ratio", "forward mode", "spread", "passes", "s"):  # fmt: skip
        grid.add_column(column, no_wrap=column == "model")
    for record in records:
        for view in ("-", "identity", "training"):
            if view not in record:
                continue
            result = record[view]
            forward, backward = result["balanced"]["ends"]
            grid.add_row(
                record["model"],
                view,
                _pair(result["stock"]),
                _pair(result["auto"]),
                _anyinit_pair(result.get("anyinit")),
                _pair(result["balanced"]["ends"]),
                f"{forward * backward:.2f}",
                f"{forward / backward:.2g}",
                _pair(result["forward"]["ends"]),
                _pair(result["balanced"]["spread"]),
                str(result["balanced"]["passes"]),
                f"{result['balanced']['seconds']:.0f}",
            )
        if "error" in record:
            grid.add_row(record["model"], "", record["error"])
    Console(width=170).print(grid)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
            done[record["model"], record["backend"]] = record
    if options.group != "show":
        group = GROUPS[options.group]
        backend = keras.backend.backend()
        names = [name for name in options.models or group if (name, backend) not in done]
        with Progress(transient=True) as bar:
            for name in bar.track(names, description=options.group):
                try:
                    record = measure(name, group[name], options.anyinit)
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"[:200]
                    record = {"model": name, "backend": backend, "error": text}
                done[name, backend] = record
                with options.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    show(done.values())


if __name__ == "__main__":
    main()
