"""How fast codes are packed and unpacked, and what checksums cost: python benchmarks/packing.py

Prints MB/s of packed bytes on one core for every bit depth and for a mixture, with codes of
clusters of 128 rows, and the seconds that CRC-32 needs per GB. Times are CPU seconds of this
process, the median of several runs, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from cvxq_format import Codebook, CompandedTensor, dequantize, pack_codes, unpack_codes

GROUP_SIZE, ROWS = 128, 1024


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_seconds(action: Callable[[], object], repeats: int) -> float:
    """Return the median CPU seconds of one call, after one call to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return statistics.median(times)


def random_tensor(depths: np.ndarray, columns: int, rng: np.random.Generator) -> CompandedTensor:
    """Return a matrix of random codes (ROWS, columns) with depths (1, C, columns)."""
    codes = rng.integers(0, 256, (1, ROWS, columns), dtype=np.uint8)
    codes &= ((1 << np.repeat(depths, GROUP_SIZE, axis=1).astype(np.int64)) - 1).astype(np.uint8)
    return CompandedTensor(
        shape=(ROWS, columns),
        group_size=GROUP_SIZE,
        partitions=1,
        scale_unit=np.float32(1),
        depths=depths,
        scale_codes=rng.integers(0, 64, depths.shape, dtype=np.uint8),
        packed_codes=pack_codes(codes, depths, GROUP_SIZE, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, default=2048, help="inputs of the matrix")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    codebook = Codebook.default()
    groups = (1, ROWS // GROUP_SIZE, options.columns)
    print(f"{cpu_name()}, one core, numpy {np.__version__}, {ROWS} × {options.columns} weights")
    print("depth   packing  unpacking   (MB/s of packed bytes)   to weights (million/s)")
    for depth in (1, 2, 3, 4, 5, 6, 7, 8, None):
        low, high = (depth, depth) if depth else (0, 6)
        depths = rng.integers(low, high, groups, dtype=np.uint8, endpoint=True)
        tensor = random_tensor(depths, options.columns, rng)
        codes = unpack_codes(tensor)
        megabytes = tensor.packed_codes.size / 1e6
        pack = cpu_seconds(partial(pack_codes, codes, depths, GROUP_SIZE, 1), options.repeats)
        unpack = cpu_seconds(partial(unpack_codes, tensor), options.repeats)
        expand = cpu_seconds(partial(dequantize, tensor, codebook), options.repeats)
        print(
            f"{depth or '0–6':>5}  {megabytes / pack:8.0f}  {megabytes / unpack:9.0f}"
            f"{codes.size / expand / 1e6:42.0f}"
        )
    data = rng.bytes(1 << 26)
    seconds = cpu_seconds(partial(zlib.crc32, data), options.repeats) * 1e9 / len(data)
    print(f"checksum (CRC-32): {seconds:.2f} s per GB")


if __name__ == "__main__":
    main()
