"""Starts for whole models, by name: `initialize(model, "isometric")`.

A recipe is a function `survey → Starts` and one entry here.
"""

from collections.abc import Callable

from keras_glorot._models.survey import Survey
from keras_glorot.recipes._start import Start, Starts
from keras_glorot.recipes.isometric import isometric
from keras_glorot.recipes.pytorch import pytorch

__all__ = ["RECIPES", "Recipe", "Start", "Starts"]

Recipe = Callable[[Survey], Starts]

RECIPES: dict[str, Recipe] = {"isometric": isometric, "pytorch": pytorch}
