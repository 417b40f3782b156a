"""The native part of the build; everything else is in pyproject.toml.

The CPU kernels are one shared library of plain C, loaded with ctypes. It is optional: without a C
compiler the package installs and runs through PyTorch. Nothing here depends on the processor of the
machine that builds: functions for one instruction set carry it as an attribute.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kernels/cvxq_kernels/cpu/native")

setup(
    ext_modules=[
        Extension(
            "cvxq_kernels.cpu._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.[hi]*")),
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
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
    ]
)
