"""Texts that the torch decoder reads together, on a CPU and on a device that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxq
import pytest
import torch
from cvxq.errors import ContextError
from cvxq.lean import record_of
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.lean.cuda.network import TorchNetwork
from cvxq.lean.cuda.weights import load_weights
from cvxq_format import Reader

MakeFile = Callable[..., Any]
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of float32 logits
TEXTS = [[(7 * index + 3 * text) % 96 for index in range(length)] for text, length in
         enumerate((1, 23, 9, 2))]  # fmt: skip


def decoder_of(made: Any) -> TorchDecoder:
    with Reader(made.path) as reader:
        record = record_of(reader)
        weights = load_weights(record, reader, CPU, torch.float32)
    return TorchDecoder(TorchNetwork(record, weights, CPU, torch.float32), prefill_tokens=16)


def check_steps(decoder: Any, bound: float, steps: int = 3) -> None:
    """Ragged prompts, then token by token, all but one text that waits; each as alone."""
    batch, alone = decoder.batch(len(TEXTS), 40), decoder.sibling()
    texts = [list(ids) for ids in TEXTS]
    pieces = list(enumerate(texts))
    for step in range(steps):
        found = batch.read(pieces)
        expected = torch.stack([alone.logits(texts[text])[-1] for text, _ in pieces])
        assert float((found - expected).abs().max()) < bound
        chosen = zip(pieces, expected.argmax(1).tolist(), strict=True)
        pieces = [(text, [token]) for (text, _), token in chosen]
        pieces = [piece for piece in pieces if piece[0] != step] or pieces
        for text, ids in pieces:
            texts[text] += ids


def test_every_text_gets_what_it_gets_alone(lean_kind: str, make_file: MakeFile) -> None:
    decoder = decoder_of(make_file(lean_kind))
    if lean_kind == "phi3-longrope":
        assert decoder.batch(4, 40) is None
    else:
        check_steps(decoder, TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral", "gpt-oss"])
def test_on_a_device(kind: str, make_file: MakeFile, fake_device: Any) -> None:
    """One graph serves all steps, the prompt of one token included; within bfloat16's error."""
    with cvxq.load(make_file(kind).path, device="cuda") as model:
        fake_device.calls.clear()
        check_steps(model.decoder, 0.1)
        captured = fake_device.calls.count("capture thread_local")
        assert captured == (kind not in ("mixtral", "gpt-oss"))
        assert fake_device.calls.count("replay") == 3 * captured


def test_rows_after_each_token(make_file: MakeFile, fake_device: Any) -> None:
    with cvxq.load(make_file("llama").path, device="cuda") as model:
        batch = model.decoder.batch(2, 40)
        batch.read([(0, TEXTS[1][:4])])
        found = batch.read_each([(1, TEXTS[2]), (0, TEXTS[1][4:])])
        expected = [model.decoder.logits(TEXTS[2]), model.decoder.logits(TEXTS[1])[4:]]
        for mine, alone in zip(found, expected, strict=True):
            assert mine.shape == alone.shape
            assert float((mine - alone).abs().max()) < 0.1
        with pytest.raises(ContextError, match="a text's 40 tokens are full"):
            batch.read_each([(0, [1] * 30)])


def test_copying_and_rewinding(make_file: MakeFile) -> None:
    decoder = decoder_of(make_file("mistral"))
    batch = decoder.batch(3, 40)
    batch.read([(0, TEXTS[1]), (2, TEXTS[2])])
    batch.copy(0, 1, 20)
    batch.rewind(2, 4)
    found = batch.read([(2, [5]), (1, [9, 8]), (0, [7])])
    alone = [[*TEXTS[2][:4], 5], [*TEXTS[1][:20], 9, 8], [*TEXTS[1], 7]]
    expected = torch.stack([decoder.logits(ids)[-1] for ids in alone])
    assert float((found - expected).abs().max()) < TOLERANCE


def test_a_full_text_stays_whole_while_others_go_on(make_file: MakeFile) -> None:
    decoder = decoder_of(make_file("llama"))
    batch = decoder.batch(2, 63)
    batch.read([(0, [7] * 63), (1, [5])])
    with pytest.raises(ContextError, match="a text's 63 tokens are full"):
        batch.read([(0, [1])])
    batch.read([(1, [6])])
    batch.rewind(0, 62)
    expected = decoder.logits([7] * 63)[-1]
    assert float((batch.read([(0, [7])])[0] - expected).abs().max()) < TOLERANCE


def test_memory_bounds_the_number_of_texts(
    make_file: MakeFile, fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cvxq.load(make_file("llama").path, device="cuda") as model:
        per_text = 40 * 2 * 2 * 8 * 2 * 2  # tokens, layers, key heads, width, bytes, both
        for free, texts in ((0, 1), (2 * per_text * 3, 3), (1 << 40, 16)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
            assert model.decoder.batch(99, 40).texts == texts
