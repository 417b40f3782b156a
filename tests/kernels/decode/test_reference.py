"""The plain operations hold no more than they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cvxq_kernels.decode import reference
from torch.nn import functional

TOKENS, HEADS, KV_HEADS, WIDTH, LENGTH = 6, 4, 2, 8, 16


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, HEADS, WIDTH, generator=generator)
    keys, values = torch.randn(2, KV_HEADS, LENGTH, WIDTH, generator=generator)
    mask = reference.visible(torch.arange(LENGTH), torch.arange(4, 4 + TOKENS), None)
    return q, keys, values, mask


def by_head(softcap: float | None) -> torch.Tensor:
    """Attention of one head after the other, from the formula."""
    q, keys, values, mask = tensors()
    results = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = q[:, head] @ keys[shared].t() * 0.3
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        results.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values[shared])
    return torch.stack(results, 1).reshape(TOKENS, -1)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention(softcap: float | None) -> None:
    found = reference.attend(*tensors(), 0.3, softcap)
    torch.testing.assert_close(found, by_head(softcap), atol=1e-6, rtol=0)


def test_masks_and_keys_are_not_repeated_for_the_heads_of_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, keys, values, mask = tensors()
    plain, seen = functional.scaled_dot_product_attention, []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.extend(tensor.data_ptr() for tensor in arguments[1:])
        return plain(*arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    reference.attend(q, keys, values, mask, 0.3, None)
    assert seen == [keys.data_ptr(), values.data_ptr(), mask.data_ptr()]


def test_soft_capped_scores_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCORES", 2 * HEADS * LENGTH)
    plain, sizes = torch.Tensor.softmax, []

    def watched(scores: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(scores.numel())
        return plain(scores, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    found = reference.attend(*tensors(), 0.3, 1.5)
    assert sizes == [2 * HEADS * LENGTH] * 3
    torch.testing.assert_close(found, by_head(1.5), atol=1e-6, rtol=0)
