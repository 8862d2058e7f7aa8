"""The native kernel; the rest is in pyproject.toml. NumPy draws where this fails."""

import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

# One binary for all Pythons, where Python has such: not yet without a global lock.
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
kernel = Extension(
    "keras_glorot._drawing._native",
    ["keras_glorot/_drawing/_native.c"],
    depends=["keras_glorot/_drawing/_orthogonal.h"],
    extra_compile_args=[
        "-O3",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
    ],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if stable else [],
    py_limited_api=stable,
    optional=True,
)


class HonestWheel(bdist_wheel):
    """Is for any Python and system (`py3-none-any`) where the kernel could not be built."""

    def run(self) -> None:
        self.run_command("build_ext")
        outputs = self.get_finalized_command("build_ext").get_outputs()
        if not all(Path(output).exists() for output in outputs):
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()


setup(
    cmdclass={"bdist_wheel": HonestWheel},
    ext_modules=[kernel],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable else {},
)
