"""Tools for whole models: each module has the name of its function."""
