"""Experts as matrices: names of the source, routers left alone, MXFP4, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cvxq_converter.errors import ConversionError
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Build = Callable[..., Any]
OPTIONS = ConversionOptions.of(bits=4)


def load(network: Any, folder: Path) -> LoadedModel:
    network.save_pretrained(folder)
    return load_model(open_source(str(folder)), OPTIONS)


@pytest.mark.parametrize(
    ("family", "experts", "other"),
    [
        (
            "Mixtral",
            ("block_sparse_moe.experts.3.w1.weight", "block_sparse_moe.experts.3.w2.weight"),
            "block_sparse_moe.gate.weight",
        ),
        (
            "Qwen2Moe",
            ("mlp.experts.3.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
            "mlp.shared_expert_gate.weight",
        ),
        (
            "GraniteMoe",
            (
                "block_sparse_moe.input_linear.weight.3.up",
                "block_sparse_moe.output_linear.weight.3",
            ),
            "block_sparse_moe.router.layer.weight",
        ),
        (
            "GptOss",
            ("mlp.experts.gate_up_proj.3.gate", "mlp.experts.down_proj.3"),
            "mlp.experts.gate_up_proj_bias.3.up",
        ),
        ("Phimoe", ("block_sparse_moe.experts.3.w3.weight",), "block_sparse_moe.gate.weight"),
    ],
)
def test_matrices_of_experts_have_the_names_of_the_source(
    family: str, experts: tuple[str, ...], other: str, build_mixture: Build, tmp_path: Path
) -> None:
    loaded = load(build_mixture(family), tmp_path)
    matrices = {m.name: m for m in loaded.matrices}
    raw = dict(loaded.unquantized())
    assert {f"model.layers.1.{name}" for name in experts} <= matrices.keys()
    assert f"model.layers.1.{other}" in raw
    assert loaded.leftovers is None
    assert loaded.parameters == sum(t.numel() for t in [*loaded.originals.values(), *raw.values()])


def test_stacked_matrices_are_the_slices_of_the_source(
    build_mixture: Build, tmp_path: Path
) -> None:
    network = build_mixture("GptOss")
    stack = network.model.layers[0].mlp.experts.gate_up_proj.data.clone()  # (E, K, 2 N)
    loaded = load(network, tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj.2"
    assert torch.equal(loaded.originals[f"{name}.gate"], stack[2, :, ::2].T)
    assert torch.equal(loaded.originals[f"{name}.up"], stack[2, :, 1::2].T)
    (matrix,) = [m for m in loaded.matrices if m.name == f"{name}.up"]
    assert matrix.source_orientation == "in_out"
    assert matrix.has_bias
    assert matrix.bias_name == "model.layers.0.mlp.experts.gate_up_proj_bias.2.up"
    assert matrix.pool == "model.layers.0.mlp.experts.up_proj"


def test_mxfp4_becomes_what_transformers_makes_of_it(build_mixture: Build, tmp_path: Path) -> None:
    build_mixture("GptOss", hidden_size=64, intermediate_size=32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    expected = {}
    for name in [n for n in weights if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(117, 125, (experts, outputs, inputs // 32), dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(config))
    source = open_source(str(tmp_path))
    assert "4 of its stacks of experts are MXFP4" in source.notices[0]
    loaded = load_model(source, OPTIONS)
    for name, stack in expected.items():
        assert torch.equal(source.read(name), stack)
        part = f"{name}.1" if "down" in name else f"{name}.1.gate"
        wanted = stack[1].T if "down" in name else stack[1, :, ::2].T
        assert torch.equal(loaded.originals[part], wanted.float())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "Dbrx",
            {"d_model": 32, "n_heads": 4, "n_layers": 1, "attn_config": {"rope_theta": 1e4}},
        ),
        ("JetMoe", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 24}),
        ("Llama4Text", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 24}),
    ],
)
def test_experts_of_another_kind_are_refused_in_one_line(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = getattr(transformers, f"{kind}Config")(vocab_size=96, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="transformers' interface for experts") as caught:
        load_model(open_source(str(tmp_path)), OPTIONS)
    assert len(str(caught.value).splitlines()) == 1
