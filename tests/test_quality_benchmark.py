"""The quality comparison: what it credits a peer with, what it claims, and one small run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from comparison import Cost, Row, failed_claims, failed_sizes, table  # noqa: E402
from measuring import Bench, BenchmarkError, Sampling, run_measured  # noqa: E402
from peers.grid import Parts, take_apart  # noqa: E402

COST = Cost(seconds=1.0, peak_bytes=1_000_000)


def on_grid(bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights (4, 128) in groups of 64, their scales and zero points."""
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (4, 128), generator=generator)
    scale = (torch.rand(4, 2, generator=generator) + 0.5).half()
    zero = None if symmetric else torch.randint(-half, half, (4, 2), generator=generator)
    offset = 0 if zero is None else zero.repeat_interleave(64, 1)
    return (codes - offset) * scale.float().repeat_interleave(64, 1), scale, zero


@pytest.mark.parametrize(("bits", "rate"), [(2, 2.28125), (3, 3.296875), (4, 4.3125)])
def test_peer_rate_counts_codes_scales_and_zero_points(bits: int, rate: float) -> None:
    weight, scale, zero = on_grid(bits, symmetric=False)
    rebuilt, parts = take_apart("w", weight, scale, zero, bits)
    assert torch.equal(rebuilt, weight)
    assert parts.total / weight.numel() == rate


def test_symmetric_peer_is_charged_no_zero_points() -> None:
    weight, scale, zero = on_grid(3, symmetric=True)
    assert take_apart("w", weight, scale, zero, 3)[1] == Parts(codes=3 * 512, scales=16 * 8)


def test_peer_cannot_use_weights_that_its_file_could_not_hold() -> None:
    weight, scale, zero = on_grid(3, symmetric=False)
    with pytest.raises(ValueError, match="w: weights are off the peer's grid"):
        take_apart("w", weight + 0.1 * scale[:, :1].float(), scale, zero, 3)
    with pytest.raises(ValueError, match="w: codes do not fit 2 bits"):
        take_apart("w", weight, scale, zero, 2)
    with pytest.raises(ValueError, match="more than the 16 bits of a float16"):
        take_apart("w", weight, scale.float() * 1.0001, zero, 3)


def rows(rtn: float, gptq: float, cvxq: float, bits: int = 3) -> list[Row]:
    """One cell of table A with the given KLs; the rates are those of group 64."""
    rate = bits + (16 + bits) / 64
    ours = Row("cvxq", (bits, 64), "", rate, 900, 20.0, 0.1, cvxq, 0.001, COST)
    peer = replace(ours, method="GPTQ", setting="symmetric", kl=gptq)
    return [replace(ours, method="RTN", kl=rtn, rate=rate - 0.05), peer, ours]


def test_claims_hold_only_when_cvxq_is_closest() -> None:
    assert failed_claims(rows(rtn=0.3, gptq=0.2, cvxq=0.1)) == []
    assert failed_claims(rows(rtn=0.3, gptq=0.2, cvxq=0.25)) == [
        "3 bits, group 64: cvxq's KL is 0.25000 at 3.297 bits, GPTQ's 0.20000 at 3.297"
    ]
    assert len(failed_claims(rows(rtn=0.3, gptq=0.2, cvxq=0.4))) == 2


def test_claims_against_gptq_end_above_three_bits_and_against_rtn_do_not() -> None:
    assert failed_claims(rows(rtn=0.3, gptq=0.1, cvxq=0.2, bits=4)) == []
    assert len(failed_claims(rows(rtn=0.3, gptq=0.1, cvxq=0.4, bits=4))) == 1


def test_claims_need_no_more_bits_than_the_peer() -> None:
    baseline, peer, ours = rows(rtn=0.3, gptq=0.2, cvxq=0.1)
    failed = failed_claims([baseline, peer, replace(ours, rate=3.3)])
    assert failed == ["3 bits, group 64: cvxq takes 3.3000 bits, GPTQ 3.2969"]


