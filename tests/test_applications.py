"""Every model of `keras.applications`: all kernels have fans, and how many differ.

Protects against architectures that hold a kernel we would miss, and shows what the
package is for: the kernels below are drawn wrongly by stock Keras.
"""

import inspect
import math

import keras
import pytest

from keras_glorot import compute_fans, layer_fans
from keras_glorot._models.survey import Survey

# Model: (kernels, those whose std differs by more than 5 % from stock Keras's).
# All that differ are depthwise, grouped by channel, or halves of separable layers.
KERNELS = {
    "ConvNeXtBase": (113, 36),
    "ConvNeXtLarge": (113, 36),
    "ConvNeXtSmall": (113, 36),
    "ConvNeXtTiny": (59, 18),
    "ConvNeXtXLarge": (113, 36),
    "DenseNet121": (121, 0),
    "DenseNet169": (169, 0),
    "DenseNet201": (201, 0),
    "EfficientNetB0": (82, 16),
    "EfficientNetB1": (116, 23),
    "EfficientNetB2": (116, 23),
    "EfficientNetB3": (131, 26),
    "EfficientNetB4": (161, 32),
    "EfficientNetB5": (195, 39),
    "EfficientNetB6": (225, 45),
    "EfficientNetB7": (274, 55),
    "EfficientNetV2B0": (92, 16),
    "EfficientNetV2B1": (112, 19),
    "EfficientNetV2B2": (117, 20),
    "EfficientNetV2B3": (137, 24),
    "EfficientNetV2L": (340, 61),
    "EfficientNetV2M": (246, 44),
    "EfficientNetV2S": (171, 30),
    "InceptionResNetV2": (245, 0),
    "InceptionV3": (95, 0),
    "MobileNet": (28, 13),
    "MobileNetV2": (53, 17),
    "MobileNetV3Large": (64, 15),
    "MobileNetV3Small": (54, 11),
    "NASNetLarge": (489, 220),
    "NASNetMobile": (357, 160),
    "ResNet101": (105, 0),
    "ResNet101V2": (105, 0),
    "ResNet152": (156, 0),
    "ResNet152V2": (156, 0),
    "ResNet50": (54, 0),
    "ResNet50V2": (54, 0),
    "VGG16": (16, 0),
    "VGG19": (19, 0),
    "Xception": (75, 34),
}
QUICK = {"MobileNetV2", "ResNet50", "Xception"}


def build(name):
    """The model without values: in this scope Keras only notes what it would draw."""
    with keras.StatelessScope(initialize_variables=False):
        return getattr(keras.applications, name)(weights=None)


@pytest.fixture(autouse=True)
def forget_what_was_noted():
    yield
    keras.utils.clear_session(free_memory=False)


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in KERNELS],
)
def test_every_kernel_has_fans(name):
    if name == "NASNetMobile" and keras.backend.backend() == "torch":
        pytest.skip("Keras does not offer it there")
    model = build(name)
    shapes = {w.path: w.shape for w in Survey(model).weights if len(w.shape) >= 2}
    found = layer_fans(model)
    assert found.keys() == shapes.keys()
    differ = 0
    for path, pair in found.items():
        stock = compute_fans(shapes[path])
        differ += abs(math.sqrt(sum(pair) / sum(stock)) - 1) > 0.05
    assert (len(found), differ) == KERNELS[name]


def test_the_table_knows_all_models():
    models = {
        name
        for name, value in vars(keras.applications).items()
        if inspect.isfunction(value)
    }
    assert models == KERNELS.keys()
