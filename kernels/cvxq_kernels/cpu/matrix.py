"""A packed or dense weight matrix in native memory, and the threads that work on it."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from cvxq_format import Codebook, CompandedTensor

from cvxq_kernels.cpu.loader import Companded, native
from cvxq_kernels.cpu.processors import available_processors
from cvxq_kernels.tables import decoding_tables

Floats = npt.NDArray[np.float32]
# A tensor, its codebook, its bias, and the file for its codes: what `Matrix.from_tensor` takes.
Source = tuple[CompandedTensor, Codebook, npt.NDArray[Any] | None, int]

_DENSE_TYPES = {"uint16": 0, "float16": 1, "float32": 2}  # numpy's name: the C enumeration


class Pool:
    """Threads, the caller's among them, that work on one product at a time.

    threads: how many, 1 or more. Raises ValueError for less, MemoryError if they do not start.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a pool of {threads} threads, allowed 1 or more")
        library = native()
        handle = library.cvxq_pool_new(threads)
        if not handle:
            raise MemoryError(f"{threads} threads could not be started; use fewer")
        self.handle = ctypes.c_void_p(handle)
        self._free = weakref.finalize(self, library.cvxq_pool_free, handle)

    def close(self) -> None:
        """End the threads; the pool must not be used afterwards."""
        self._free()


@cache
def default_pool() -> Pool:
    """The pool that is used when none is given: a thread for each processor allowed to us."""
    return Pool(available_processors())


class Matrix:
    """One weight W (N, K) in native memory; made by `from_tensor` or `from_dense`."""

    def __init__(self, handle: int, pool: Pool) -> None:
        library = native()
        self.handle = ctypes.c_void_p(handle)
        self.pool = pool
        self.shape = (library.cvxq_matrix_outputs(handle), library.cvxq_matrix_inputs(handle))
        self.nbytes = int(library.cvxq_matrix_bytes(handle))
        weakref.finalize(self, library.cvxq_matrix_free, handle)

    @classmethod
    def from_tensor(
        cls,
        tensor: CompandedTensor,
        codebook: Codebook,
        bias: npt.NDArray[Any] | None = None,
        pool: Pool | None = None,
        scratch: int = -1,
    ) -> Matrix:
        """Repack a tensor read from a file; nothing of it is needed afterwards.

        The pages of the file that held the codes are given back to the system. bias: (N,), added
        to every product. scratch: descriptor of a file that is to hold the repacked codes instead
        of memory, it only grows and may be closed afterwards. Raises ValueError for stacked experts
        or a bias of another shape, MemoryError where memory or disk is short.
        """
        pool = pool or default_pool()
        source, _arrays = _describe(tensor, codebook, bias, scratch)
        handle = native().cvxq_matrix_pack(pool.handle, ctypes.byref(source))
        return cls._of(handle, tensor, pool)

    @classmethod
    def from_tensors(cls, sources: Sequence[Source], pool: Pool) -> list[Matrix]:
        """Repack many, each as `from_tensor` does and by one thread: put the largest first.

        One call that lets other threads of Python run. Raises as `from_tensor` does.
        """
        described = [_describe(*source) for source in sources]
        structures = (Companded * len(sources))(*(structure for structure, _ in described))
        handles = (ctypes.c_void_p * len(sources))()
        native().cvxq_matrices_pack(pool.handle, structures, len(sources), handles)
        return [cls._of(h, source[0], pool) for h, source in zip(handles, sources, strict=True)]

    @classmethod
    def _of(cls, handle: int | None, tensor: CompandedTensor, pool: Pool) -> Matrix:
        """What was made of a tensor."""
        if not handle:
            raise MemoryError(
                f"no memory for a weight {tensor.shape}, or its sizes contradict it; free some"
            )
        return cls(handle, pool)

    @classmethod
    def from_dense(
        cls,
        array: npt.NDArray[Any],
        bias: npt.NDArray[Any] | None = None,
        pool: Pool | None = None,
    ) -> Matrix:
        """Copy a matrix (N, K) that a file keeps raw: float16, float32, or uint16 for bfloat16."""
        kind = _DENSE_TYPES.get(array.dtype.name)
        if kind is None or array.ndim != 2:
            raise ValueError(
                f"a dense weight {array.shape} of {array.dtype}, "
                "allowed (N, K) of float16, float32, or uint16 for bfloat16"
            )
        pool = pool or default_pool()
        dense = np.ascontiguousarray(array)
        held = _bias(bias, array.shape[0])
        handle = native().cvxq_matrix_dense(
            pool.handle, dense.ctypes.data, kind, *array.shape, _address(held)
        )
        if not handle:
            raise MemoryError(f"no memory for a weight {array.shape}; free some")
        return cls(handle, pool)

    def matmul(self, x: npt.NDArray[Any], exact: bool = False) -> Floats:
        """Return x (M, K) · Wᵀ + bias as (M, N) float32; exact: float32 products throughout."""
        return matmul_many([self], x, exact, self.pool)[0]

    def rows(self, ids: npt.NDArray[Any] | Sequence[int]) -> Floats:
        """Return rows `ids` of W as (len(ids), K) float32, equal to the file's bit for bit."""
        wanted = np.ascontiguousarray(ids, np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.shape[0]):
            raise IndexError(
                f"row ids span {wanted.min()}..{wanted.max()}, allowed 0..{self.shape[0] - 1}"
            )
        out = np.empty((wanted.size, self.shape[1]), np.float32)
        native().cvxq_rows(
            self.pool.handle, self.handle, wanted.ctypes.data, wanted.size, out.ctypes.data
        )
        return out


