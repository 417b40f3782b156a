"""The native part of the build; everything else is in pyproject.toml.

The CPU kernels are one shared library of plain C, loaded with ctypes. It is optional: without a C
compiler the package installs and runs through PyTorch. Nothing here depends on the processor of the
machine that builds: functions for one instruction set carry it as an attribute. Nor does anything
depend on Python's version, so one wheel serves them all.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/cvxq_kernels/cpu/native")


class BuildLibrary(build_ext):
    """Names the library without the version of Python, whose interface it does not use."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + EXTENSION_SUFFIXES[-1]


class BuildWheel(bdist_wheel):
    """Marks the wheel as one for every Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
    ext_modules=[
        Extension(
            "cvxq_kernels.cpu._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.[hi]*")),
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-g0",  # Python's own flags ask for what would make nine tenths of the library
                "-fvisibility=hidden",
                "-ffp-contract=off",  # every compiler the same sums
                "-fno-math-errno",
                "-pthread",
                "-Wno-psabi",  # vectors are passed between inlined functions only
            ],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ],
)
