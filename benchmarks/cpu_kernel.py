"""The CPU's matrix products alone, beside what plain loads from memory reach in the same second.

Matrices of random codes, 5632 × 2048 as in a Llama's feed-forward block, more of them than any
cache holds, are multiplied with one input, one after the other; then as much memory is read
through.
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


def random_tensor(depth: str) -> CompandedTensor:
    """A matrix of random codes: all columns of one depth, or mixed as on a model."""
    rng = np.random.default_rng(0)
    columns = np.full(COLUMNS, 0 if depth == "mixed" else int(depth), np.uint8)
    if depth == "mixed":
        columns = rng.choice(np.arange(9), COLUMNS, p=MIX).astype(np.uint8)
    depths = np.tile(columns, (1, ROWS // CLUSTER, 1))
    size = int(depths.sum(dtype=np.int64)) * CLUSTER // 8
    return CompandedTensor(
        shape=(ROWS, COLUMNS),
        group_size=CLUSTER,
        partitions=1,
        scale_unit=np.float32(0.02),
        depths=depths,
        scale_codes=rng.integers(0, 64, depths.shape, dtype=np.uint8),
        packed_codes=rng.integers(0, 256, size, dtype=np.uint8),
        column_terms=columns[None],
        cluster_terms=np.zeros((1, ROWS // CLUSTER), np.int16),
        column_bits=4,
    )


def measure_products(depth: str, threads: int, passes: int = 40) -> Iterator[Product]:
    """Yield one measurement per pass, each between two of reading as many bytes."""
    tensor, codebook, pool = random_tensor(depth), Codebook.default(), Pool(threads)
    count = int(PACKED_BYTES / tensor.packed_codes.size)
    single = Pool(1)
    started = time.perf_counter()
    weights = [Matrix.from_tensor(tensor, codebook, pool=single) for _ in range(count)]
    repack = count * tensor.packed_codes.size / (time.perf_counter() - started)
    held = sum(weight.nbytes for weight in weights)
    x = np.random.default_rng(1).standard_normal((1, COLUMNS)).astype(np.float32)
    y = np.empty((1, ROWS), np.float32)
    # Called as the decoder calls them, not by way of Python's checks.
    products = [((c_void_p * 1)(w.handle.value), (c_void_p * 1)(y.ctypes.data)) for w in weights]
    multiply, source = native().cvxq_matmul, x.ctypes.data
    memory = np.ones(held // 8, np.uint64)
    before = read_once(pool, memory)
    for _ in range(passes):
        started = time.perf_counter()
        for weight, result in products:
            multiply(pool.handle, weight, 1, source, 1, result, 0)
        seconds = time.perf_counter() - started
        amount, after = ROWS * COLUMNS * count, read_once(pool, memory)
        between = (before + after) / 2  # other tenants of a machine come and go
        yield Product(8 * held / amount, held / seconds, between, amount / seconds, repack)
        before = after


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
