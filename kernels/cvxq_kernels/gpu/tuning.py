"""Which plan serves a shape and a batch best, measured once per device and kept on disk.

The candidates of all three kinds run for the same input; one whose values are off is never kept,
however fast.  What was found is remembered under the device's name, the versions that make the code
(Triton, this package's sources) and the matrix's shape and depths, in one JSON file per device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
import triton

from cvxq_kernels.gpu.plan import (
    MATVEC_BATCH,
    PROGRAMS_PER_PROCESSOR,
    UNROLLS,
    Plan,
    bucket,
    choose_plan,
    split_for,
)
from cvxq_kernels.gpu.weight import GpuWeight
from cvxq_kernels.gpu.workspace import Workspace

# Of the output's norm. The matvec's integers cost some 0.7 %, float16 operands 0.05 %; a wrong
# index or a missing part of the sum costs far more than this.
TOLERANCE = 0.03

Timer = Callable[[Callable[[], object]], float]


def candidates(batch: int, tiles: int, chunks: int, processors: int) -> Iterator[Plan]:
    """Plans worth measuring; chunks: of a cluster."""
    splits = {
        split_for(tiles, chunks, processors, programs)
        for programs in (PROGRAMS_PER_PROCESSOR // 4, PROGRAMS_PER_PROCESSOR // 2,
                         PROGRAMS_PER_PROCESSOR, 2 * PROGRAMS_PER_PROCESSOR)
    }  # fmt: skip
    if batch <= MATVEC_BATCH:
        for split in sorted(splits):
            for unroll in UNROLLS if batch == 1 else UNROLLS[:1]:
                yield Plan("matvec", split, unroll)
    widths = [width for width in (16, 32, 64) if width == 16 or width < 2 * batch]
    for split in sorted(splits):
        for width in widths:
            yield Plan("gemm", split, 1, width)
    if batch >= 16:
        yield Plan("expand")


def tune(
    weight: GpuWeight, batches: Sequence[int], dtype: torch.dtype, timer: Timer | None = None
) -> dict[int, Plan]:
    """Measure plans for `batches` rows of input in `dtype`, keep the best in `weight` and on disk.

    timer: seconds of one call of a function; Triton's `do_bench` unless given. Returns the plan of
    every bucket. Not to be called while a CUDA graph is captured.
    """
    timer = timer or _device_seconds
    path = cache_path(weight.device)
    known = load(path)
    for batch in sorted({bucket(batch) for batch in batches}):
        key = _key(weight, batch, dtype)
        if key not in known:
            known[key] = _best(weight, batch, dtype, timer)
            save(path, known)
        weight.plans[batch] = known[key]
    return {bucket(batch): weight.plans[bucket(batch)] for batch in batches}


def _best(weight: GpuWeight, batch: int, dtype: torch.dtype, timer: Timer) -> Plan:
    """The fastest plan whose values are right; the guess where none is."""
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(batch, weight.shape[1], generator=generator, device=weight.device).to(dtype)
    # In float32 and in a scratch of its own, which is freed at once.
    apart = GpuWeight(weight.matrix, Workspace(weight.device))
    expected = apart.matmul(x.float(), plan=Plan("expand"))
    del apart
    tiles = len(weight.matrix.tiles)
    chunks = weight.matrix.slots // tiles
    best, seconds = choose_plan(batch, tiles, chunks, weight.processors), float("inf")
    for plan in candidates(batch, tiles, chunks, weight.processors):
        out = torch.full((batch, weight.shape[0]), float("nan"), dtype=dtype, device=weight.device)
        weight.matmul(x, out=out, plan=plan)
        if not is_right(out, expected):
            continue
        found = timer(lambda plan=plan, out=out: weight.matmul(x, out=out, plan=plan))  # type: ignore[misc]
        if found < seconds:
            best, seconds = plan, found
    return best


def is_right(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether values are within TOLERANCE of the expected ones; NaN never is."""
    difference = (found.float() - expected).norm()
    return bool(difference <= TOLERANCE * expected.norm())


def _device_seconds(action: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(action, warmup=5, rep=20, return_mode="median")) / 1e3


def _key(weight: GpuWeight, batch: int, dtype: torch.dtype) -> str:
    matrix = weight.matrix
    size = f"{weight.shape[0]}x{weight.shape[1]} {matrix.words.nbytes}"
    return f"{_sources()} {size} {matrix.rows} {matrix.depths} {dtype} {batch}"


@cache
def _sources() -> str:
    """Short digest of the kernels' sources and Triton's version."""
    digest = hashlib.sha256(triton.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def cache_path(device: torch.device) -> Path:
    """Return the file for `device`, in the user's cache folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return root / "cvxq" / f"plans-{safe}.json"


def load(path: Path) -> dict[str, Plan]:
    """Read remembered plans; a file that is missing or damaged counts as empty."""
    try:
        entries = json.loads(path.read_text())
        return {key: Plan(**entry) for key, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(path: Path, plans: dict[str, Plan]) -> None:
    """Write plans atomically; where that is not allowed, they are measured anew each time."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({key: asdict(plan) for key, plan in plans.items()}))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
