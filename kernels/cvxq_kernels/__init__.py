"""Operations on weights that stay packed in memory.

`PackedWeight` holds one quantized matrix as its file stores it; each folder is one operation:
`dequantize` expands codes to weights.  Triton is imported by the launchers that use it, never
by this package, so that a machine without it can load the CPU paths.
"""

from cvxq_kernels.packed import PackedWeight

__all__ = ["PackedWeight"]
