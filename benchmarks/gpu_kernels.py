"""How fast the GPU kernels multiply: python benchmarks/gpu_kernels.py [--minutes 5] [--dry-run]

Prints Markdown tables: µs, GB/s of packed bytes, their share of the bandwidth of a copy measured in
the same run, and the speed-up over `torch.matmul` in float16 and over GemLite (where it can be
imported) in the same run. Every time is the median of replays of a CUDA graph in which copies of
the weights that together exceed four times the L2 cache take turns, so that weights come from
memory. Values are checked before anything is timed. What does not fit the minutes is left out and
named. `--dry-run` checks values on tiny shapes and times nothing; it needs no GPU if Triton's
interpreter is on (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from cvxq_kernels.gpu import GpuWeight
from gpu_weights import GROUP_SIZE, copies, histogram, mixed_depths, random_packed

SHAPES = ((8192, 28672), (4096, 11008), (11008, 4096), (4096, 32000), (4096, 4096))  # (K, N)
BATCHES = (1, 2, 4, 8, 16, 32, 256)
MIXED = (2.0, 3.0, 4.0)
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


def graph_seconds(actions: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median seconds of one action in a CUDA graph that runs all of them in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for action in actions[:2]:
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 64 // len(actions))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for action in actions:
                action()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (rounds * len(actions)))
    return statistics.median(times)


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


def fp16_seconds(cell: Cell, least_bytes: int) -> float:
    """Seconds of torch.matmul in float16 for the cell's shape and batch."""
    x = torch.randn(cell.batch, cell.inputs, device="cuda", dtype=torch.float16)
    count = max(1, -(-least_bytes // (2 * cell.inputs * cell.outputs)))
    weights = [
        torch.randn(cell.outputs, cell.inputs, device="cuda", dtype=torch.float16)
        for _ in range(count)
    ]
    return graph_seconds([partial(torch.matmul, x, w.t()) for w in weights])


def gemlite_seconds(cell: Cell, bits: int, least_bytes: int) -> float | None:
    """Seconds of GemLite's `bits`-bit kernel with groups of 128, or None where it is not there."""
    try:
        from gemlite import helper
    except ImportError:
        return None
    make: Any = {4: helper.A16W4_HQQ_INT, 2: helper.A16W2_HQQ_INT}[bits]
    shape = (cell.outputs, cell.inputs)
    layers = []
    for _ in range(max(1, -(-least_bytes * 8 // (bits * cell.inputs * cell.outputs)))):
        codes = torch.randint(1 << bits, shape, dtype=torch.uint8, device="cuda")
        scales = torch.rand(codes.numel() // 128, 1, device="cuda", dtype=torch.float16)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        layers.append(make(device="cuda", dtype=torch.float16).from_weights(codes, scales, zeros))
    x = torch.randn(cell.batch, cell.inputs, device="cuda", dtype=torch.float16)
    layers[0](x)  # tunes itself
    return graph_seconds([partial(layer, x) for layer in layers])


class Peers:
    """Times of the other kernels, each measured once per shape and batch."""

    def __init__(self, least_bytes: int):
        """least_bytes: of the copies that take turns."""
        self.least_bytes = least_bytes
        self.known: dict[tuple[int, int, int, str], float | None] = {}

    def seconds(self, cell: Cell, kind: str) -> float | None:
        """Seconds of "fp16", "gemlite 4" or "gemlite 2"."""
        key = (cell.inputs, cell.outputs, cell.batch, kind)
        if key not in self.known:
            self.known[key] = (
                fp16_seconds(cell, self.least_bytes)
                if kind == "fp16"
                else gemlite_seconds(cell, int(kind[-1]), self.least_bytes)
            )
        return self.known[key]


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
    weight.tune([cell.batch], torch.float16)
    error = check_values(weight, x)
    group = copies(weight, peers.least_bytes)
    outs = [torch.empty(cell.batch, cell.outputs, device=device, dtype=x.dtype) for _ in group]
    seconds = graph_seconds(
        [partial(w.matmul, x, None, out) for w, out in zip(group, outs, strict=True)]
    )
    rate = weight.nbytes / seconds
    others = [peers.seconds(cell, kind) for kind in ("fp16", "gemlite 4", "gemlite 2")]
    ratios = " | ".join("–" if other is None else f"{other / seconds:.2f}" for other in others)
    label = f"mixed {cell.bits:g}" if cell.mixed else f"{cell.bits:g}"
    size = weight.nbytes / 1e6
    share = f"{100 * rate / bandwidth:.0f} %" if size * 1e6 >= LEAST_BOUND_BYTES else "(small)"
    plan = weight.plan_for(cell.batch)
    return (
        f"| {cell.inputs}×{cell.outputs} | {label} | {cell.batch} | {size:.1f} "
        f"| {1e6 * seconds:.1f} | {1e6 * (seconds - empty):.1f} | {rate / 1e9:.0f} | {share} "
        f"| {ratios} | {plan.kind} {plan.splits}/{plan.unroll}/{plan.tile_batch} | {error:.1e} |"
    )


def measure(minutes: float) -> None:
    """Measure cells in order until the minutes are over; print every row as it is known."""
    deadline = time.monotonic() + 60 * minutes
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
    peers = Peers(least_bytes)
    skipped = 0
    for cell in cells(SHAPES):
        if time.monotonic() > deadline:
            skipped += 1
            continue
        print(row(cell, bandwidth, empty, peers), flush=True)
        torch.cuda.empty_cache()
    if skipped:
        print(f"\nLeft out for want of time: {skipped} cells.")


def dry_run() -> None:
    """Check the values of every kind of cell on a tiny matrix."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for cell in (Cell(24, GROUP_SIZE, 3, False, 1), Cell(24, GROUP_SIZE, 3.0, True, 5)):
        depths = cell.depths()
        packed = random_packed(cell.outputs, cell.inputs, depths, device)
        for weight in copies(GpuWeight.from_packed(packed, device), 2 * packed.nbytes)[:2]:
            x = torch.randn(cell.batch, cell.inputs, device=device)
            print(f"{cell}: {histogram(depths)}; error {check_values(weight, x):.1e}")


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
