"""Products with packed matrices on the CPU, in native code; needs numpy, not PyTorch.

    pool = Pool(threads=2)
    weight = Matrix.from_tensor(reader.read(name), reader.codebook(index), pool=pool)
    y = weight.matmul(x)

`native/` holds the code and how it works (`internal.h`), `loader` finds and declares it, `matrix`
wraps it. Where the library is missing, `is_available()` is false and `why_not()` says what to do.
"""

from cvxq_kernels.cpu.loader import (
    catch_bus_errors,
    crc32,
    force_isa,
    is_available,
    isa,
    why_not,
)
from cvxq_kernels.cpu.matrix import Matrix, Pool
from cvxq_kernels.cpu.self_check import check_kernels

__all__ = [
    "Matrix",
    "Pool",
    "catch_bus_errors",
    "check_kernels",
    "crc32",
    "force_isa",
    "is_available",
    "isa",
    "why_not",
]
