"""The guide "Which weight gets what": its starts are those that authors state."""

import copy
import importlib
import json
import math
import re
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_glorot import initialize
from keras_glorot._models.survey import Survey

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # KerasHub's imports are not ours to mend
]


def values(model):
    return {
        weight.path: np.array(keras.ops.convert_to_numpy(weight.variable))
        for weight in Survey(model).weights
    }


def guide(start):
    """What the block of the guide that begins like this leaves behind."""
    pytest.importorskip("keras_hub")
    text = (ROOT / "docs" / "guides" / "which-weight.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (block,) = [block for block in blocks if start in block]
    names = {"__name__": "docs"}
    exec(compile(block, "docs", "exec"), names)
    return names


def check(model, stated):
    """Each weight has the std of the first pattern that is found in its path."""
    for path, array in values(model).items():
        std = next(std for pattern, std in stated.items() if re.search(pattern, path))
        # The relative variance of a normal sample's variance is 2 / n; five stds of it.
        tolerance = 5 / math.sqrt(2 * array.size)
        assert np.sqrt(np.mean(array**2)) == pytest.approx(std, rel=tolerance), path


def test_gpt2():
    """Radford et al. 2019, section 2.3, and `src/model.py` of openai/gpt-2."""
    model = guide("GPT2Backbone")["gpt2"]
    residual = 0.02 / math.sqrt(2 * 4)
    check(
        model,
        {
            "token_embedding": 0.02,
            "position_embedding": 0.01,
            "gamma": 1,
            "bias|beta": 0,
            "attention_output|feedforward_output": residual,
            "query|key|value|feedforward_intermediate": 0.02,
        },
    )


def test_vit():
    """`vit_jax/models_vit.py` of google-research/vision_transformer."""
    model = guide("ViTBackbone")["vit"]
    check(
        model,
        {
            "class_token": 0,
            "position_embedding": 0.02,
            "gamma": 1,
            "mlp.*bias": 1e-6,
            "bias|beta": 0,
            "patch_embedding": math.sqrt(1 / (8 * 8 * 3)),
            "mha": math.sqrt(2 / (64 + 64)),
            "mlp": math.sqrt(2 / (64 + 128)),
        },
    )


def backbones():
    """Those small ones that a test of KerasHub builds and that LoRA has names for."""
    lines = (ROOT / "benchmarks" / "evidence" / "model_zoo.jsonl").read_text("utf-8")
    for line in lines.splitlines():
        entry = json.loads(line)
        module, _, name = entry["class"].rpartition(".")
        arguments = keras.saving.deserialize_keras_object(copy.deepcopy(entry["arguments"]))
        yield getattr(importlib.import_module(module), name)(**arguments)


def test_the_pattern_for_lora_changes_nothing_else():
    """Bit by bit, in twenty backbones of KerasHub."""
    pytest.importorskip("keras_hub")
    seen = 0
    for backbone in backbones():
        backbone.enable_lora(2)
        before = values(backbone)
        factors = {path for path in before if "lora_kernel_a" in path}
        if factors:
            initialize(backbone, {"lora_kernel_a": "xavier_uniform"}, seed=seen)
            after = values(backbone)
            same = {path for path in before if np.array_equal(before[path], after[path])}
            assert same == before.keys() - factors, type(backbone).__name__
            seen += 1
        if seen == 20:
            return
    pytest.fail(f"only {seen} backbones have LoRA")
