"""The runtime's modules over a weight in the layout of the GPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cvxq.modules import LazyWeight, pack_module
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import GpuWeight
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Make = Callable[..., PackedWeight]


@pytest.fixture
def packed(make: Make) -> PackedWeight:
    return make((16, 12), 6)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_linear_modules_multiply_in_place(
    packed: PackedWeight, device: torch.device, kind: type[nn.Module]
) -> None:
    module = nn.Linear(12, 16) if kind is nn.Linear else Conv1D(16, 12)
    bias = module.bias.detach().normal_()
    pack_module(module, packed, torch.float32)
    x = torch.randn(2, 3, 12)
    expected = functional.linear(x, packed.dense(), bias)
    module.to(device).hold(GpuWeight.from_packed(packed, device), torch.float32)  # type: ignore[operator]
    with torch.no_grad():
        y = module(x.to(device)).cpu()
    assert y.shape == (2, 3, 16)
    assert float((y - expected).norm() / expected.norm()) < 1e-3
    lazy = module.weight
    assert isinstance(lazy, LazyWeight)
    assert torch.equal((lazy + 0).cpu(), packed.dense().t() if kind is Conv1D else packed.dense())


def test_gradients_pass_through_the_expanded_weight(
    packed: PackedWeight, device: torch.device
) -> None:
    module = nn.Linear(12, 16, bias=False)
    pack_module(module, packed, torch.float32)
    module.hold(GpuWeight.from_packed(packed, device), torch.float32)  # type: ignore[operator]
    x = torch.randn(1, 12, device=device, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.cpu()[0], packed.dense().sum(0), atol=1e-5)


def test_an_embedding_reads_rows(packed: PackedWeight, device: torch.device) -> None:
    module = nn.Embedding(16, 12)
    pack_module(module, packed, torch.float16)
    module.hold(GpuWeight.from_packed(packed, device), torch.float16)  # type: ignore[operator]
    ids = torch.tensor([[3, 15, 0]])
    assert torch.equal(module(ids.to(device)).cpu(), packed.dense().half()[ids])


@pytest.mark.gpu
def test_modules_that_share_a_weight_share_it_on_the_device(
    packed: PackedWeight, device: torch.device
) -> None:
    head, embedding = nn.Linear(12, 16, bias=False), nn.Embedding(16, 12)
    for module in (head, embedding):
        pack_module(module, packed, torch.float16)
        module.to(device)
    assert isinstance(head.packed, GpuWeight)
    assert head.packed is embedding.packed
    assert head.to("cpu").packed.dense().device.type == "cpu"
