"""`--device`: checked before anything loads, and passed on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

COMMANDS = (("generate", "Hi"), ("chat",), ("bench",), ("perplexity", "--text", "TEXT"))


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_without_cuda_one_line_says_what_next(
    command: tuple[str, ...],
    fails: Callable[..., str],
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = tmp_path / "text.txt"
    text.write_text("What a day. " * 20)
    words = [str(text) if word == "TEXT" else word for word in command[1:]]
    line = fails(5, command[0], chat_file, *words, "--device", "cuda")
    assert "finds no CUDA device here; use --device cpu, or install a CUDA build" in line


@pytest.mark.parametrize(
    "command", [("convert", "--bits", 3), ("measure",), ("measure", "--ranks", 2)]
)
def test_converting_without_cuda_says_so_before_it_begins(
    command: tuple[str, ...],
    fails: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = fails(5, *command, "model", "-o", tmp_path / "out", "--device", "cuda")
    assert "finds no CUDA device here" in line


def test_other_devices_are_refused(fails: Callable[..., str], model_file: Path) -> None:
    line = fails(2, "generate", model_file, "Hi", "--device", "tpu")
    assert "device is 'tpu', allowed: cpu, cuda, cuda:N" in line
