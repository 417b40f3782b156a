"""Mixtures of experts all the way: packed experts compute what transformers does with the file's
weights, put back into its own stacks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cvxq
import pytest
import torch
from click.testing import CliRunner
from cvxq.cli.application import application
from cvxq.lean import record_of
from cvxq.lean.native_decoder import NativeDecoder
from cvxq.modules import PackedLinear
from cvxq.network import weight_bytes_per_token
from cvxq.summary import summarize
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_format import CompandedTensor, Reader, dequantize, verify
from cvxq_format.decoder_record import DecoderRecord
from cvxq_kernels import cpu

IDS = torch.arange(3, 43)[None]


pytestmark = pytest.mark.usefixtures("one_thread")


def converted(network: Any, folder: Path, **options: Any) -> Path:
    network.save_pretrained(folder / "original")
    path = folder / "a.cvxq"
    chosen = {"bits": 4.0, "group_size": 16, "partitions": 1, "calibration": "none", **options}
    convert(str(folder / "original"), path, ConversionOptions.of(**chosen))
    assert verify(path) == []
    return path


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Every tensor of a file as float32 by its name, and which are gained biases."""
    found = {}
    with Reader(path) as reader:
        for name in reader.names:
            value = reader.read(name)
            if isinstance(value, CompandedTensor):
                found[name] = torch.from_numpy(dequantize(value, reader.codebook(0)))
            else:
                found[name] = torch.from_numpy(value.to_float32().reshape(value.shape).copy())
        return found, set(reader.added_biases)


def restacked(tensors: dict[str, torch.Tensor], in_out: bool) -> dict[str, torch.Tensor]:
    """The tensors as the source has them: NAME.e, NAME.e.gate and NAME.e.up are slices of NAME."""
    state, parts = {}, {}
    for name, value in tensors.items():
        found = re.fullmatch(r"(.+)\.(\d+)(?:\.(gate|up))?", name)
        if found is None:
            state[name] = value
        else:
            parts.setdefault(found[1], {})[int(found[2]), found[3]] = value
    for name, values in parts.items():
        slices = []
        for expert in range(1 + max(e for e, _ in values)):
            if (expert, None) in values:
                rows = values[expert, None]
            elif in_out:  # gpt-oss, where gates and what they gate take turns
                both = values[expert, "gate"], values[expert, "up"]
                rows = torch.stack(both, 1).flatten(0, 1)
            else:
                rows = torch.cat((values[expert, "gate"], values[expert, "up"]))
            slices.append(rows.T if in_out and rows.ndim == 2 else rows)
        state[name] = torch.stack(slices)
    return state


def expected_logits(path: Path, network: Any) -> torch.Tensor:
    """By transformers alone, in float64, with the tensors of the file."""
    tensors, gained = tensors_of(path)
    biases = {name: tensors.pop(name) for name in gained}
    state = restacked(tensors, in_out="GptOss" in type(network).__name__)
    config = network.config
    config._experts_implementation = "eager"
    reference = type(network).from_pretrained(None, config=config, state_dict=state).double()
    for name, value in biases.items():
        owner = name.removesuffix(".bias").replace("block_sparse_moe", "mlp")
        reference.get_submodule(owner).bias = torch.nn.Parameter(value.double())
    with torch.no_grad():
        logits: torch.Tensor = reference.eval()(IDS, use_cache=False).logits
    return logits


