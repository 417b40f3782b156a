"""The torch decoder with packed weights and fused kernels, all run by Triton's interpreter.

Run by `test_interpreted_decoder.py` in a process of its own, since Triton chooses between
interpreter and compiler when it is imported.  This is a GPU's decoder but for the graph: matrices
stay packed, the step's length is known to the device only.  One layer and one token, because the
interpreter takes minutes for more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from cvxq.lean import record_of
from cvxq.lean.cuda.network import KeyValueCache, TorchNetwork
from cvxq.lean.cuda.weights import DenseWeight, Weight, load_weights
from cvxq_format import Reader
from cvxq_kernels import PackedWeight
from cvxq_kernels.decode import launch
from cvxq_kernels.gpu import GpuWeight

CPU = torch.device("cpu")
TOKEN = 3


def test_logits_equal_transformers(make_file: Callable[..., Any]) -> None:
    """Up to the rounding of activations to int8: a few percent of the logits' size."""
    made = make_file("qwen2")
    made.network.model.layers = made.network.model.layers[:1]
    with torch.inference_mode():
        expected = made.network(input_ids=torch.tensor([[TOKEN]])).logits[0].float()

    def pack(weights: Sequence[PackedWeight]) -> Weight:
        return GpuWeight.fused(weights, CPU)

    with Reader(made.path) as reader:
        record = record_of(reader)
        weights = load_weights(record, reader, CPU, torch.float32, pack)
    assert isinstance(weights.embedding, GpuWeight | DenseWeight)
    assert any(
        isinstance(part, GpuWeight)
        for layer in weights.layers
        for linear in (layer.qkv, layer.o, layer.blocks[0].up, layer.blocks[0].down)
        for part in linear.weights
    )
    one = replace(weights, layers=weights.layers[:1])
    record = replace(record, layers=record.layers[:1])
    network = TorchNetwork(record, one, CPU, torch.float32)
    network._ops = launch
    cache = KeyValueCache(record, 64, CPU, torch.float32)
    with torch.inference_mode():
        logits = network.forward(torch.tensor([TOKEN]), torch.tensor([0]), cache, None)
    assert float((logits - expected).abs().max()) < 0.05 * float(expected.abs().max())
