"""Run by test_vllm_parts.py with Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cvxq.integrations.vllm import products
from cvxq.integrations.vllm.products import GpuProduct, Part
from cvxq.integrations.vllm.shares import share
from cvxq_format import Codebook, CompandedTensor, dequantize

BOOK = Codebook.default()


@pytest.mark.parametrize("outputs", [40, 48])
def test_shares_of_two_matrices_in_one(
    outputs: int, random_companded: Callable[..., CompandedTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products.cuda, "runs_kernels", lambda device: True)
    tensors = [random_companded((64, 32), seed, partitions=1, group_size=16) for seed in (1, 2)]
    parts = [Part(share(tensor, "rows", 8, 28), BOOK, 20) for tensor in tensors]
    product = GpuProduct(parts, outputs, torch.device("cpu"), torch.float32)
    whole = torch.cat([torch.from_numpy(dequantize(t, BOOK))[8:28] for t in tensors])
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.pad(x @ whole.T, (0, outputs - 40))
    found = product.matmul(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert product.rows(torch.tensor([19, 0]), torch.float32).equal(whole[[19, 0]])
