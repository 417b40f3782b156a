"""The way of a GPU from `load` to tokens, on a device that is none, kernels interpreted.

Run by `test_fake_device.py` in a process of its own, since Triton chooses between interpreter and
compiler when it is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cvxq
import pytest
import torch
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.sample import SamplingSettings
from cvxq_kernels.gpu import GpuWeight

MakeFile = Callable[..., Any]
IDS = [(7 * index + 3) % 96 for index in range(40)]


def expected_logits(made: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = made.network(input_ids=torch.tensor([ids])).logits[0].float()
    return logits


@pytest.mark.parametrize("kind", ["llama"])
def test_from_file_to_tokens(kind: str, make_file: MakeFile, fake_device: Any) -> None:
    made = make_file(kind)
    t = time.time()
    with cvxq.load(made.path, device="cuda") as model:
        print("load", time.time() - t)
        decoder = model.decoder
        assert isinstance(decoder, TorchDecoder)
        assert model.device == "cuda:0"
        assert any(isinstance(weight, GpuWeight) for weight in decoder.network.weights.multiplied())
        expected = expected_logits(made, IDS)
        bound = 0.05 * float(expected.abs().max())
        t = time.time()
        assert float((decoder.logits(IDS) - expected).abs().max()) < bound
        print("logits", time.time() - t)
        t = time.time()
        decoder.cache.grow(16, 0)
        decoder.feed(IDS[:15])
        for index in (15, 16):  # the second makes the cache grow
            logits = decoder.feed(IDS[index : index + 1])
            assert float((logits - expected[index]).abs().max()) < bound
        assert [call for call in fake_device.calls if call != "wait"] == [
            "capture thread_local", "replay", "capture thread_local", "replay",
        ]  # fmt: skip
        print("feed", time.time() - t)
        t = time.time()
        drawn = decoder.draw(SamplingSettings(seed=1, top_k=5, top_p=0.9), IDS[:17])
        assert all(0 <= next(drawn) < 96 for _ in range(2))
        assert fake_device.calls.count("capture thread_local") == 3
        print("draw", time.time() - t)
