"""What each stage of a conversion costs in time, from a model's shapes and a machine's speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cvxq_converter.measure.calibration import sampling_batch
from cvxq_converter.shapes import Shape
from cvxq_converter.source.checkpoint import Source
from cvxq_converter.write.proof import MOST_PLACES as PROOF_PLACES

_OPERATIONS_PER_LAYER = 50  # small tensor operations of one block, forward
_OPERATIONS_PER_EXPERT = 4  # of one matrix of it, forward
_OPERATIONS_PER_COLUMN = 120  # small tensor operations for each column, with feedback
_SAMPLING = 1.5  # times what the same products take where they are large
_QUANTIZER_PASSES = 45  # element-wise passes per weight: 13 scales, 3–4 passes each


@dataclass(frozen=True)
class Speed:
    """What a machine does per second, and how long it takes to start one operation."""

    flops: float  # matrix products
    elements: float  # element-wise, one pass
    call_seconds: float


def measure_speed(dtype: torch.dtype, device: str) -> Speed:
    """Time matrix products, element-wise passes and small operations for a fraction of a second."""
    a = torch.randn(256, 1024, device=device).to(dtype)
    b = torch.randn(1024, 1024, device=device).to(dtype)
    flat, edges = torch.randn(1 << 18, device=device), torch.linspace(-1, 1, 7, device=device)
    small = torch.ones(8, device=device)
    product = _best_seconds(lambda: a @ b, device)
    passes = _best_seconds(lambda: torch.bucketize(flat, edges), device)
    call = _best_seconds(lambda: small + small, device)
    return Speed(2 * 256 * 1024 * 1024 / product, flat.numel() / passes, call)


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def backward_seconds(shape: Shape, speed: Speed, tokens: int) -> float:
    """Forward, again, and back over one sequence: 6 operations per weight and token."""
    attention = 12 * shape.layers * shape.hidden * tokens**2
    flops = 6.0 * shape.weights_for_a_token * tokens + attention
    calls = 3 * _operations(shape) * speed.call_seconds
    return flops / speed.flops + calls


def _operations(shape: Shape) -> int:
    """Small tensor operations, forward, where every expert is come to."""
    of_experts = shape.routed_matrices * _OPERATIONS_PER_EXPERT
    return shape.layers * _OPERATIONS_PER_LAYER + of_experts


def sampling_seconds(
    source: Source,
    shape: Shape,
    speed: Speed,
    origin: str,
    count: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
) -> float:
    """One forward step per position and batch, below the rate of large products; none of a text."""
    if origin not in ("self", "copy"):
        return 0.0
    flops = _SAMPLING * 2.0 * shape.weights_for_a_token * count * tokens
    if origin == "copy":  # by a decoder that hardly pays for small operations
        return flops / speed.flops
    batches = -(-count // sampling_batch(source.config, tokens, dtype.itemsize))
    return batches * tokens * _operations(shape) * speed.call_seconds + flops / speed.flops


def quantizing_seconds(shape: Shape, speed: Speed, group_size: int) -> float:
    clusters = shape.quantized_weights / group_size / max(1, shape.hidden)
    calls = clusters * 5 * 13 * 12 * speed.call_seconds  # a few depths in each
    return calls + _QUANTIZER_PASSES / 3 * shape.quantized_weights / speed.elements


def feedback_seconds(shape: Shape, speed: Speed, tokens: int) -> tuple[float, float]:
    """Of Hessians and their factors, once; and of pushing errors on, for every quantization."""
    factors = 2.0 * shape.squared_inputs * shape.largest_inputs  # in float64, half as fast
    calls = shape.inputs * _OPERATIONS_PER_COLUMN * speed.call_seconds
    once = moments_seconds(shape, speed, tokens) + factors / speed.flops
    return once, calls + shape.pushed / speed.flops


def moments_seconds(shape: Shape, speed: Speed, tokens: int) -> float:
    """Of the sums that Hessians are, with one more way forward."""
    operations = shape.squared_inputs_for_a_token + shape.weights_for_a_token
    return 2.0 * operations * tokens / speed.flops


def proving_seconds(shape: Shape, speed: Speed) -> float:
    """One text through the network and through the decoder, twice where windows are long."""
    products = 2 * 2 * 2.0 * shape.weights_for_a_token * PROOF_PLACES / speed.flops
    return products + 2 * _operations(shape) * speed.call_seconds
