"""What the way from a file to tokens takes of a device's memory, by every allocation.

The models are tiny, so the constants that bound temporary tensors are made smaller with them: the
promise of 512 MiB beside weights, keys and values becomes 32 KiB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cvxq
import pytest
import torch
from cvxq.lean.cuda import decoder as cuda_decoder
from cvxq.lean.cuda import opening
from cvxq.sample import SamplingSettings
from cvxq_kernels import gpu
from cvxq_kernels.decode import reference
from cvxq_kernels.gpu import repack
from cvxq_kernels.gpu.weight import GpuWeight

MakeFile = Callable[..., Any]
SMALLER = 1 << 14
IDS = [(7 * index + 3) % 96 for index in range(60)]


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_decoder, "LOGITS", cuda_decoder.LOGITS // SMALLER)
    monkeypatch.setattr(reference, "SCORES", reference.SCORES // SMALLER)
    monkeypatch.setattr(cuda_decoder, "PREFILL_TOKENS", 8)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "qwen2-window", "mixtral"])
def test_prompts_scores_and_answers_take_the_working_bytes_at_most(
    kind: str, make_file: MakeFile, fake_device: Any, live_bytes: Any
) -> None:
    """Gemma 2's scores are capped, so that no fused attention bounds them."""
    with cvxq.load(make_file(kind).path, device="cuda") as model:
        decoder = model.decoder
        decoder.prefill_tokens = 8
        held = decoder.network.weights.matrix_bytes() + decoder.cache.nbytes
        allowed = held // 10 + opening.WORKING_BYTES // SMALLER
        expanded = sum(weight.values.nbytes for weight in decoder.network.weights.multiplied())
        with live_bytes() as account:
            decoder.feed(IDS)
            tokens = decoder.draw(SamplingSettings(temperature=0.7, top_p=0.9, seed=1), IDS)
            for _ in range(3):
                next(tokens)
            tokens.close()
            logits = decoder.logits(IDS)  # in main memory, which the account cannot tell apart
    # The stand-ins for packed weights expand a matrix to bfloat16 at every use, the largest here.
    assert account.most <= allowed + logits.nbytes + expanded // 2


def test_packed_bytes_go_to_the_device_once(
    make_file: MakeFile, fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real way of arranging, but for the kernel that moves codes; no step is run."""

    class NoKernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **named: None

    monkeypatch.setattr(gpu, "GpuWeight", GpuWeight)
    monkeypatch.setattr(repack, "repack_kernel", NoKernel())
    monkeypatch.setattr(opening, "tune_alike", lambda weights, dtype, step: None)
    made = make_file("llama")
    with cvxq.load(made.path, device="cuda") as model:
        weights = model.decoder.network.weights
        assert any(isinstance(weight, GpuWeight) for weight in weights.multiplied())
        packed = {name: count for name, count in fake_device.moved.items() if name[1] >= 256}
    assert packed
    assert set(packed.values()) == {1}


def test_the_account_of_moves_counts_them(fake_device: Any) -> None:
    tensor = torch.zeros(300, dtype=torch.uint8)
    tensor.to("cuda:0")
    tensor.to(torch.device("cuda", 0), torch.float32)
    tensor.to(torch.float32)
    assert fake_device.moved == Counter({(tensor.data_ptr(), 300): 2})
