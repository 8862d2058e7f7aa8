"""`python -m keras_glorot`: as `keras-glorot`, but Keras is imported before all else."""

import sys

from keras_glorot_cli import main

sys.exit(main())
