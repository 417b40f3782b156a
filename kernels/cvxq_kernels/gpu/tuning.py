"""Which plan serves a shape and a batch best, measured once per device and kept on disk.

The candidates of all three kinds run for the same input; one whose values are off is never kept,
however fast.  What was found is remembered under the device's name, the versions that make the code
(Triton, this package's sources) and the matrix's shape and depths, in one JSON file per device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
import triton
from cvxq_format.unfinished import write_whole

from cvxq_kernels.gpu.device import median_seconds, name_of
from cvxq_kernels.gpu.plan import (
    MATVEC_BATCH,
    PROGRAMS_PER_PROCESSOR,
    UNROLLS,
    Plan,
    bucket,
    choose_plan,
)
from cvxq_kernels.gpu.weight import GpuWeight
from cvxq_kernels.gpu.workspace import Workspace

# Of the output's norm. The matvec's integers cost some 0.7 %, float16 operands 0.05 %; a wrong
# index or a missing part of the sum costs far more than this.
TOLERANCE = 0.03
SCRATCH_BYTES = 1 << 26  # overwritten between calls: more than any L2 cache holds but the largest
REPEATS = 25

Timer = Callable[[Callable[[], object]], float]


def candidates(batch: int, processors: int) -> Iterator[Plan]:
    """Plans worth measuring."""
    most = 2 * PROGRAMS_PER_PROCESSOR * processors
    counts = [most // 8, most // 4, most // 2, most]
    if batch <= MATVEC_BATCH:
        for programs in counts:  # one kernel for all of them: compiling it is what takes time
            yield Plan("matvec", programs, UNROLLS[batch == 1])
    if batch == 1:  # tensor cores have nothing to gain there, and compiling takes its time
        return
    for programs in counts[:3]:
        for width in (16, 32, 64):
            if width == 16 or width < 2 * batch:
                yield Plan("gemm", programs, 1, width)
    if batch >= 16:
        yield Plan("expand")


def tune(
    weight: GpuWeight, batches: Sequence[int], dtype: torch.dtype, timer: Timer | None = None
) -> dict[int, Plan]:
    """Measure plans for `batches` rows of input in `dtype`, keep the best in `weight` and on disk.

    timer: seconds of one call of a function; the device's events unless given. Returns the plan of
    every bucket. Takes SCRATCH_BYTES of the device's memory and the outputs. Not to be called while
    a CUDA graph is captured.
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


def launch_all(weight: GpuWeight, batch: int, dtype: torch.dtype) -> None:
    """Launch once whatever `tune` would, for `compiling.recording`."""
    x = torch.zeros(batch, weight.shape[1], dtype=dtype, device=weight.device)
    trial = GpuWeight(replace(weight.matrix, _shares={}), Workspace(weight.device))
    trial.matmul(x.float(), plan=Plan("expand"))
    for plan in candidates(batch, weight.processors):
        trial.matmul(x, plan=plan)


def _best(weight: GpuWeight, batch: int, dtype: torch.dtype, timer: Timer) -> Plan:
    """The fastest plan whose values are right; the guess where none is."""
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(batch, weight.shape[1], generator=generator, device=weight.device).to(dtype)
    matrix = replace(weight.matrix, _shares={})  # those of plans that are only tried go with it
    # In float32 and in a scratch of its own, which is freed at once.
    expected = GpuWeight(matrix, Workspace(weight.device)).matmul(x.float(), plan=Plan("expand"))
    trial = GpuWeight(matrix, weight.workspace)
    best, seconds = choose_plan(batch, weight.processors), float("inf")
    for plan in candidates(batch, weight.processors):
        out = torch.full((batch, weight.shape[0]), float("nan"), dtype=dtype, device=weight.device)
        trial.matmul(x, out=out, plan=plan)
        if not is_right(out, expected):
            continue
        found = timer(lambda plan=plan, out=out: trial.matmul(x, out=out, plan=plan))  # type: ignore[misc]
        if found < seconds:
            best, seconds = plan, found
    return best


def is_right(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether values are within TOLERANCE of the expected ones; NaN never is."""
    difference = (found.float() - expected).norm()
    return bool(difference <= TOLERANCE * expected.norm())


def is_known(weight: GpuWeight, batches: Sequence[int], dtype: torch.dtype) -> bool:
    """Tell whether `tune` would measure nothing."""
    known = load(cache_path(weight.device))
    return all(_key(weight, bucket(batch), dtype) in known for batch in batches)


def _device_seconds(action: Callable[[], object]) -> float:
    """Median of several calls, each after what is cached was overwritten by SCRATCH_BYTES."""
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    action()
    return median_seconds(action, scratch.zero_, REPEATS)


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
    """Return the file for a device, in the user's cache folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    safe = "".join(c if c.isalnum() else "-" for c in name_of(device))
    return root / "cvxq" / f"plans-{safe}.json"


def load(path: Path) -> dict[str, Plan]:
    """Read remembered plans; a file that is missing or damaged counts as empty."""
    try:
        entries = json.loads(path.read_text())
        return {key: Plan(**entry) for key, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(path: Path, plans: dict[str, Plan]) -> None:
    """Write plans, all or none; where that is not allowed, they are measured anew each time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({key: asdict(plan) for key, plan in plans.items()})
        write_whole(path, text.encode())
