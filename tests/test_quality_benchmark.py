"""The quality comparison: what it credits a peer with, what it claims, and one small run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Runs a benchmark as if other programs left the machine alone; the page tells how busy it was.
UNDISTURBED = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
os.getloadavg = lambda: (1.0, 1.0, 1.0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
sys.path.append(str(BENCHMARKS))

from comparison import (  # noqa: E402
    OURS,
    Row,
    Run,
    Spread,
    best_opponent,
    failed_claims,
    front,
    spaced,
    table,
)
from measuring import (  # noqa: E402
    Bench,
    BenchmarkError,
    Plan,
    Programs,
    Sampling,
    digest,
    run,
)
from peer_rows import Entry, with_all_seeds  # noqa: E402
from peers.catalogue import PEERS, Cell, Peer, cells  # noqa: E402
from peers.grid import Parts, group_size, take_apart  # noqa: E402
from quality_page import shown  # noqa: E402

RUN = Run(
    rate=3.0,
    file_bytes=900,
    kl=0.1,
    kl_error=0.001,
    perplexity=20.0,
    second_kl=0.2,
    second_perplexity=30.0,
    seconds=5.0,
)
MATRICES = frozenset({"a.weight"})


# --- what a peer is credited with ---------------------------------------------------------------


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


def test_peer_whose_groups_are_no_runs_is_charged_an_index_per_column() -> None:
    weight, scale, zero = on_grid(3, symmetric=True)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    groups = (torch.arange(128) // 64)[order]
    rebuilt, parts = take_apart("w", weight[:, order], scale, zero, 3, groups)
    assert torch.equal(rebuilt, weight[:, order])
    assert parts.indices == 128


def test_last_group_of_a_row_may_be_shorter() -> None:
    groups = torch.arange(100) // 64
    scale = torch.tensor([[0.5, 2.0]])
    weight = scale[:, groups] * torch.ones(1, 100)
    rebuilt, parts = take_apart("w", weight, scale, None, 2, groups)
    assert torch.equal(rebuilt, weight)
    assert parts.total == 2 * 100 + 16 * 2


def test_peer_cannot_use_weights_that_its_file_could_not_hold() -> None:
    weight, scale, zero = on_grid(3, symmetric=False)
    with pytest.raises(ValueError, match="w: weights are off the peer's grid"):
        take_apart("w", weight + 0.1 * scale[:, :1].float(), scale, zero, 3)
    with pytest.raises(ValueError, match="w: codes do not fit 2 bits"):
        take_apart("w", weight, scale, zero, 2)
    with pytest.raises(ValueError, match="more than the 16 bits of a float16"):
        take_apart("w", weight, scale.float() * 1.0001, zero, 3)


def test_group_sizes_that_do_not_divide_a_row_become_the_nearest_that_do() -> None:
    assert [group_size(172, wanted) for wanted in (32, 64, 128)] == [43, 86, 172]
    assert [group_size(256, wanted) for wanted in (32, 64, 128)] == [32, 64, 128]


def peer(key: str) -> Peer:
    return next(peer for peer in PEERS if peer.key == key)


def names(key: str, shapes: Sequence[tuple[int, int]]) -> list[str]:
    return [cell.name for cell in cells(peer(key), shapes, [3], [64]) if not cell.whole]


def test_types_of_llama_cpp_follow_the_length_of_the_rows() -> None:
    assert "Q3_K alone" in names("gguf", [(172, 256), (256, 512)])
    assert names("gguf", [(64, 64), (64, 172)]) == ["IQ4_NL alone", "Q4_0 alone", "Q5_0 alone"]


# --- claims -------------------------------------------------------------------------------------


def row(method: str, rate: float, *kls: float, perplexity: float = 20.0) -> Row:
    """A row with one run per KL."""
    runs = (replace(RUN, rate=rate, kl=kl, perplexity=perplexity) for kl in kls)
    return Row(method, "" if method == OURS else "3 bits", MATRICES, tuple(runs))


def test_front_holds_the_rows_that_no_smaller_one_beats() -> None:
    rows = [row("A", 3.0, 0.2), row("B", 2.5, 0.4), row("C", 3.5, 0.3), row("D", 2.5, 0.5)]
    assert [r.method for r in front(rows, "rate")] == ["B", "A"]


def test_rates_that_are_nearly_equal_share_the_lowest_of_them() -> None:
    assert spaced([2.06, 3.0, 2.0, 2.061, 2.1]) == [2.0, 2.061, 3.0]


def test_other_seeds_are_for_rows_that_none_of_fewer_bits_beats(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan((), (2,), (64,), tuple(Sampling(2, 16, seed) for seed in (0, 1, 2)), (), ())
    peers = [("gptq", 2.0, 0.4), ("gptq", 2.5, 0.5), ("gguf", 3.0, 0.2), ("hqq", 3.1, 0.1)]
    entries = [Entry(peer(k), {"of": r}, row(k, r, kl), False) for k, r, kl in peers]
    entries += [Entry(peer("gguf"), {}, row("gguf", 1.0, 0.1), True)]
    monkeypatch.setattr("peer_rows.programs", lambda *_: None)
    monkeypatch.setattr(Bench, "sequences", lambda _, sampling: sampling.seed)
    monkeypatch.setattr(Bench, "ask", lambda _, p, t, jobs, seed: [(j["of"], seed) for j in jobs])
    found = lambda _, at: (MATRICES, replace(RUN, rate=at[0], kl=at[1] / 10))  # noqa: E731
    monkeypatch.setattr(Bench, "measure_peer", found)
    made = with_all_seeds(bench, entries, plan, Path())
    assert [[run.kl for run in entry.row.runs] for entry in made] == [
        [0.4, 0.1, 0.2],
        [0.5],
        [0.2],
        [0.1],
        [0.1],
    ]


def test_claims_hold_only_when_cvxq_is_below_every_peer_at_no_higher_rate() -> None:
    peers = [row("A", 3.0, 0.2), row("B", 3.4, 0.3)]
    assert failed_claims([*peers, row(OURS, 2.9, 0.1)]) == []
    assert failed_claims([*peers, row(OURS, 2.9, 0.25)]) == [
        "A, 3 bits (3.000 bits): cvxq's KL 0.25000 ± 0.00000 at 2.900 bits is not below "
        "0.20000 ± 0.00000 by 2 σ"
    ]
    assert failed_claims([*peers, row(OURS, 3.1, 0.1)]) == [
        "A, 3 bits (3.000 bits): no result of cvxq at that rate or below"
    ]


def test_of_cvxqs_rows_with_and_without_tuning_the_better_one_stands_for_it() -> None:
    tuned = replace(row(OURS, 2.92, 0.1), name="--tune 9")
    rows = [row("A", 3.0, 0.2), row(OURS, 2.95, 0.25), tuned]
    assert failed_claims(rows) == []
    assert len(failed_claims(rows[:2])) == 1
    lines = table(rows, "rate", 2400, second=None).splitlines()
    assert lines[2] == "| **cvxq** `--tune 9` | 2.920 | 0.10000 | 0.50 | 20.000 | 5 |"
    assert lines[3] == "| **cvxq** | 2.950 | 0.25000 | 1.25 | 20.000 | 5 |"


def test_claims_need_two_standard_deviations_of_the_difference() -> None:
    noisy = row("A", 3.0, 0.19, 0.20, 0.21)
    assert noisy.kl == Spread(pytest.approx(0.2), pytest.approx(0.01))
    assert failed_claims([noisy, row(OURS, 3.0, 0.17, 0.17, 0.17)]) == []
    assert len(failed_claims([noisy, row(OURS, 3.0, 0.16, 0.17, 0.18)])) == 0
    assert len(failed_claims([noisy, row(OURS, 3.0, 0.17, 0.18, 0.19)])) == 1


def test_claims_cover_perplexity() -> None:
    worse = row(OURS, 3.0, 0.1, perplexity=21.0)
    [sentence] = failed_claims([row("A", 3.0, 0.2), worse])
    assert "perplexity 21.000 ± 0.000 is above 20.000" in sentence


def test_claims_end_where_the_claimed_rates_end() -> None:
    better = [row("A", 2.1, 0.1), row("A", 4.6, 0.1)]
    assert failed_claims([*better, row(OURS, 2.0, 0.2)]) == []


def test_rows_of_other_matrices_are_not_compared() -> None:
    other = replace(row(OURS, 3.0, 0.1), matrices=frozenset({"b.weight"}))
    assert len(failed_claims([row("A", 3.0, 0.2), other])) == 1


def test_ratio_is_to_the_best_peer_of_as_many_bits_or_a_little_more() -> None:
    ours = row(OURS, 2.95, 0.1)
    rows = [row("A", 3.0, 0.2), row("B", 3.02, 0.4), row("C", 2.8, 0.05), ours]
    rows += [row("D", 3.4, 0.01)]
    best = best_opponent(ours, rows, "rate")
    assert best is not None
    assert best.method == "A"
    lines = table(rows, "rate", 2400, second=None).splitlines()
    assert lines[3] == "| **cvxq** | 2.950 | 0.10000 | 0.50 | 20.000 | 5 |"
    assert lines[4] == "| A, 3 bits | 3.000 | 0.20000 |  | 20.000 | 5 |"


def test_table_of_files_shows_bytes_deviations_and_the_second_text() -> None:
    lines = table([row("A", 3.0, 0.1, 0.2)], "file_bytes", 2400, second="other").splitlines()
    assert lines[2] == (
        "| A, 3 bits | 900 | 3.000 | 0.15000 ± 0.07071 |  | 20.000 ± 0.000 "
        "| 0.20000 ± 0.00000 | 30.000 ± 0.000 | 5 |"
    )


# --- measuring ----------------------------------------------------------------------------------


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
    return Bench(model, [text], 64, 2, tmp_path / "work")


def leave_result(folder: Path, matrices: dict[str, torch.Tensor], bits: int) -> None:
    """Write what a peer's process writes."""
    folder.mkdir()
    save_file(matrices, folder / "matrices.safetensors")
    count = sum(weight.numel() for weight in matrices.values())
    summary = {"bits": asdict(Parts(codes=bits * count)), "file_bytes": None, "seconds": 7.0}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_peer_result_is_measured_in_place_of_the_original_matrices(
    bench: Bench, tmp_path: Path
) -> None:
    parameters = dict(bench.original.named_parameters())
    exact = {name: parameters[name].detach().clone() for name in bench.shapes}
    assert bench.embedding == ["model.embed_tokens.weight"]
    assert len(exact) == 7
    leave_result(tmp_path / "exact", exact, bits=4)
    matrices, measured = bench.measure_peer(tmp_path / "exact")
    weights, rest = bench.count(exact), 258 * 64 + 3 * 64
    assert matrices == frozenset(exact)
    assert (measured.rate, measured.kl, measured.seconds) == (4.0, 0.0, 7.0)
    assert measured.file_bytes == weights // 2 + 2 * rest + bench.attached_bytes
    leave_result(tmp_path / "zeroed", {n: torch.zeros_like(w) for n, w in exact.items()}, bits=4)
    assert bench.measure_peer(tmp_path / "zeroed")[1].kl > 0.01


