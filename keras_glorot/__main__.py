"""`python -m keras_glorot`: the command line."""

import sys

from keras_glorot.cli import main

sys.exit(main())