def test_files_may_not_exceed_the_one_they_are_compared_with() -> None:
    baseline, peer, ours = rows(rtn=0.3, gptq=0.2, cvxq=0.1)
    small = replace(baseline, file_bytes=100)
    assert failed_sizes([small, peer, ours]) == []
    sentence = "3 bits, group 64: cvxq's file takes 901 bytes, GPTQ's 900"
    assert failed_sizes([small, peer, replace(ours, file_bytes=901)]) == [sentence]
    assert len(failed_sizes([small, ours])) == 1


def test_table_has_a_line_per_row_with_errors_beside_the_figures() -> None:
    lines = table(rows(rtn=0.3, gptq=0.2, cvxq=0.1), parameters=1800).splitlines()
    assert lines[3] == (
        "| GPTQ, 3 bits, group 64, symmetric | 3.297 | 900 | 4.000 | 20.000 ± 0.100 "
        "| 0.20000 ± 0.00100 | 1 | 1 |"
    )
    assert len(lines) == 5
    assert lines[4].startswith("| **cvxq** | 3.297 |")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with tied embeddings and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("quality") / "model"
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    """A text for the model to be evaluated on."""
    path = model.parent / "text.txt"
    words = ["one", "small", "house", "by", "the", "wide", "grey", "sea", "and", "no", "boat"]
    path.write_text(" ".join(random.Random(0).choices(words, k=60)), encoding="utf-8")
    return path


@pytest.fixture
def bench(model: Path, text: Path, tmp_path: Path) -> Bench:
    return Bench(model, text, 64, Sampling(count=2, length=16, seed=0), tmp_path / "work")


def leave_result(folder: Path, matrices: dict[str, torch.Tensor], bits: int) -> None:
    """Write what `peers/gptq.py` writes."""
    folder.mkdir()
    save_file(matrices, folder / "matrices.safetensors")
    count = sum(weight.numel() for weight in matrices.values())
    summary = {"bits": asdict(Parts(codes=bits * count)), "versions": {"peer": "1.0"}}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_peer_result_is_measured_in_place_of_the_original_matrices(
    bench: Bench, tmp_path: Path
) -> None:
    parameters = dict(bench.original.named_parameters())
    exact = {name: parameters[name].detach().clone() for name in bench.quantized}
    assert bench.kept == ["model.embed_tokens.weight"]
    assert len(exact) == 7
    leave_result(tmp_path / "exact", exact, bits=4)
    row, versions = bench.peer_row((4, 64), "exact", tmp_path / "exact", COST)
    weights, rest = sum(bench.quantized.values()), 258 * 64 + 3 * 64
    assert (row.rate, row.kl, versions) == (4.0, 0.0, {"peer": "1.0"})
    assert row.file_bytes == weights // 2 + 2 * rest + bench.attached_bytes
    leave_result(tmp_path / "zeroed", {n: torch.zeros_like(w) for n, w in exact.items()}, bits=4)
    row, _ = bench.peer_row((4, 64), "zeroed", tmp_path / "zeroed", COST)
    assert row.kl > 0.01


def test_peer_must_quantize_exactly_the_same_matrices(bench: Bench, tmp_path: Path) -> None:
    parameters = dict(bench.original.named_parameters())
    names = [*bench.quantized, "model.embed_tokens.weight"]
    leave_result(tmp_path / "more", {name: parameters[name].clone() for name in names}, bits=4)
    with pytest.raises(BenchmarkError, match=r"disagree on model\.embed_tokens\.weight"):
        bench.peer_row((4, 64), "", tmp_path / "more", COST)


def test_commands_are_timed_and_their_failures_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    cost = run_measured([sys.executable, "-c", "b = bytearray(1 << 26)"], log)
    assert cost.peak_bytes > 1 << 26
    assert cost.seconds > 0
    with pytest.raises(BenchmarkError, match="saying 'no room'"):
        run_measured([sys.executable, "-c", "raise SystemExit('no room')"], log)


@pytest.mark.slow
def test_comparison_runs_without_the_peer(model: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "quality.py"), "--without-peer"]
    command += ["--model", str(model), "--text", str(text), "--bits", "4", "--group", "32"]
    command += ["--sequences", "4", "--length", "32", "--peers", str(tmp_path)]
    command += ["--output", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == done.stdout.removesuffix("\n")
    assert page.count("| **cvxq** |") == 2
    assert page.count("| RTN, 4 bits, group 32 |") == 2
    assert "GPTQ" not in page.split("## A")[1]
