"""How results are shown. Rows come in; nothing here knows a model, or Keras."""

from keras_glorot.tables.findings import Finding, Severity
from keras_glorot.tables.table import Table
from keras_glorot.tables.view import Layout, Row, printable

__all__ = ["Finding", "Layout", "Row", "Severity", "Table", "printable"]
