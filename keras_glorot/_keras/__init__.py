"""The door to names that Keras does not export."""