def matmul_many(
    weights: Sequence[Matrix],
    x: npt.NDArray[Any],
    exact: bool = False,
    pool: Pool | None = None,
    out: Sequence[Floats] | None = None,
) -> list[Floats]:
    """Return the products of x (M, K) with matrices of the same K, computed in one go.

    out: arrays (M, N) float32 to write to, in place of new ones.
    """
    inputs = weights[0].shape[1]
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 2 or any(w.shape[1] != x.shape[1] for w in weights):
        raise ValueError(f"inputs {x.shape} for weights with K = {inputs}, allowed (M, {inputs})")
    results = list(out or (np.empty((len(x), w.shape[0]), np.float32) for w in weights))
    handles = (ctypes.c_void_p * len(weights))(*(w.handle.value for w in weights))
    targets = (ctypes.c_void_p * len(weights))(*(y.ctypes.data for y in results))
    native().cvxq_matmul(
        (pool or weights[0].pool).handle,
        handles,
        len(weights),
        x.ctypes.data,
        len(x),
        targets,
        int(exact),
    )
    return results


def _bias(bias: npt.NDArray[Any] | None, outputs: int) -> Floats | None:
    if bias is None:
        return None
    if bias.shape != (outputs,):
        raise ValueError(f"a bias {bias.shape}, allowed ({outputs},)")
    return np.ascontiguousarray(bias, np.float32)


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else int(array.ctypes.data)


def _describe(
    tensor: CompandedTensor,
    codebook: Codebook,
    bias: npt.NDArray[Any] | None = None,
    scratch: int = -1,
) -> tuple[Companded, list[Any]]:
    """The C structure for a tensor, and the arrays that must live as long as it is used."""
    if len(tensor.shape) != 2:
        raise ValueError(f"a stacked weight {tensor.shape} has no native kernel, allowed (N, K)")
    tables = decoding_tables(tensor, codebook)
    row_scales = tensor.row_scales()
    order = None
    if tensor.column_terms is not None and not tensor.transposed:
        # A column's term decides its place in every cluster: deeper columns come later in all.
        order = np.argsort(tensor.column_terms[0], kind="stable").astype(np.int32)
    parts = {
        "depths": np.ascontiguousarray(tensor.depths[0]),
        "scale_codes": np.ascontiguousarray(tensor.scale_codes[0]),
        "mean_codes": None
        if tensor.mean_codes is None
        else np.ascontiguousarray(tensor.mean_codes[0]),
        "permutation": None
        if tensor.permutation is None
        else np.ascontiguousarray(tensor.permutation[0], np.int64),
        "order": order,
        "codes": np.ascontiguousarray(tensor.packed_codes),
        "scales": np.pad(tables.scales, (0, 256 - tables.scales.size)),
        "means": None if tensor.mean_codes is None else tables.means,
        "levels": tables.levels,
        "row_scales": None if row_scales is None else np.ascontiguousarray(row_scales[0]),
        "bias": _bias(bias, tensor.shape[0]),
    }
    pages, page_bytes = pages_of(tensor.packed_codes)
    source = Companded(
        rows=tensor.rows,
        columns=tensor.columns,
        group_size=tensor.group_size,
        partitions=tensor.partitions,
        transposed=int(tensor.transposed),
        code_bytes=int(tensor.packed_codes.size),
        pages=pages,
        page_bytes=page_bytes,
        file=scratch,
        **{name: _address(array) for name, array in parts.items()},
    )
    return source, list(parts.values())


def pages_of(array: npt.NDArray[Any]) -> tuple[int | None, int]:
    """Address and bytes of the pages that hold a view of a mapped file; None and 0 for others.

    Only of a read-only mapping, whose pages come back from the file when touched: those shared with
    a neighbour may be given back to the system, too.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(owner, "madvise") or not array.size:
        return None, 0
    if np.frombuffer(owner, np.uint8).flags.writeable:
        return None, 0
    first = int(array.ctypes.data)
    start = first - first % mmap.PAGESIZE
    return start, first + array.nbytes - start