def test_peer_result_must_be_of_this_model(bench: Bench, tmp_path: Path) -> None:
    leave_result(tmp_path / "odd", {"model.norm.bias": torch.zeros(64)}, bits=4)
    with pytest.raises(BenchmarkError, match=r"model\.norm\.bias is no matrix of the model"):
        bench.measure_peer(tmp_path / "odd")


PEER = """
from peers.grid import Parts
from peers.worker import work, Result
import torch
def quantize(inputs, settings):
    weight = torch.full((64, 64), float(settings["bits"]))
    return Result({"model.layers.0.self_attn.q_proj.weight": weight}, Parts(codes=1))
work(quantize, ("torch",))
"""


def test_results_of_peers_are_made_once_for_the_same_settings_and_sequences(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in peer, run as the real ones are: in a process of its own."""
    module = tmp_path / "stand_in.py"
    module.write_text(PEER)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{module}" "$@"\n')
    script.chmod(0o755)
    programs = Programs(script)
    ids = bench.sequences(Sampling(count=2, length=16, seed=0))
    assert load_file(ids)["ids"].shape == (2, 16)
    jobs = [{"bits": 2}, {"bits": 3}]
    first = bench.ask(peer("hqq"), programs, jobs, ids)
    made = [load_file(f / "matrices.safetensors").popitem()[1][0, 0].item() for f in first]
    assert made == [2.0, 3.0]
    assert json.loads((first[1] / "summary.json").read_text())["settings"] == {"bits": 3}
    module.write_text("raise SystemExit('made again')")
    assert bench.ask(peer("hqq"), programs, jobs, ids) == first
    with pytest.raises(BenchmarkError, match="saying 'made again'"):
        bench.ask(peer("hqq"), programs, [{"bits": 4}], ids)
    other = bench.sequences(Sampling(count=2, length=16, seed=1))
    with pytest.raises(BenchmarkError, match="made again"):
        bench.ask(peer("hqq"), programs, jobs, other)


def test_digests_see_contents_of_files(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    before = digest(file, 1)
    assert digest(file, 1) == before != digest(file, 2)
    file.write_text("two")
    assert digest(file, 1) != before


def test_commands_are_timed_and_their_failures_named(tmp_path: Path) -> None:
    assert run([sys.executable, "-c", "pass"], tmp_path / "log") > 0
    with pytest.raises(BenchmarkError, match="saying 'no room'"):
        run([sys.executable, "-c", "raise SystemExit('no room')"], tmp_path / "log")


def test_cells_of_all_peers_have_settings() -> None:
    for known in PEERS:
        for cell in cells(known, [(256, 256)], [2, 3], [64]):
            assert isinstance(cell, Cell)
            assert cell.settings


def test_slow_peer_is_asked_for_few_groups() -> None:
    groups = [cell.name for cell in cells(peer("autoround"), [(256, 256)], [3], [32, 64, 128])]
    assert groups == ["3 bits, group 128"]


def test_page_names_files_without_saying_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text("once")
    assert [shown(w) for w in (str(file), "--text", str(BENCHMARKS / "quality.py"))] == [
        "story.txt",
        "--text",
        "benchmarks/quality.py",
    ]


@pytest.mark.slow
def test_comparison_runs_without_other_environments(
    model: Path, text: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", UNDISTURBED, str(BENCHMARKS / "quality.py")]
    command += ["--only", "rtn", "--seeds", "0", "--model", str(model), "--text", str(text)]
    command += ["--bits", "3", "--group", "32"]
    command += ["--sequences", "4", "--length", "32", "--peers", str(tmp_path)]
    command += ["--tune", "1"]
    command += ["--output", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == done.stdout.removesuffix("\n")
    assert page.count("| **cvxq** |") == 2
    assert page.count("| **cvxq** `--tune 1` |") == 1
    assert page.count("| RTN, 3 bits, group 32 |") == 2
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout == done.stdout
