"""What the tests of several packages share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads, as the command line does

import numpy as np
import pytest
from cvxq_format import CompandedTensor, pack_codes


def pytest_configure() -> None:
    """Let child processes feel Ctrl-C: a shell's background jobs start with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_companded(
    shape: tuple[int, ...], seed: int, *, transposed: bool = False, **changes: Any
) -> CompandedTensor:
    """Companded tensor of random depths 0 to 8, scales of groups and rows, means, codes, order."""
    rng = np.random.default_rng(seed)
    experts = shape[0] if len(shape) == 3 else 1
    rows, columns = shape[-2:] if not transposed else shape[:-3:-1]
    group_size = changes.pop("group_size", 12)
    partitions = changes.pop("partitions", 1 if transposed or rows % 2 else 2)
    means = changes.pop("means", True)
    permuted = changes.pop("permuted", True)
    row_scaled = changes.pop("row_scaled", not transposed)
    part = rows // partitions
    clusters = partitions * -(-part // group_size)
    depths = rng.integers(0, 9, (experts, clusters, columns), dtype=np.uint8)
    sizes = np.tile([min(group_size, part - i) for i in range(0, part, group_size)], partitions)
    deep = np.repeat(depths, sizes, axis=1).astype(np.int64)
    codes = (rng.integers(0, 256, (experts, rows, columns)) % (1 << deep)).astype(np.uint8)
    order = np.stack(
        [
            np.concatenate([rng.permutation(part) + p * part for p in range(partitions)])
            for _ in range(experts)
        ]
    )
    return CompandedTensor(
        shape=tuple(shape),
        group_size=group_size,
        partitions=partitions,
        scale_unit=np.float32(0.1),
        depths=depths,
        scale_codes=rng.integers(0, 64, depths.shape, dtype=np.uint8),
        packed_codes=pack_codes(codes, depths, group_size, partitions),
        mean_step=np.float32(0.005 if means else 0),
        mean_codes=rng.integers(-128, 128, depths.shape).astype(np.int8) if means else None,
        permutation=order.astype(np.int64) if permuted else None,
        row_scale_codes=rng.integers(0, 4, (experts, rows), dtype=np.uint8) if row_scaled else None,
        row_scale_bits=2 if row_scaled else 0,
        transposed=transposed,
        **changes,
    )


@pytest.fixture(scope="session")
def random_companded() -> Callable[..., CompandedTensor]:
    """Return a maker of random companded tensors: random_companded((N, K), seed, …)."""
    return make_companded


@pytest.fixture
def disassemble(tmp_path: Path) -> Callable[[Any], str]:
    """Return the machine code of a kernel that Triton compiled, as text."""

    def listing(compiled: Any) -> str:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        code = tmp_path / "kernel.cubin"
        code.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([tool, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout

    return listing


@pytest.fixture(scope="session")
def run_interpreted() -> Callable[[Path], str]:
    """Run a file of tests in Triton's interpreter, which is chosen before Triton loads."""

    def run(file: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        return done.stdout

    return run
