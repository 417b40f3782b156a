"""Model how fast a Llama-2-7B would decode on GPUs that are not here: python tools/model_gpu.py

    python tools/model_gpu.py [--bits 2.5 3 4] [--device H100 …] [--json]

The matrices are those of `benchmarks/gpu_weights.py`, whose depths differ by cluster and column.
How the kernel shares them out among its programs is asked of the kernels' own code; instructions
per chunk are those that `count_instructions.py` finds in the machine code; bytes are those of the
device layout. What the memory and the launches cost is assumed, by the constants below, the same
for every version of the kernels, so that two versions can be compared. A matrix takes

    gap + before + max(bytes / bandwidth, instructions / issue rate, slowest programs) + after

where a program is a chain of turns of its loops, each of which waits for the words that it asked
for; `before` and `after` are accesses that depend on each other, outside the loops.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cvxq_kernels.gpu.layout import CHUNK, CLUSTER, LOW_DEPTH, MAX_DEPTH, TILE_FIELDS
from cvxq_kernels.gpu.plan import PROGRAMS_PER_PROCESSOR
from cvxq_kernels.gpu.shares import ITEM_PARTS, MATVEC_COSTS, counts_of, share_out

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gpu_weights import GROUP_SIZE, mixed_depths
from random_model import SHAPES

Chunks = npt.NDArray[np.int64]  # (programs, 9): chunks of every depth that a program has

# Microseconds, assumed. None of these changes with the kernels, until a device tells them.
WORDS_US = 0.8  # from asking a busy memory for words to having used them
NEAR_WORDS_US = 0.3  # the same where the L2 cache has them already
COLD_US = 0.4  # an access to a table that nobody read lately
WARM_US = 0.2  # one to what was just written, an atomic or a barrier
GAP_US = 1.0  # from the end of a kernel to the start of the next in a CUDA graph
OVERLAPPED_GAP_US = 0.4  # the same where the next one was launched before that end
SMALL_US = 0.8  # a kernel between matrices: norm, rotation, activation, joining
ATTENTION_US = 2.3  # attention, but for reading keys and values
TEXT = 512  # tokens whose keys and values attention reads
ISSUED = 4  # instructions of a warp that a processor issues per clock

# Instructions of a lane per chunk of depths 1 … 8 in tiles of 64 rows, prologue included.
INSTRUCTIONS = {
    80: (91.3, 94.4, 101.4, 134.8, 499.2, 495.6, 539.5, 415.6),
    86: (91.3, 93.8, 100.3, 131.8, 504.8, 500.8, 544.8, 414.8),
    89: (91.3, 93.3, 100.3, 132.2, 503.0, 499.0, 543.0, 411.0),
    90: (91.1, 95.5, 102.0, 134.6, 498.6, 494.9, 536.9, 414.6),
}


@dataclass(frozen=True)
class Device:
    """A GPU; bandwidth: bytes per µs of a copy, read plus written; resident: programs that a
    processor holds at a time."""

    name: str
    arch: int
    processors: int
    gigahertz: float
    bandwidth: float
    resident: int


DEVICES = (
    Device("H100", 90, 132, 1.755, 3.00e6, 32),
    Device("H200", 90, 132, 1.755, 4.20e6, 32),
    Device("A100", 80, 108, 1.410, 1.75e6, 32),
    Device("RTX 4090", 89, 128, 2.520, 0.92e6, 24),
    Device("RTX 3060", 86, 28, 1.777, 0.33e6, 16),
)


@dataclass(frozen=True)
class Kernel:
    """What the source of the matvec shows.

    low_turn, high_turn: chunks per turn of the loops over depths 1–4 and 5–8. is_near: their words
    are in L2 before a turn asks. cold_before, warm_before, warm_after: accesses outside the loops
    that each wait for the one before; sums_per_access: partial sums read at once at the end.
    overlapped_from: first architecture on which kernels are launched before the one before ends;
    that much less of the accesses before then shows. small: kernels between the matrices of a
    layer, attention not counted.
    """

    low_turn: float
    high_turn: float
    is_near: bool
    cold_before: int
    warm_before: int
    warm_after: int
    sums_per_access: int
    overlapped_from: int
    small: int

    def gap(self, device: Device) -> float:
        """µs between two kernels."""
        return OVERLAPPED_GAP_US if device.arch >= self.overlapped_from else GAP_US

    def before(self, device: Device) -> float:
        """µs from a matvec's start until its loops begin."""
        if device.arch >= self.overlapped_from:  # item and requests were overlapped
            return (self.cold_before - 1 + self.warm_before) * WARM_US
        first_words = WORDS_US if self.is_near else 0.0
        return first_words + self.cold_before * COLD_US + self.warm_before * WARM_US


# Before: item, entries; columns, inputs, scratch. After: sums, counter. Between matrices: rotation,
# joining, activation and two norms.
KERNEL = Kernel(
    low_turn=2, high_turn=0.5, is_near=True, cold_before=2, warm_before=3, warm_after=2,
    sums_per_access=32, overlapped_from=90, small=5,
)  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """One product on one device: µs, and what bounds it. slowest: its programs' instructions at
    most, over their mean. bound_us: of the bytes alone."""

    name: str
    slowest: float
    bound_us: float
    issue_us: float
    chain_us: float
    outside_us: float

    @property
    def stream_us(self) -> float:
        """µs of the loops."""
        return max(self.bound_us, self.issue_us, self.chain_us)

    @property
    def microseconds(self) -> float:
        """µs from the end of the kernel before to this one's."""
        return self.stream_us + self.outside_us


