"""What several tests ask of drawn weights."""

import math

import keras
import numpy as np

# How many standard errors a drawn std may be off. 5: once in two million.
STANDARD_ERRORS = 5


def assert_drawn(variable, fan_in, fan_out, gain=1.0):
    """The std of a uniformly drawn weight is Glorot's for these fans."""
    values = keras.ops.convert_to_numpy(variable).astype("float64")
    # A sample variance has the relative variance (kurtosis - 1) / n; the kurtosis of a
    # uniform distribution is 9/5, and a std is off by half as much as a variance.
    tolerance = STANDARD_ERRORS * math.sqrt(0.8 / values.size) / 2
    ratio = np.sqrt(np.mean(values**2)) / (gain * math.sqrt(2 / (fan_in + fan_out)))
    assert abs(ratio - 1) < tolerance, f"{variable.path}: std is {ratio} of the right one"
