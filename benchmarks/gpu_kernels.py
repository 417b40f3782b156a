"""How fast the GPU kernels multiply: python benchmarks/gpu_kernels.py [--minutes 5] [--dry-run]

Prints Markdown tables: µs, GB/s of packed bytes, their share of the bandwidth of a copy measured in
the same run, and the speed-up over `torch.matmul` in float16 and over GemLite (`gpu_peers.py`) in
the same run. Every time is the median of replays of a CUDA graph in which copies of the weights
that together exceed four times the L2 cache take turns, so that weights come from memory. Kernels
are compiled beforehand, by several processes, and values checked before anything is timed. What
does not fit the minutes is left out and named. `--dry-run` checks values on tiny shapes and times
nothing; it needs no GPU if Triton's interpreter is on (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from cvxq_kernels.gpu import GpuWeight
from cvxq_kernels.gpu.plan import bucket
from cvxq_kernels.gpu.tuning import candidates, tune
from gpu_peers import Peers, graph_seconds
from gpu_weights import GROUP_SIZE, copies, histogram, mixed_depths, random_packed

SHAPES = ((8192, 28672), (4096, 11008), (11008, 4096), (4096, 32000), (4096, 4096))  # (K, N)
BATCHES = (1, 2, 4, 8, 16, 32, 256)
MIXED = (2.0, 3.0, 4.0)
GEMLITE_SHARE = 0.3  # of the time, at most
LEAST_BOUND_BYTES = 32e6  # goals are percentages where a matrix has at least these packed bytes
# Of the output's norm: int8 activations and levels; a wrong index costs far more.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Cell:
    """One measurement: a shape, its depths (a number if uniform, else the mean), a batch."""

    inputs: int
    outputs: int
    bits: float
    mixed: bool
    batch: int

    def depths(self) -> torch.Tensor:
        """(clusters, K) uint8."""
        clusters = self.outputs // GROUP_SIZE
        if self.mixed:
            return mixed_depths(clusters, self.inputs, self.bits, seed=0)
        return torch.full((clusters, self.inputs), int(self.bits), dtype=torch.uint8)


def cells(shapes: Sequence[tuple[int, int]]) -> Iterator[Cell]:
    """All measurements, those that goals are about first."""
    for inputs, outputs in shapes:
        for bits in (3, 4, 2, 8):
            yield Cell(inputs, outputs, bits, False, 1)
        for mean in MIXED:
            yield Cell(inputs, outputs, mean, True, 1)
    for inputs, outputs in shapes:
        for batch in (16, 256):
            yield Cell(inputs, outputs, 4, False, batch)
        for batch in BATCHES[1:]:
            yield Cell(inputs, outputs, 3.0, True, batch)
    for inputs, outputs in shapes:
        for bits in (1, 5, 6, 7):
            yield Cell(inputs, outputs, bits, False, 1)
    for inputs, outputs in shapes:
        for bits in (2, 3, 4, 8):
            for batch in BATCHES[1:]:
                if (bits, batch) not in ((4, 16), (4, 256)):
                    yield Cell(inputs, outputs, bits, False, batch)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GB."""
    source = torch.randint(256, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds([partial(target.copy_, source)])


def check_values(weight: GpuWeight, x: torch.Tensor) -> float:
    """Relative error against float64 on the expanded weights; ValueError above TOLERANCE."""
    out = torch.full((len(x), weight.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
    y = weight.matmul(x, out=out).double()
    expected = x.double() @ weight.dense().double().t()
    error = float((y - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise ValueError(
            f"{weight.shape} × {len(x)}: relative error {error:.3g}, at most {TOLERANCE}"
        )
    return error


def try_plans(cell: Cell, device: torch.device) -> None:
    """Compile what tuning the cell asks for, by running it on a small matrix of the same kind."""
    small = replace(cell, inputs=min(cell.inputs, 288), outputs=GROUP_SIZE)
    depths = small.depths()
    if cell.mixed:
        depths[:] = torch.arange(small.inputs, dtype=torch.uint8) % 9  # all of them
    packed = random_packed(small.outputs, small.inputs, depths, device)
    weight = GpuWeight.from_packed(packed, device)
    x = torch.zeros(cell.batch, small.inputs, dtype=torch.float16, device=device)
    plans = candidates(bucket(cell.batch), weight.processors)
    for plan in plans:
        weight.matmul(x, plan=plan)


def compile_all(cells: Sequence[Cell], processes: int) -> None:
    """Compile for all cells in several processes; Triton's cache on disk hands it to this one."""
    kinds = {("mixed" if cell.mixed else cell.bits, bucket(cell.batch)): cell for cell in cells}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(partial(try_plans, device=torch.device("cuda")), kinds.values()))


def empty_seconds() -> float:
    """Seconds of a kernel that does next to nothing: what a launch in a graph costs."""
    cell = torch.zeros(1, device="cuda")
    return graph_seconds([cell.zero_])


def repack_speed(cell: Cell) -> float:
    """Bytes of packed codes per second that `GpuWeight.from_packed` arranges, on the device."""
    packed = random_packed(cell.outputs, cell.inputs, cell.depths(), torch.device("cuda"))
    GpuWeight.from_packed(packed, "cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    GpuWeight.from_packed(packed, "cuda")
    torch.cuda.synchronize()
    return packed.codes.nbytes / (time.perf_counter() - start)


def row(cell: Cell, bandwidth: float, empty: float, peers: Peers) -> str:
    """Measure a cell and return its row of the table."""
    device = torch.device("cuda")
    packed = random_packed(cell.outputs, cell.inputs, cell.depths(), device)
    weight = GpuWeight.from_packed(packed, device)
    x = torch.randn(cell.batch, cell.inputs, device=device, dtype=torch.float16)
    tune(weight, [cell.batch], torch.float16)
    error = check_values(weight, x)
    group = copies(weight, peers.least_bytes)
    outs = [torch.empty(cell.batch, cell.outputs, device=device, dtype=x.dtype) for _ in group]
    seconds = graph_seconds(
        [partial(w.matmul, x, None, out) for w, out in zip(group, outs, strict=True)]
    )
    rate = weight.nbytes / seconds
    others = [
        peers.seconds(cell.inputs, cell.outputs, cell.batch, kind)
        for kind in ("fp16", "gemlite 4", "gemlite 2")
    ]
    ratios = " | ".join("–" if other is None else f"{other / seconds:.2f}" for other in others)
    label = f"mixed {cell.bits:g}" if cell.mixed else f"{cell.bits:g}"
    size = weight.nbytes / 1e6
    share = f"{100 * rate / bandwidth:.0f} %" if size * 1e6 >= LEAST_BOUND_BYTES else "(small)"
    plan = weight.plan_for(cell.batch)
    return (
        f"| {cell.inputs}×{cell.outputs} | {label} | {cell.batch} | {size:.1f} "
        f"| {1e6 * seconds:.1f} | {1e6 * (seconds - empty):.1f} | {rate / 1e9:.0f} | {share} "
        f"| {ratios} | {plan.kind} {plan.programs}/{plan.unroll}/{plan.tile_batch} | {error:.1e} |"
    )


def measure(minutes: float) -> None:
    """Measure cells in order until the minutes are over; print every row as it is known."""
    deadline = time.monotonic() + 60 * minutes
    begin = time.perf_counter()
    processes = max(1, min(8, (os.cpu_count() or 2) // 2))
    compile_all(list(cells(SHAPES[:1])), processes)
    print(
        f"Compiled in {time.perf_counter() - begin:.0f} s by {processes} processes.\n", flush=True
    )
    properties = torch.cuda.get_device_properties(0)
    least_bytes = 4 * properties.L2_cache_size
    bandwidth, empty = copy_bandwidth(), empty_seconds()
    print(f"{properties.name}, torch {torch.__version__}, Triton {triton.__version__}, ", end="")
    print(f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}. ", end="")
    print(f"Copy {bandwidth / 1e9:.0f} GB/s, an empty kernel {1e6 * empty:.1f} µs. Mixed depths:\n")
    for mean in MIXED:
        print(f"- mean {mean:g}: {histogram(Cell(4096, 4096, mean, True, 1).depths())}")
    speed = repack_speed(Cell(8192, 28672, 3.0, True, 1))
    print(f"\nRepacking 8192×28672 at 3 bits: {speed / 1e9:.1f} GB/s of packed bytes.\n")
    print("| K×N | bits | batch | MB | µs | above empty | GB/s | of copy | × fp16 | × GemLite 4 "
          "| × GemLite 2 | plan | error |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|")
    peers = Peers(least_bytes, GEMLITE_SHARE * 60 * minutes)
    skipped = 0
    for cell in cells(SHAPES):
        if time.monotonic() > deadline:
            skipped += 1
            continue
        print(row(cell, bandwidth, empty, peers), flush=True)
        torch.cuda.empty_cache()
    for complaint in peers.complaints:
        print(f"\n{complaint}.")
    if skipped:
        print(f"\nLeft out for want of time: {skipped} cells.")


def dry_run() -> None:
    """Check the values of every kind of cell on a tiny matrix."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for cell in (Cell(24, GROUP_SIZE, 3, False, 1), Cell(24, GROUP_SIZE, 3.0, True, 5)):
        depths = cell.depths()
        packed = random_packed(cell.outputs, cell.inputs, depths, device)
        weight = copies(GpuWeight.from_packed(packed, device), 2 * packed.nbytes)[-1]
        x = torch.randn(cell.batch, cell.inputs, device=device)
        print(f"{cell}: {histogram(depths)}; error {check_values(weight, x):.1e}")
    try_plans(Cell(24, GROUP_SIZE, 2, False, 1), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="stop measuring after so many")
    parser.add_argument("--dry-run", action="store_true", help="values only, tiny shapes")
    options = parser.parse_args()
    if options.dry_run:
        dry_run()
    elif torch.cuda.is_available():
        measure(options.minutes)
    else:
        sys.exit("gpu_kernels: no CUDA device; --dry-run checks values without one")


if __name__ == "__main__":
    main()
