"""Whole conversions: the rate asked for, the file written, and the network it stands for."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cvxq
import numpy as np
import pytest
import torch
from cvxq.summary import summarize
from cvxq_converter.errors import ConversionError, RateError
from cvxq_converter.job import convert
from cvxq_converter.measure.statistics import Measuring
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.iteration import quantize_network
from cvxq_converter.write.report import ConversionReport
from cvxq_format import CompandedTensor, Reader, dequantize, verify
from cvxq_format.decoder_record import parse_record
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

RATES = (2.0, 2.1, 2.5, 3.0, 3.3, 4.0, 5.0)
Save = Callable[..., Path]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path, output: Path, progress: Any = None, **options: Any) -> ConversionReport:
    """Convert with small groups and, unless told otherwise, a very short self-calibration."""
    chosen = {"group_size": 16, "sequences": 3, "length": 12, **options}
    if "size_bytes" not in chosen:
        chosen.setdefault("bits", 4.0)
    return convert(str(folder), output, ConversionOptions.of(**chosen), progress)


def header_of(path: Path) -> dict[str, Any]:
    """The header, read with nothing but FORMAT.md's first table."""
    data = path.read_bytes()
    file_size, offset, size = struct.unpack_from("<QQQ", data, 16)
    assert file_size == len(data)
    header: dict[str, Any] = json.loads(data[offset : offset + size])
    return header


def rate_of(path: Path) -> float:
    """Bits per quantized weight of everything in the file that only quantized matrices need."""
    header = header_of(path)
    needed, weights = sum(book["size"] for book in header["codebooks"]), 0
    for tensor in header["tensors"]:
        if tensor["codec"] == "companded":
            weights += int(np.prod(tensor["shape"]))
        if tensor["codec"] == "companded" or tensor["name"] in header["added_biases"]:
            needed += tensor["size"]
    return 8 * needed / weights


def dequantized(folder: Path, path: Path) -> Any:
    """The original architecture, by transformers, with the file's weights put into it."""
    network = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with Reader(path) as reader, torch.no_grad():
        book = reader.codebook(0)
        parameters = dict(network.named_parameters(remove_duplicate=False))
        for name in reader.names:
            stored = reader.read(name)
            if isinstance(stored, CompandedTensor):
                value = torch.from_numpy(dequantize(stored, book))
            elif stored.dtype == "bf16":
                value = torch.from_numpy(stored.data.copy()).view(torch.bfloat16).float()
            else:
                value = torch.from_numpy(stored.data.astype(np.float32))
            module_name, _, kind = name.rpartition(".")
            if name in reader.added_biases:
                network.get_submodule(module_name).bias = nn.Parameter(value)
            else:
                flipped = (
                    isinstance(network.get_submodule(module_name), Conv1D) and kind == "weight"
                )
                assert parameters[name].shape == (value.T if flipped else value).shape
                parameters[name].copy_(value.T if flipped else value)
    return network


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(4))


# --- the decoder's record -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"calibration": "none"}, {"method": "rtn"}])
def test_a_file_carries_the_record_that_was_proved(
    save_network: Save, tmp_path: Path, options: dict[str, Any]
) -> None:
    report = run(save_network("llama-gqa"), tmp_path / "a.cvxq", **options)
    with Reader(tmp_path / "a.cvxq") as reader:
        record = parse_record(bytes(reader.file("decoder.json")))
        told = json.loads(bytes(reader.file("report.json")))["decoder"]
        biases = {part.bias for y in record.layers for part in (y.attention.q, y.attention.o)}
        assert set(reader.added_biases) >= biases - {None}
    assert (record.kv_heads, record.vocabulary, len(record.layers)) == (2, 96, 2)
    assert report.decoder.is_proved
    assert told == {"is_proved": True, "reason": None}


