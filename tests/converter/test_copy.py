"""Calibration text from a copy in 6 bits, for models that memory has no room for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.errors import ConversionError, NotDescribedError
from cvxq_converter.job import convert
from cvxq_converter.measure.calibration import sample_copy
from cvxq_converter.options import Calibration, ConversionOptions
from cvxq_converter.source.loaded import LoadedModel
from cvxq_format import Reader

Save = Callable[..., Path]


class Counter:
    """Texts that are sure of the next token: one more than the last, 2 (the end) after 6."""

    def __init__(self, texts: int) -> None:
        self.lengths = [0] * texts

    def rewind(self, text: int, length: int) -> None:
        self.lengths[text] = length

    def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
        logits = np.full((len(pieces), 12), -1e9, np.float32)
        for row, (text, ids) in zip(logits, pieces, strict=True):
            self.lengths[text] += len(ids)
            row[2 if ids[-1] == 6 else ids[-1] + 1] = 0
        assert len(set(self.lengths)) == 1  # all are as long, none goes on from another sequence
        return logits


def network_of(bos: int | None) -> Any:
    text = SimpleNamespace(
        bos_token_id=bos,
        eos_token_id=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_size=1,
        to_dict=lambda: {"max_position_embeddings": 64},
    )
    table = SimpleNamespace(weight=torch.zeros(12, 1))
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text),
        generation_config=None,
        get_input_embeddings=lambda: table,
    )


def test_documents_begin_anew_after_an_end() -> None:
    wanted = Calibration("copy", 2, 9)
    found = sample_copy(Counter, network_of(3), None, wanted)
    assert found.tolist() == [[3, 4, 5, 6, 2, 3, 4, 5, 6]] * 2


def test_a_seed_draws_the_same_sequence_whatever_their_number() -> None:
    class Even(Counter):
        def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
            return np.zeros((len(pieces), 12), np.float32)

    some, more = (
        sample_copy(Even, network_of(1), None, Calibration("copy", count, 20, seed=4))
        for count in (2, 20)  # more than are drawn side by side
    )
    assert torch.equal(some, more[:2])
    assert len({tuple(row) for row in more.tolist()}) == 20


def converted(folder: Path, path: Path, lines: list[str] | None = None, **options: Any) -> Any:
    chosen = ConversionOptions.of(
        **{"bits": 4.0, "group_size": 16, "sequences": 4, "length": 16, "gain": 0.5, **options}
    )
    return convert(str(folder), path, chosen, announce=None if lines is None else lines.append)


def test_a_copy_is_sampled_where_the_network_does_not_fit(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_network("llama")
    asked = converted(folder, tmp_path / "asked.cvxq", calibration="copy")
    monkeypatch.setattr("cvxq_converter.footprint.sampling_bytes", lambda *_: 10**15)
    lines: list[str] = []
    found = converted(folder, tmp_path / "found.cvxq", lines)
    assert lines[0].endswith("(calibration 4 × 16 tokens from a copy in 6 bits)")
    assert found.kl == asked.kl
    assert (tmp_path / "found.cvxq").read_bytes() == (tmp_path / "asked.cvxq").read_bytes()
    with Reader(tmp_path / "found.cvxq") as reader:
        said = json.loads(reader.file("provenance.json"))
    assert said["options"]["calibration"] == "copy"
    # The text is not the original's own: its loss is compared on the tokens that came.
    assert found.perplexity_increase != pytest.approx(np.expm1(found.kl), rel=1e-6)


def test_a_model_without_a_decoder_has_no_copy(
    save_network: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotDescribedError("unknown attention")

    monkeypatch.setattr(LoadedModel, "describe", refuse)
    with pytest.raises(ConversionError, match=r"cannot be sampled from: unknown attention; use"):
        converted(save_network("llama"), tmp_path / "a.cvxq", calibration="copy")
