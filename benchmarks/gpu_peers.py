"""How long kernels of others take for a shape, and how that is timed.

GemLite (Apache-2.0, tried with 0.6.0) is measured where it can be imported.  It needs nothing but
numpy, tqdm and Triton; without network, its unpacked source distribution on PYTHONPATH will do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

GEMLITE_BATCHES = (1, 16)  # it tunes itself for every shape and batch, which takes long


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


def fp16_seconds(inputs: int, outputs: int, batch: int, least_bytes: int) -> float:
    """Seconds of torch.matmul in float16."""
    x = torch.randn(batch, inputs, device="cuda", dtype=torch.float16)
    count = max(1, -(-least_bytes // (2 * inputs * outputs)))
    weights = [
        torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) for _ in range(count)
    ]
    return graph_seconds([partial(torch.matmul, x, w.t()) for w in weights])


def gemlite_seconds(inputs: int, outputs: int, batch: int, bits: int, least_bytes: int) -> float:
    """Seconds of GemLite's `bits`-bit kernel with groups of 128; raises anything if it fails."""
    from gemlite import helper

    make: Any = {4: helper.A16W4_HQQ_INT, 2: helper.A16W2_HQQ_INT}[bits]
    shape = (outputs, inputs)
    layers = []
    for _ in range(max(1, -(-least_bytes * 8 // (bits * inputs * outputs)))):
        codes = torch.randint(1 << bits, shape, dtype=torch.uint8, device="cuda")
        scales = torch.rand(codes.numel() // 128, 1, device="cuda", dtype=torch.float16)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        layers.append(make(device="cuda", dtype=torch.float16).from_weights(codes, scales, zeros))
    x = torch.randn(batch, inputs, device="cuda", dtype=torch.float16)
    layers[0](x)  # tunes itself
    return graph_seconds([partial(layer, x) for layer in layers])


class Peers:
    """Times of the other kernels, each measured once per shape and batch."""

    def __init__(self, least_bytes: int, gemlite_budget: float):
        """least_bytes: of the copies that take turns; gemlite_budget: seconds for GemLite."""
        self.least_bytes = least_bytes
        self.gemlite_left = gemlite_budget
        self.known: dict[tuple[int, int, int, str], float | None] = {}
        self.complaints: dict[str, None] = {}

    def seconds(self, inputs: int, outputs: int, batch: int, kind: str) -> float | None:
        """Seconds of "fp16", "gemlite 4" or "gemlite 2"; None where there are none."""
        shape = (inputs, outputs, batch)
        key = (*shape, kind)
        if key not in self.known:
            self.known[key] = (
                fp16_seconds(*shape, self.least_bytes)
                if kind == "fp16"
                else self._gemlite(shape, int(kind[-1]))
            )
        return self.known[key]

    def _gemlite(self, shape: tuple[int, int, int], bits: int) -> float | None:
        if shape[2] not in GEMLITE_BATCHES or self.gemlite_left <= 0:
            return None
        begin = time.monotonic()
        try:
            return gemlite_seconds(*shape, bits, self.least_bytes)
        except Exception as error:  # a peer's failure must cost its column only
            self.complaints[f"GemLite at {bits} bits: {type(error).__name__}: {error}"] = None
            return None
        finally:
            self.gemlite_left -= time.monotonic() - begin
            if self.gemlite_left <= 0:
                self.complaints["GemLite: no time was left for its tuning of more shapes"] = None