def test_without_memory_for_the_proof_a_file_has_no_record(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvxq_converter.job.allowed_memory", lambda *_: 1000)
    report = run(save_network("llama"), tmp_path / "a.cvxq", calibration="none")
    assert not report.decoder.is_proved
    assert re.fullmatch(
        r"through transformers: proving its record needs \d+ MB of memory on cpu",
        report.decoder.line(),
    )
    with Reader(tmp_path / "a.cvxq") as reader:
        assert "decoder.json" not in reader.files


# --- rate and size ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(save_network: Save) -> Path:
    """The folder of a Llama 256 wide: wide enough for side information to be small."""
    return save_network(
        "llama", hidden_size=256, intermediate_size=512, num_key_value_heads=2, vocab_size=256
    )


@pytest.fixture(scope="module")
def by_rate(
    wide: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[float, tuple[ConversionReport, Path]]:
    """That Llama at all the rates, without calibration."""
    folder = tmp_path_factory.mktemp("rates")
    options = {"calibration": "none", "group_size": 64}
    return {
        bits: (run(wide, folder / f"{bits}.cvxq", bits=bits, **options), folder / f"{bits}.cvxq")
        for bits in RATES
    }


@pytest.mark.parametrize("bits", RATES)
def test_the_rate_in_the_file_is_the_one_asked_for(by_rate: Any, bits: float) -> None:
    report, path = by_rate[bits]
    assert bits * 0.99 <= rate_of(path) <= bits  # without calibration whole clusters flip
    assert report.rate_bits_per_weight == pytest.approx(rate_of(path), rel=1e-12)
    assert report.file_bytes == path.stat().st_size


def test_more_bits_are_less_error(by_rate: Any, wide: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(wide).float()
    weights = dict(original.named_parameters())
    errors = []
    for _, path in by_rate.values():
        with Reader(path) as reader:
            companded = {n: reader.read(n) for n in reader.names}
            errors.append(
                sum(
                    float(
                        (
                            (dequantize(t, reader.codebook(0)) - weights[n].detach().numpy()) ** 2
                        ).sum()
                    )
                    for n, t in companded.items()
                    if isinstance(t, CompandedTensor)
                )
            )
    assert (np.diff(errors) < 0).all()
    # six decibels per bit at these rates, or nearly so
    assert np.log2(errors[0] / errors[-1]) / 2 / (RATES[-1] - RATES[0]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("share", [0.12, 0.2, 0.31])
def test_a_file_of_a_given_size_is_never_larger_and_hardly_smaller(
    wide: Path, tmp_path: Path, share: float
) -> None:
    original = (wide / "model.safetensors").stat().st_size
    wanted = int(original * share / 2)
    report = run(wide, tmp_path / "a.cvxq", size_bytes=wanted, calibration="none", group_size=64)
    assert 0.995 * wanted <= (tmp_path / "a.cvxq").stat().st_size <= wanted
    assert report.file_bytes == (tmp_path / "a.cvxq").stat().st_size


def test_a_file_with_gained_biases_keeps_its_size_and_rate_too(wide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.cvxq"
    report = run(wide, path, size_bytes=400_000, group_size=64, gain=0.5)
    assert 0.995 * 400_000 <= path.stat().st_size <= 400_000
    assert report.gained_biases == len(header_of(path)["added_biases"]) > 0
    report = run(wide, path, bits=3.0, group_size=64, gain=0.5)
    assert 3.0 * 0.995 <= rate_of(path) <= 3.0
    assert report.rate_bits_per_weight == pytest.approx(rate_of(path), rel=1e-12)
    assert report.gained_biases > 0


def test_targets_out_of_reach_are_refused_in_one_line(save_network: Save, tmp_path: Path) -> None:
    folder, path = save_network("llama"), tmp_path / "a.cvxq"
    with pytest.raises(RateError, match=r"^--bits 0\.1: the side information alone takes .* bits"):
        run(folder, path, bits=0.1, calibration="none")
    with pytest.raises(
        RateError, match=r"^--size 9000: even with every weight pruned .* \d+ bytes"
    ):
        run(folder, path, size_bytes=9000, calibration="none")
    for bits in (8.5, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConversionError, match=r"bits .*0 to 8"):
            run(folder, path, bits=bits, calibration="none")
    assert not list(tmp_path.iterdir())


# --- what is in the file ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "llama-gqa", "opt", "gpt2"])
def test_the_file_runs_as_the_network_with_dequantized_weights(
    architecture: str, save_network: Save, tmp_path: Path
) -> None:
    folder, path = save_network(architecture), tmp_path / "a.cvxq"
    report = run(folder, path, bits=6.0, sequences=4, length=16)
    assert not verify(path)
    expected = dequantized(folder, path)
    original = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad(), cvxq.load(path, weights="dense") as model:  # the packed one rounds inputs
        logits = model.network(tokens(), use_cache=False).logits
        reference = expected(tokens(), use_cache=False).logits
        first = original(tokens(), use_cache=False).logits
    assert (logits - reference).abs().max() <= 1e-4
    assert 1e-3 < (reference - first).pow(2).mean().sqrt() < 0.3 * first.std()  # near, not equal
    assert report.kl is not None
    assert 0 < report.kl < 1
    header = header_of(path)
    shared = {"llama-tied", "opt", "gpt2"}
    assert bool(header["aliases"]) == (architecture in shared)
    if architecture in {"opt", "gpt2"}:  # layers with a bias keep just that one
        assert set(header["added_biases"]) <= {"lm_head.bias"}


def test_kept_matrices_stay_in_16_bits(save_network: Save, tmp_path: Path) -> None:
    folder, path = save_network("llama"), tmp_path / "a.cvxq"
    keep = ("*embed_tokens*", "model.layers.1.mlp.*")
    report = run(folder, path, keep=keep, calibration="none")
    codecs = {t["name"]: t for t in header_of(path)["tensors"]}
    kept = ["model.embed_tokens.weight"]
    kept += [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    weights = AutoModelForCausalLM.from_pretrained(folder).float().state_dict()
    with Reader(path) as reader:
        for name, entry in codecs.items():
            if not name.endswith("_proj.weight") and name not in [*kept, "lm_head.weight"]:
                continue
            if name in kept:
                assert entry["dtype"] == "f16"
                assert np.abs(reader.read(name).data - weights[name].numpy()).max() < 1e-3
            else:
                assert entry["codec"] == "companded"
    quantized = [n for n, e in codecs.items() if e["codec"] == "companded"]
    assert report.matrices == len(quantized) == 7 * 2 + 2 - len(kept)
    assert report.quantized_weights == sum(weights[n].numel() for n in quantized)
    assert report.parameters == sum(w.numel() for w in weights.values())


def test_either_name_of_a_tied_matrix_keeps_it(save_network: Save, tmp_path: Path) -> None:
    folder, path = save_network("llama-tied"), tmp_path / "a.cvxq"
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        report = run(folder, path, keep=(name,), calibration="none")
        codecs = {t["name"]: t["codec"] for t in header_of(path)["tensors"]}
        assert codecs["model.embed_tokens.weight"] == "raw"
        assert report.matrices == 7 * 2
        assert header_of(path)["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
        with cvxq.load(path) as model:
            assert torch.isfinite(model.network(tokens()).logits).all()


def test_a_pattern_that_keeps_nothing_or_everything_is_refused(
    save_network: Save, tmp_path: Path
) -> None:
    folder = save_network("llama")
    with pytest.raises(ConversionError, match=r"--keep 'head\*' matches no matrix; .* are like "):
        run(folder, tmp_path / "a.cvxq", keep=("head*",), calibration="none")
    with pytest.raises(ConversionError, match="--keep leaves no matrix to quantize"):
        run(folder, tmp_path / "a.cvxq", keep=("*",), calibration="none")


def test_carried_figures_agree_with_the_file(save_network: Save, tmp_path: Path) -> None:
    path = tmp_path / "a.cvxq"
    report = run(save_network("llama"), path, bits=5.0)
    summary = summarize(path)
    carried = summary.report
    assert carried is not None
    assert carried["rate_bits_per_weight"] == pytest.approx(summary.rate_bits_per_weight, rel=1e-5)
    shares = np.array(summary.depth_histogram) / summary.weights
    assert carried["depth_histogram"] == pytest.approx(shares, abs=1e-5)
    assert carried["quantized_weights"] == summary.weights
    assert carried["parameters"] == summary.parameters
    assert carried["matrices"] == len(summary.matrices)
    codes = 8 * summary.bytes_by_kind["codes"] / summary.weights
    assert carried["side_bits_per_weight"] == pytest.approx(
        (summary.rate_bits_per_weight or 0) - codes, rel=1e-4
    )
    assert report.file_bits_per_parameter == pytest.approx(summary.file_bits_per_parameter)
    assert carried["calibration_tokens"] == 3 * 12


def test_provenance_tells_no_time_path_or_host(save_network: Save, tmp_path: Path) -> None:
    text = tmp_path / "private-folder" / "text.jsonl"
    text.parent.mkdir()
    path = tmp_path / "a.cvxq"
    folder = save_network("llama")
    run(folder, path, seed=7, bits=5.0)
    with Reader(path) as reader:
        documents = [reader.file(n).decode() for n in ("provenance.json", "report.json")]
    found = json.loads(documents[0])
    assert found["source"] == "llama"
    assert re.fullmatch(r"[0-9a-f]{64}", found["source_sha256"])
    assert re.fullmatch(r"[0-9a-f]{64}", found["calibration_sha256"])
    assert found["options"]["seed"] == 7
    assert found["options"]["bits"] == 5.0
    assert found["device"] == "cpu"
    assert set(found["versions"]) == {"cvxq", "torch", "transformers"}
    for document in documents:
        assert str(folder.parent) not in document
        assert "/" not in document
        assert not re.search(r"20\d\d-\d\d|\d\d:\d\d|seconds", document)
    options = ConversionOptions.of(bits=3, calibration=str(text)).to_json()
    assert options["calibration"] == "text.jsonl"


# --- the way there ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has PyTorch loaded")
def test_two_processes_write_the_same_bytes(
    save_network: Save, tmp_path: Path, runs: Callable[..., Any]
) -> None:
    folder, here, there = save_network("llama-gqa"), tmp_path / "a.cvxq", tmp_path / "b.cvxq"
    run(folder, here, bits=4.0, seed=3, iterations=2)
    amounts = ("--bits", "4", "--group-size", "16", "--sequences", "3", "--length", "12")
    more = ("--seed", "3", "--iterations", "2", "--threads", "1")
    again = runs("convert", folder, "-o", there, *amounts, *more)("run")
    assert again["code"] == 0, again["said"]
    assert here.read_bytes() == there.read_bytes()
    run(folder, there, bits=4.0, seed=4, iterations=2)
    assert here.read_bytes() != there.read_bytes()


def test_every_iteration_measures_the_network_that_the_last_one_left(
    save_network: Save, tmp_path: Path
) -> None:
    events: list[tuple[str, int, int]] = []
    folder = save_network("llama")
    once = run(folder, tmp_path / "1.cvxq", bits=3.0)
    twice = run(folder, tmp_path / "2.cvxq", lambda *e: events.append(e), bits=3.0, iterations=2)
    order = [stage for stage, done, total in events if (done, total) == (0, 1)]
    loop = ["measure", "hessians", "allocate", "quantize", "correct"]
    assert order == ["load", "calibrate", "reference", *loop, *loop, "prove", "write"]
    assert set(twice.stage_seconds) == set(order)
    assert twice.rate_bits_per_weight == pytest.approx(3.0, rel=0.01)
    assert once.kl is not None
    assert twice.kl is not None
    assert twice.kl < 1.5 * once.kl
    first, second = (
        [t for t in header_of(tmp_path / f"{i}.cvxq")["tensors"] if t["codec"] == "companded"]
        for i in (1, 2)
    )
    assert [t["crc32"] for t in first] != [t["crc32"] for t in second]


def test_what_was_felt_before_a_matrix_was_pruned_still_holds(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations; in the second, one matrix feels nothing."""
    name = "model.layers.0.self_attn.q_proj.weight"
    measured: list[dict[str, MatrixStatistics]] = []
    used: list[dict[str, MatrixStatistics]] = []

    def measure_less(measuring: Measuring) -> dict[str, MatrixStatistics]:
        found = statistics_of(measuring)
        if measured:
            zeros = {
                field: np.zeros_like(getattr(found[name], field))
                for field in ("row_sensitivity", "column_sensitivity", "row_evidence")
            }
            found[name] = replace(found[name], **zeros)
        measured.append(found)
        return found

    def note(loaded: Any, statistics: Any, *rest: Any, **named: Any) -> Any:
        used.append(dict(statistics))
        return quantize_network(loaded, statistics, *rest, **named)

    statistics_of = Measuring.statistics
    monkeypatch.setattr(Measuring, "statistics", measure_less)
    monkeypatch.setattr("cvxq_converter.job.quantize_network", note)
    run(save_network("llama"), tmp_path / "a.cvxq", iterations=2, gain=0.5)
    assert all(used[0][n] is measured[0][n] for n in measured[0])
    assert used[1][name] is measured[0][name]
    assert all(used[1][other] is measured[1][other] for other in measured[1] if other != name)


@pytest.mark.parametrize("family", ["Mixtral", "GraniteMoe"])
def test_a_mixture_by_blocks_gives_the_file_that_it_gives_as_a_whole(
    family: str, build_mixture: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_mixture(family).save_pretrained(tmp_path / "model")
    by_blocks, whole = tmp_path / "blocks.cvxq", tmp_path / "whole.cvxq"
    run(tmp_path / "model", by_blocks, gain=0.5)
    monkeypatch.setattr("cvxq_converter.source.exactness.find_blocks", lambda _: [])
    run(tmp_path / "model", whole, gain=0.5)
    assert by_blocks.read_bytes() == whole.read_bytes()
