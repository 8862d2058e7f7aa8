"""Starts for whole models, by name: `initialize(model, "isometric")`.

A recipe is a function `survey → Starts` and one entry in `RECIPES`. One of your own takes
the place of the name. The survey is the model, looked at once: each of its `weights` has a
`path`, a `shape`, its `fans`, and says whether it `is_kernel`. In a mapping, a recipe
draws a part of them: those that it does not are in the survey's `elsewhere`.

>>> from keras_glorot.recipes import Start, Starts
>>> def fading(survey):
...     "Each kernel a little smaller than the one before."
...     kernels = [weight for weight in survey.weights if weight.is_kernel]
...     starts = {}
...     for place, kernel in enumerate(kernels):
...         initializer = GlorotUniform(gain=0.9**place)
...         starts[id(kernel.variable)] = Start.of(kernel, initializer)
...     return Starts(starts)
>>> [row["done"] for row in initialize(model, fading, seed=0) if row["fan_in"]][:2]
['GlorotUniform', 'GlorotUniform(gain=0.9)']
"""

from collections.abc import Callable

from keras_glorot._models.survey import Survey, Weight
from keras_glorot.recipes._start import Start, Starts
from keras_glorot.recipes.isometric import isometric
from keras_glorot.recipes.pytorch import pytorch

__all__ = ["RECIPES", "Recipe", "Start", "Starts", "Survey", "Weight"]

Recipe = Callable[[Survey], Starts]

RECIPES: dict[str, Recipe] = {"isometric": isometric, "pytorch": pytorch}
