"""Triton kernels on packed weights of mixed depths 0–8.

`GpuWeight` is the way in.  `layout` says how bits are arranged on the device (`names` tells the
kernels), `part` cuts a weight so, `repack` brings its bits there, `matrix` stacks the parts;
`matvec`, `gemm` and `expand` are the kernels, `launch` their grids and scratch, `plan` and `tune`
choose among them.  The parts that use PTX are in `snippets`, each beside a plain twin, so
that everything also runs in Triton's interpreter and on GPUs of other makers.
"""

from cvxq_kernels.gpu.weight import GpuWeight
from cvxq_kernels.packed import UnsupportedWeightError

__all__ = ["GpuWeight", "UnsupportedWeightError"]
