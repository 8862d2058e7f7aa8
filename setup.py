"""The native kernel; the rest is in pyproject.toml. NumPy draws where this fails."""

import sysconfig

from setuptools import Extension, setup

# One binary for all Pythons, where Python has such: not yet without a global lock.
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
kernel = Extension(
    "keras_glorot._native",
    ["keras_glorot/_native.c"],
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-trapping-math"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if stable else [],
    py_limited_api=stable,
    optional=True,
)
setup(
    ext_modules=[kernel],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable else {},
)