@dataclass(frozen=True)
class Token:
    """One token of a whole model: its layers' matrices, the head, µs and the share of the bound."""

    device: str
    bits: float
    matrices: tuple[Matrix, ...]
    microseconds: float
    share: float


def chunks_of(outputs: int, inputs: int, bits: float) -> Chunks:
    """(C, 9): chunks of every depth in the clusters of a matrix of mean depth `bits`."""
    depths = mixed_depths(outputs // GROUP_SIZE, inputs, bits, seed=0).numpy()
    counts = np.stack([(depths == depth).sum(1) for depth in range(MAX_DEPTH + 1)], 1)
    return -(-counts // CHUNK)


def shares(chunks: Chunks, processors: int) -> tuple[Chunks, int]:
    """Chunks of every program, in the grid's order, and how many programs share a tile at most."""
    tiles = torch.zeros(len(chunks), TILE_FIELDS, dtype=torch.int32)
    tiles[:, CLUSTER] = torch.arange(len(chunks))
    runs = torch.from_numpy(np.pad(chunks.cumsum(1), ((0, 0), (1, 0))))
    programs = processors * PROGRAMS_PER_PROCESSOR
    items = share_out(tiles, runs, MATVEC_COSTS, programs, with_pruned=False).items.numpy()
    return counts_of(items), int(items[:, ITEM_PARTS].max())


def model_matrix(name: str, outputs: int, inputs: int, bits: float, device: Device) -> Matrix:
    """Model one product x · Wᵀ of one row."""
    chunks = chunks_of(outputs, inputs, bits)
    programs, parts = shares(chunks, device.processors)
    instructions = programs[:, 1:] @ np.array(INSTRUCTIONS[device.arch])
    turn = NEAR_WORDS_US if KERNEL.is_near else WORDS_US
    low, high = programs[:, 1 : LOW_DEPTH + 1].sum(1), programs[:, LOW_DEPTH + 1 :].sum(1)
    chains = turn * (low / KERNEL.low_turn + high / KERNEL.high_turn)
    per_second = device.processors * ISSUED * device.gigahertz * 1e3
    return Matrix(
        name=name,
        slowest=float(instructions.max() / instructions.mean()),
        bound_us=matrix_bytes(chunks, inputs) / device.bandwidth,
        issue_us=float(instructions.sum()) / per_second,
        chain_us=makespan(chains, device.processors * device.resident),
        outside_us=outside(parts, device),
    )


def matrix_bytes(chunks: Chunks, inputs: int) -> float:
    """Bytes that one product reads: words; scale codes and entries of chunks; rows; columns."""
    words = float((chunks * np.arange(MAX_DEPTH + 1)).sum()) * GROUP_SIZE * 4
    return words + float(chunks.sum()) * (CHUNK + 4) + len(chunks) * GROUP_SIZE * 8 + 4 * inputs


def makespan(chains: npt.NDArray[np.float64], places: int) -> float:
    """Time until all programs are done that start in order as places become free."""
    free = [0.0] * places
    for chain in chains.tolist():
        heapq.heappush(free, heapq.heappop(free) + chain)
    return max(free)


def outside(parts: int, device: Device) -> float:
    """µs of a matrix outside its loops."""
    after = WARM_US * (KERNEL.warm_after + -(-parts // KERNEL.sums_per_access))
    return KERNEL.gap(device) + KERNEL.before(device) + after


def model_token(bits: float, device: Device) -> Token:
    """Model one token of a Llama-2-7B whose matrices all have mean depth `bits`."""
    shape = SHAPES["7b"]
    hidden, ffn = shape.hidden, shape.ffn
    layer = [("qkv", 3 * hidden, hidden), ("o", hidden, hidden)]
    layer += [("up", 2 * ffn, hidden), ("down", hidden, ffn)]
    matrices = [model_matrix(*sizes, bits, device) for sizes in layer]
    head = model_matrix("head", shape.vocabulary, hidden, bits, device)
    cache = 2 * 2 * TEXT * shape.kv_heads * (hidden // shape.heads) / device.bandwidth
    small = KERNEL.small * (KERNEL.gap(device) + SMALL_US)
    attention = KERNEL.gap(device) + ATTENTION_US + cache
    of_layer = sum(matrix.microseconds for matrix in matrices) + small + attention
    bound = sum(matrix.bound_us for matrix in matrices) + cache
    total = shape.layers * of_layer + head.microseconds
    share = (shape.layers * bound + head.bound_us) / total
    return Token(device.name, bits, (*matrices, head), total, share)


def table(tokens: Sequence[Token]) -> Iterator[str]:
    """Rows of a Markdown table, its last column for what a device will show."""
    names = [matrix.name for matrix in tokens[0].matrices]
    yield f"| GPU | bits | {' | '.join(names)} | tokens/s | share of bound | measured |"
    yield f"|---|---:|{'---:|' * len(names)}---:|---:|---:|"
    for token in tokens:
        cells = " | ".join(f"{m.microseconds:.1f} ({m.slowest:.1f})" for m in token.matrices)
        yield (
            f"| {token.device} | {token.bits:g} | {cells} | {1e6 / token.microseconds:.0f} "
            f"| {token.share:.0%} | |"
        )


def main() -> None:
    names = [device.name for device in DEVICES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=(2.5, 3, 4))
    parser.add_argument("--device", nargs="+", choices=names, default=names)
    parser.add_argument("--json", action="store_true", help="all figures, in one JSON line")
    options = parser.parse_args()
    devices = [device for device in DEVICES if device.name in options.device]
    tokens = [model_token(bits, device) for device in devices for bits in options.bits]
    if options.json:
        print(json.dumps([asdict(token) for token in tokens]))
    else:
        print(*table(tokens), sep="\n")


if __name__ == "__main__":
    main()