def test_packed_experts_compute_what_transformers_does_with_the_files_weights(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    network = build_mixture(family)
    path = converted(network, tmp_path)
    packed = cvxq.load(path, dtype=torch.float64).network
    experts = [m for name, m in packed.named_modules() if re.search(r"experts\.\d+\.\w+$", name)]
    assert experts
    assert all(isinstance(m, PackedLinear) for m in experts)
    with torch.no_grad():
        found = packed(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected_logits(path, network), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_measured_experts_lose_less_than_those_that_were_not(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    network = build_mixture(family)
    (tmp_path / "none").mkdir()
    plain = converted(network, tmp_path / "none", bits=3.0)
    (tmp_path / "self").mkdir()
    measured = converted(
        network, tmp_path / "self", bits=3.0, calibration="self", sequences=8, length=24
    )
    with torch.no_grad():
        wanted = network(IDS, use_cache=False).logits.double()
        errors = [(expected_logits(p, network) - wanted).square().mean() for p in (plain, measured)]
    assert errors[1] < 0.8 * errors[0]
    found = cvxq.load(measured, dtype=torch.float64).network(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected_logits(measured, network), rtol=0, atol=1e-9)


@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe", "GptOss", "GraniteMoe"])
def test_the_native_decoder_runs_what_conversion_proved(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    network = build_mixture(family)
    path = converted(network, tmp_path)
    decoder = cvxq.load(path).decoder
    assert isinstance(decoder, NativeDecoder)
    wanted = expected_logits(path, network)[0]
    with Reader(path) as reader:
        exact = NativeDecoder(record_of(reader), reader, 1, exact=True)
    tokens = IDS[0].tolist()
    torch.testing.assert_close(
        torch.from_numpy(exact.logits(tokens)).double(), wanted, rtol=0, atol=1e-4
    )
    exact.rewind(0)
    for token, logits in zip(tokens[:8], wanted, strict=False):  # one by one, the same
        found = torch.from_numpy(exact.feed([token])).double()
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
def test_a_token_reads_only_the_experts_that_it_goes_through(
    build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    with Reader(converted(build_mixture("Mixtral"), tmp_path)) as reader:
        record = record_of(reader)
        read = [
            NativeDecoder(_choosing(record, chosen), reader, 1).bytes_per_token
            for chosen in (1, 2, 4)
        ]
    assert read[1] - read[0] == pytest.approx((read[2] - read[1]) / 2, abs=1)
    assert read[0] < 0.6 * read[2]


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_inspect_counts_the_parameters_that_a_token_uses(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    network = build_mixture(family)
    experts = sum(p.numel() for n, p in network.named_parameters() if ".experts." in n)
    everything = sum(p.numel() for p in network.parameters())
    path = converted(network, tmp_path)
    summary = summarize(path)
    unused = 4 / 6 if family == "Qwen3Moe" else 2 / 4
    assert summary.parameters == everything
    assert summary.active_parameters == round(everything - unused * experts)
    shown = CliRunner().invoke(application, ["inspect", str(path)]).output
    assert f"{everything:,} parameters, {summary.active_parameters:,} of them for each tok" in shown
    pool = "experts.*.up_proj.weight" if family == "Qwen3Moe" else "experts.gate_up_proj.*.up"
    (line,) = [line for line in shown.splitlines() if f"model.layers.1.mlp.{pool}" in line]
    assert f"{6 if family == 'Qwen3Moe' else 4}×24×32" in line
    assert sum(matrix.weights for matrix in summary.pooled_matrices) == summary.weights


def _choosing(record: DecoderRecord, chosen: int) -> DecoderRecord:
    layers = []
    for layer in record.layers:
        experts = layer.feed_forward.experts
        assert experts is not None
        block = replace(layer.feed_forward, experts=replace(experts, chosen=chosen))
        layers.append(replace(layer, feed_forward=block))
    return replace(record, layers=tuple(layers))


@pytest.mark.parametrize("family", ["Qwen2Moe", "DeepseekV3"])
def test_what_is_not_described_runs_through_transformers(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    model = cvxq.load(converted(build_mixture(family), tmp_path))
    assert model.decoder is None
    assert "is not described" in str(model.transformers_reason)


def test_only_the_experts_that_are_routed_to_are_multiplied_and_counted(
    build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    network = cvxq.load(
        converted(build_mixture("Qwen3Moe"), tmp_path), dtype=torch.bfloat16
    ).network
    experts = network.model.layers[0].mlp.experts
    ran: list[str] = []
    for name, module in experts.named_modules():
        if isinstance(module, PackedLinear):
            module.forward = _noting(ran, name, module.forward)
    with torch.no_grad():
        network(IDS[:, :1], use_cache=False)
    assert len({name.split(".")[0] for name in ran}) == 2
    assert len(ran) == 6
    held = sum(m.weight_bytes for m in network.modules() if isinstance(m, PackedLinear))
    of_experts = sum(
        m.weight_bytes
        for layer in network.model.layers
        for m in layer.mlp.experts.modules()
        if isinstance(m, PackedLinear)
    )
    others = sum(p.nbytes for p in network.parameters())
    embedding = network.model.embed_tokens
    row = embedding.weight_bytes // embedding.num_embeddings
    read = held - of_experts * 4 / 6 + others + row
    assert weight_bytes_per_token(network) == pytest.approx(read, abs=1)


def _noting(ran: list[str], name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def note(x: torch.Tensor) -> torch.Tensor:
        ran.append(name)
        result: torch.Tensor = forward(x)
        return result

    return note


def test_a_file_of_experts_generates_with_either_weights(
    build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    path = converted(build_mixture("Olmoe"), tmp_path)
    texts = [cvxq.load(path, weights=w, dtype=torch.float64) for w in ("packed", "dense")]
    drawn = [m.network.generate(IDS[:, :4], max_new_tokens=8, do_sample=False) for m in texts]
    assert torch.equal(drawn[0], drawn[1])
