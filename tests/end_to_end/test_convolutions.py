"""Layers that mix a few places by a convolution: converted with it as it is, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cvxq
import pytest
import torch
import transformers
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_format import CompandedTensor, RawTensor, Reader

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention"] * 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def test_convolutions_are_kept_and_the_rest_is_quantized(tmp_path: Path) -> None:
    if not hasattr(transformers, "Lfm2Config"):
        pytest.skip(f"transformers {transformers.__version__} has no network of this kind")
    torch.manual_seed(0)
    config = transformers.Lfm2Config(**SIZES)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    network.save_pretrained(tmp_path / "model")
    path = tmp_path / "a.cvxq"
    report = convert(
        str(tmp_path / "model"),
        path,
        ConversionOptions.of(bits=8, sequences=4, length=16, group_size=16),
    )
    assert report.kl is not None
    assert report.kl < 1e-4
    with Reader(path) as reader:
        kept = reader.read("model.layers.0.conv.conv.weight")
        assert isinstance(kept, RawTensor)
        assert kept.shape == (64, 1, 3)
        assert isinstance(reader.read("model.layers.0.conv.in_proj.weight"), CompandedTensor)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad(), cvxq.load(path) as model:
        expected = network(ids).logits
        found = model.network(ids).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
