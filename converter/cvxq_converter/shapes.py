"""The sizes of a model that the costs of converting it depend on."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cvxq_format.model_config import context_length, expert_pool, routed_share

from cvxq_converter.source.checkpoint import Source
from cvxq_converter.source.loaded import matches

_IN_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")  # in the name of a tensor of one of many blocks


@dataclass(frozen=True)
class Shape:
    """Numbers of weights, and dimensions of activations.

    What is said to be for a token counts experts by the share of them that it is routed to.
    """

    parameters: int
    matrix_weights: int
    weights_for_a_token: float
    routed_matrices: int
    quantized_weights: int
    outside_weights: int  # of matrices outside of the blocks
    block_weights: int  # of the largest block
    largest_weights: int
    largest_inputs: int
    inputs: int  # summed over the matrices
    matrices: int  # to quantize
    squared_inputs: int  # Σ K²
    block_matrices: int  # of the block that has most of them
    block_squared_inputs: int  # of the block in which that is most
    pooled_squares: int  # Σ K² over the pools of experts that do the same
    squared_inputs_for_a_token: float
    pushed: int  # Σ N K²
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    context: int | None


def shape_of(source: Source, keep: tuple[str, ...] = ()) -> Shape:
    text = source.config.get_text_config()

    def find(*names: str) -> int:
        values = [getattr(text, name, None) for name in names]
        return next((v for v in values if isinstance(v, int) and v > 0), 0)

    matrices = [(name, shape) for name, info in source.tensors.items() for shape in _matrices(info)]
    quantized = [shape for name, shape in matrices if not matches(name, keep)]
    inputs = [columns for _, columns in quantized]
    share = routed_share(text.to_dict())
    routed = {name for name, i in source.tensors.items() if len(i.shape) == 3 or expert_pool(name)}
    outside, blocks, active, squares = 0, Counter[str](), 0.0, 0.0
    counts, of_blocks, pools = Counter[str](), Counter[str](), dict[str, int]()
    for name, (rows, columns) in matrices:
        used = share if name in routed else 1.0
        active += used * rows * columns
        block = _IN_BLOCK.search(name)
        if not matches(name, keep):
            squares += used * columns**2
            of_blocks[block[1] if block else ""] += columns**2
            counts[block[1] if block else ""] += 1
            if name in routed:
                pools[expert_pool(name) or name] = columns**2
        if block is None:
            outside += rows * columns
        else:
            blocks[block[1]] += rows * columns
    hidden = find("hidden_size", "n_embd", "d_model")
    return Shape(
        parameters=source.parameters,
        matrix_weights=sum(n * k for _, (n, k) in matrices),
        weights_for_a_token=active,
        routed_matrices=sum(name in routed for name, _ in matrices),
        quantized_weights=sum(n * k for n, k in quantized),
        outside_weights=outside,
        block_weights=max(blocks.values(), default=0),
        largest_weights=max((n * k for n, k in quantized), default=0),
        largest_inputs=max(inputs, default=0),
        inputs=sum(inputs),
        matrices=len(quantized),
        squared_inputs=sum(k * k for k in inputs),
        block_matrices=max(counts.values(), default=0),
        block_squared_inputs=max(of_blocks.values(), default=0),
        pooled_squares=sum(pools.values()),
        squared_inputs_for_a_token=squares,
        pushed=sum(n * k * k for n, k in quantized),
        layers=find("num_hidden_layers", "n_layer"),
        hidden=hidden,
        inner=find("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden,
        vocabulary=find("vocab_size"),
        context=context_length(source.config.get_text_config().to_dict()),
    )


def _matrices(info: Any) -> list[tuple[int, int]]:
    """The shapes of the matrices in a tensor: of one, of a stack of them, or of none."""
    if len(info.shape) not in (2, 3) or min(info.shape[-2:]) < 2:
        return []
    return [info.shape[-2:]] * (info.shape[0] if len(info.shape) == 3 else 1)
