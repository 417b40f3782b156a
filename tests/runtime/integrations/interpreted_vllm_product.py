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


def test_shares_of_two_matrices_in_one(
    random_companded: Callable[..., CompandedTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products.cuda, "runs_kernels", lambda device: True)
    tensors = [random_companded((16, 16), seed, partitions=1, group_size=8) for seed in (1, 2)]
    parts = [Part(share(tensor, "rows", 4, 10), BOOK, 6) for tensor in tensors]
    product = GpuProduct(parts, 16, torch.device("cpu"), torch.float32)
    whole = torch.cat([torch.from_numpy(dequantize(t, BOOK))[4:10] for t in tensors])
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.pad(x @ whole.T, (0, 4))
    found = product.matmul(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
