"""The way of a GPU from a file to tokens, on a device that is none; see `conftest.FakeDevice`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxq
import pytest
import torch
from cvxq.lean.cuda.decoder import TorchDecoder

MakeFile = Callable[..., Any]
IDS = [(7 * index + 3) % 96 for index in range(40)]
FAMILIES = ("llama", "gemma2", "gpt2", "qwen2-window")


def expected_logits(made: Any, ids: list[int] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = made.network(input_ids=torch.tensor([ids])).logits[0].float()
    return logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_from_file_to_tokens(kind: str, make_file: MakeFile, fake_device: Any) -> None:
    """Within bfloat16's error of float32 logits."""
    made = make_file(kind)
    expected = expected_logits(made)
    bound = 0.1 * float(expected.abs().max())
    with cvxq.load(made.path, device="cuda") as model:
        decoder = model.decoder
        assert isinstance(decoder, TorchDecoder)
        assert model.device == "cuda:0"
        assert fake_device.calls == ["tune torch.bfloat16"]
        assert any(
            type(weight).__name__ == "StandIn" for weight in decoder.network.weights.multiplied()
        )
        assert float((decoder.logits(IDS) - expected).abs().max()) < bound
        decoder.cache.grow(16, 0)
        decoder.feed(IDS[:15])
        fake_device.calls.clear()
        for index in (15, 16):  # the second makes the cache grow, which moves what was captured
            logits = decoder.feed(IDS[index : index + 1])
            assert float((logits - expected[index]).abs().max()) < bound
        assert fake_device.calls == ["capture thread_local", "replay"] * 2
