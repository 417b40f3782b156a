"""`cvxq bench`: figures that fit each other; the bytes it claims to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq as runtime
import pytest
from click.testing import Result
from cvxq import bench
from cvxq.network import weight_bytes_per_token
from cvxq_kernels import cpu
from torch import nn

Cvxq = Callable[..., Result]
MakeFile = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPY_BYTES", 1 << 22)


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_last_line_is_json_that_adds_up(cvxq: Cvxq, model_file: Path, weights: str) -> None:
    options = ("--prompt-tokens", 9, "--tokens", 3, "--repeats", 2, "--weights", weights)
    result = cvxq("bench", model_file, *options)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["file_bytes"] == model_file.stat().st_size
    assert (record["prompt_tokens"], record["tokens"], record["repeats"]) == (9, 3, 2)
    assert record["weights"] == weights
    assert record["load_seconds"] > 0
    assert record["prefill_tokens_per_second"]["mean"] > 0
    assert record["decode_tokens_per_second"]["deviation"] >= 0
    read = record["weight_bytes_per_token"] * record["decode_tokens_per_second"]["mean"]
    assert record["weight_gigabytes_per_second"] == pytest.approx(read / 1e9)
    share = record["weight_gigabytes_per_second"] / record["copy_gigabytes_per_second"]
    assert record["share_of_copy_bandwidth"] == pytest.approx(share)
    assert record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 1 << 20
    assert "tokens/s" in result.stdout
    assert "±" in result.stdout
    assert "measure: 2/2" in result.stderr


def test_threads_are_reported(cvxq: Cvxq, model_file: Path) -> None:
    result = cvxq("bench", model_file, "--threads", 2, "--tokens", 1, "--repeats", 1)
    assert json.loads(result.stdout.splitlines()[-1])["threads"] == 2


def test_counts_default_to_the_context(cvxq: Cvxq, model_file: Path) -> None:
    result = cvxq("bench", model_file, "--repeats", 1)
    record = json.loads(result.stdout.splitlines()[-1])
    assert (record["prompt_tokens"], record["tokens"]) == (32, 32)


def test_more_tokens_than_the_context_holds(fails: Callable[..., str], model_file: Path) -> None:
    line = fails(2, "bench", model_file, "--prompt-tokens", 60, "--tokens", 5)
    assert "context of 64" in line
    assert "not in the range" in fails(2, "bench", model_file, "--repeats", 0)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_bytes_per_token_of_dense_weights(make_file: MakeFile, kind: str) -> None:
    """Each matrix once, one row of an untied embedding, all of a tied one (it is the head)."""
    with runtime.load(make_file(kind).path, weights="dense") as model:
        total = 0
        for module in model.network.modules():
            if isinstance(module, nn.Linear):
                total += 4 * module.weight.numel()
            elif isinstance(module, nn.Embedding):
                total += 4 * module.weight.shape[1]
            elif hasattr(module, "variance_epsilon"):
                total += 4 * module.weight.numel()
        assert weight_bytes_per_token(model.network) == total


def test_bytes_per_token_of_packed_weights(make_file: MakeFile) -> None:
    """What the packed matrices hold, and the norms; a row of the embedding only."""
    with runtime.load(make_file("llama").path) as model:
        total = 0
        for module in model.network.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                held = module.native.nbytes if cpu.is_available() else module.packed.nbytes
                rows = module.num_embeddings if isinstance(module, nn.Embedding) else 1
                total += held // rows
            elif hasattr(module, "variance_epsilon"):
                total += 4 * module.weight.numel()
        assert weight_bytes_per_token(model.network) == total


def test_spread_is_mean_and_sample_deviation() -> None:
    assert bench.Spread.of([1.0, 3.0]) == bench.Spread(2.0, 2**0.5)
    assert bench.Spread.of([5.0]) == bench.Spread(5.0, 0.0)
