"""The CPU's matrix products alone, beside what plain loads from memory reach in the same second.

Matrices of random codes, 5632 × 2048 as in a Llama's feed-forward block, more of them than any
cache holds, are multiplied with one input, one after the other; then as much memory is read
through. Narrower ones show what a width costs that is no multiple of 64 or 256.
"""

import statistics
import time
from collections.abc import Iterator
from ctypes import c_void_p
from dataclasses import dataclass

import numpy as np
from cvxq_format import Codebook, CompandedTensor
from cvxq_kernels.cpu import Matrix, Pool
from cvxq_kernels.cpu.loader import native

ROWS, COLUMNS, CLUSTER = 5632, 2048, 64
PACKED_BYTES = 400e6
MIX = (0.01, 0.04, 0.15, 0.37, 0.36, 0.05, 0.01, 0.005, 0.005)  # of depths 0 … 8 at 3.3 bits
DEPTHS = ("2", "3", "4", "8", "mixed")
WIDTHS = ((576, 768), (600, 640), (640, 768), (896, 1024))  # and the multiple that is next
WIDTH_DEPTHS = ("4", "mixed")
GB = 1e9


@dataclass(frozen=True)
class Product:
    """One pass over all matrices: speeds in bytes/s, and weights/s; `repack` is one core's."""

    bits: float
    read: float
    memory: float
    weights: float
    repack: float


def read_bandwidth(pool: Pool, repeats: int = 5) -> float:
    """Bytes/s that loads reach on a gigabyte, the best of `repeats`."""
    memory = np.ones(1 << 27, np.uint64)
    return max(read_once(pool, memory) for _ in range(repeats))


def read_once(pool: Pool, memory: np.ndarray) -> float:
    """Bytes/s of one reading of `memory`."""
    started = time.perf_counter()
    native().cvxq_read_through(pool.handle, memory.ctypes.data, memory.nbytes)
    return memory.nbytes / (time.perf_counter() - started)


def random_tensor(depth: str, rows: int = ROWS, columns: int = COLUMNS) -> CompandedTensor:
    """A matrix of random codes: all columns of one depth, or mixed as on a model."""
    rng = np.random.default_rng(0)
    terms = np.full(columns, 0 if depth == "mixed" else int(depth), np.uint8)
    if depth == "mixed":
        terms = rng.choice(np.arange(9), columns, p=MIX).astype(np.uint8)
    depths = np.tile(terms, (1, rows // CLUSTER, 1))
    size = int(depths.sum(dtype=np.int64)) * CLUSTER // 8
    return CompandedTensor(
        shape=(rows, columns),
        group_size=CLUSTER,
        partitions=1,
        scale_unit=np.float32(0.02),
        depths=depths,
        scale_codes=rng.integers(0, 64, depths.shape, dtype=np.uint8),
        packed_codes=rng.integers(0, 256, size, dtype=np.uint8),
        column_terms=terms[None],
        cluster_terms=np.zeros((1, rows // CLUSTER), np.int16),
        column_bits=4,
    )


class Products:
    """As many equal matrices as no cache holds, to be multiplied with one input, one by one."""

    def __init__(self, tensor: CompandedTensor, pool: Pool, packed_bytes: float) -> None:
        """Repack them on one thread; `repack` is its speed in bytes/s."""
        rows, columns = tensor.shape
        single, count = Pool(1), max(1, int(packed_bytes / tensor.packed_codes.size))
        started = time.perf_counter()
        self._matrices = [
            Matrix.from_tensor(tensor, Codebook.default(), pool=single) for _ in range(count)
        ]
        self.repack = count * tensor.packed_codes.size / (time.perf_counter() - started)
        self.held = sum(matrix.nbytes for matrix in self._matrices)
        self.weights = count * rows * columns
        self._x = np.random.default_rng(1).standard_normal((1, columns)).astype(np.float32)
        self._y = np.empty((1, rows), np.float32)
        self._pool = pool
        # Called as the decoder calls them, not by way of Python's checks.
        self._calls = [
            ((c_void_p * 1)(matrix.handle.value), (c_void_p * 1)(self._y.ctypes.data))
            for matrix in self._matrices
        ]

    def seconds(self) -> float:
        """Multiply all of them once."""
        multiply, handle, source = native().cvxq_matmul, self._pool.handle, self._x.ctypes.data
        started = time.perf_counter()
        for weight, result in self._calls:
            multiply(handle, weight, 1, source, 1, result, 0)
        return time.perf_counter() - started


def measure_products(depth: str, threads: int, passes: int = 40) -> Iterator[Product]:
    """Yield one measurement per pass, each between two of reading as many bytes."""
    pool = Pool(threads)
    products = Products(random_tensor(depth), pool, PACKED_BYTES)
    memory = np.ones(products.held // 8, np.uint64)
    before = read_once(pool, memory)
    for _ in range(passes):
        seconds, after = products.seconds(), read_once(pool, memory)
        between = (before + after) / 2  # other tenants of a machine come and go
        yield Product(
            8 * products.held / products.weights,
            products.held / seconds,
            between,
            products.weights / seconds,
            products.repack,
        )
        before = after


def measure_widths(
    threads: int, passes: int = 20, rows: int = ROWS, packed_bytes: float = PACKED_BYTES / 8
) -> dict[str, list[float]]:
    """Time per weight of each of WIDTHS, as a share of that of the multiple: by depth, in order.

    The passes of both take turns, and the share is the median over them.
    """
    pool = Pool(threads)

    def share(depth: str, pair: tuple[int, int]) -> float:
        both = [Products(random_tensor(depth, rows, k), pool, packed_bytes) for k in pair]
        per_weight = [[p.seconds() / p.weights for p in both] for _ in range(passes)]
        return statistics.median(one / other for one, other in per_weight)

    return {depth: [share(depth, pair) for pair in WIDTHS] for depth in WIDTH_DEPTHS}


def product_line(depth: str, products: list[Product]) -> str:
    """A row of the table: medians, and the deviation of the share of reading."""
    shares = [product.read / product.memory for product in products]
    read, weights, repack = (
        statistics.median(getattr(product, name) for product in products) / GB
        for name in ("read", "weights", "repack")
    )
    spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
    return (
        f"| {depth} | {products[0].bits:.2f} | {read:.1f} | {weights:.0f} "
        f"| {statistics.median(shares):.0%} ± {spread:.0%} | {repack:.2f} |"
    )
