"""Sequences from the model, from texts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.journal import Journal
from cvxq_converter.measure.calibration import make_sequences
from cvxq_converter.options import Calibration
from cvxq_format.model_config import context_length


class Bytes:
    """A tokenizer of one token per byte, with a start token (1) for every document."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        start = [1] if add_special_tokens else []
        return {"input_ids": [*start, *(3 + byte % 90 for byte in text.encode())]}


def sample(network: Any, **options: Any) -> torch.Tensor:
    return make_sequences(network, None, Calibration(**options))


def test_sampling_goes_on_after_the_batches_that_are_there(
    build_network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvxq_converter.measure.calibration.sampling_batch", lambda *_: 2)
    monkeypatch.setattr("cvxq_converter.journal.SHORTEST", 0.0)
    network, wanted = build_network("llama"), Calibration(sequences=5, length=6)
    expected = make_sequences(network, None, wanted)

    def stop(done: int, _: int) -> None:
        if done > 2 * 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sequences(network, None, wanted, stop, Journal(tmp_path))
    assert Journal(tmp_path).kept() == ["sampled.0"]
    begun: list[int] = []
    note = lambda done, _: begun.append(done)  # noqa: E731
    found = make_sequences(network, None, wanted, note, Journal(tmp_path))
    assert torch.equal(found, expected)
    assert min(begun) > 2 * 6


def test_samples_have_the_shape_asked_for_capped_by_the_context(build_network: Any) -> None:
    network = build_network("llama")
    tokens = sample(network, sequences=3, length=500)
    assert tokens.shape == (3, 64)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == 1).all()
    assert len({tuple(row) for row in tokens.tolist()}) == 3


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt-neox"])
def test_a_seed_repeats_and_another_does_not(architecture: str, build_network: Any) -> None:
    network = build_network(architecture)
    first = sample(network, sequences=4, length=12, seed=3)
    assert torch.equal(first, sample(network, sequences=4, length=12, seed=3))
    assert not torch.equal(first, sample(network, sequences=4, length=12, seed=4))


def test_samples_follow_the_models_distribution_at_temperature_one(build_network: Any) -> None:
    """Counts of the second token against softmax of the first logits, χ² within 5 σ."""
    network = build_network("llama", vocab_size=16)
    count = 3000
    drawn = sample(network, sequences=count, length=2)[:, 1]
    with torch.no_grad():
        share = torch.softmax(network(input_ids=torch.tensor([[1]])).logits[0, -1], -1).double()
    counts = torch.bincount(drawn, minlength=16).double()
    chi = ((counts - count * share).square() / (count * share)).sum().item()
    assert abs(chi - 15) < 5 * (2 * 15) ** 0.5
    assert share.max() > 2 * share.min()  # a flat distribution would prove nothing


def test_sampling_with_a_cache_follows_the_whole_sequence(build_network: Any) -> None:
    """A network that is sure of its next token repeats its own greedy continuation."""
    network = build_network("llama-gqa")
    with torch.no_grad():
        network.lm_head.weight.mul_(1e4)
    tokens = sample(network, sequences=1, length=30)
    with torch.no_grad():
        greedy = network(input_ids=tokens).logits.argmax(-1)
    follows = tokens[0, :-1] != 2  # after an EOS comes a start token, whatever the network says
    assert torch.equal(tokens[0, 1:][follows], greedy[0, :-1][follows])


def always(network: Any, token: int) -> Any:
    """Make a GPT-2 whose next token is nearly always `token`."""
    with torch.no_grad():
        network.transformer.ln_f.weight.zero_()
        network.transformer.ln_f.bias.copy_(1e3 * network.lm_head.weight[token])
    return network


def test_a_new_document_begins_after_every_end(build_network: Any) -> None:
    network = always(build_network("gpt2", seed=4), 2)
    tokens = sample(network, sequences=2, length=7)
    assert tokens.tolist() == [[1, 2, 1, 2, 1, 2, 1]] * 2
    network.generation_config.eos_token_id = [7, 2]  # all end tokens count
    assert sample(network, sequences=1, length=4).tolist() == [[1, 2, 1, 2]]
    network.generation_config.eos_token_id = [7]
    assert sample(network, sequences=1, length=4).tolist() == [[1, 2, 2, 2]]


def test_start_tokens_in_order_of_preference(build_network: Any) -> None:
    network = build_network("gpt2", bos_token_id=None)
    network.generation_config.bos_token_id = None
    assert (sample(network, sequences=8, length=2)[:, 0] == 2).all()
    network.config.eos_token_id = network.generation_config.eos_token_id = None
    random = sample(network, sequences=8, length=2)[:, 0]
    assert len(set(random.tolist())) > 4
    tokenizer = SimpleNamespace(bos_token_id=9, eos_token_id=None)
    options = Calibration(sequences=2, length=2)
    assert (make_sequences(network, tokenizer, options)[:, 0] == 9).all()
    network.config.bos_token_id = 5000  # outside the vocabulary
    assert (make_sequences(network, tokenizer, options)[:, 0] == 9).all()


def test_end_that_is_also_the_start_is_not_doubled(build_network: Any) -> None:
    network = always(build_network("gpt2", bos_token_id=2), 2)
    network.generation_config.bos_token_id = 2
    tokens = sample(network, sequences=1, length=5)
    assert tokens.tolist() == [[2, 2, 2, 2, 2]]


def test_progress_reaches_the_end(build_network: Any) -> None:
    steps: list[tuple[int, int]] = []
    options = Calibration(sequences=70, length=5)
    make_sequences(build_network("llama"), None, options, lambda *step: steps.append(step))
    assert steps[-1] == (350, 350)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_none_needs_no_tokens(build_network: Any) -> None:
    assert sample(build_network("llama"), source="none", sequences=9, length=80).shape == (0, 64)


def test_text_is_cut_into_windows_spread_over_the_file(build_network: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(99)), encoding="utf-8-sig")
    network = build_network("llama")
    options = Calibration(source=str(path), sequences=3, length=10)
    tokens = make_sequences(network, Bytes(), options)
    stream = [3 + (33 + i % 90) % 90 for i in range(99)]
    expected = [stream[0:9], stream[27:36], stream[63:72]]  # of eleven
    assert tokens.tolist() == [[1, *window] for window in expected]
    with pytest.raises(
        ConversionError, match=r"too short: 100 tokens, enough for 11 sequences of 10, 12 are"
    ):
        make_sequences(network, Bytes(), Calibration(str(path), 12, 10))


def test_without_a_start_token_windows_are_text_alone(build_network: Any, tmp_path: Path) -> None:
    class Plain(Bytes):
        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return super().__call__(text, add_special_tokens=False)

    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i) for i in range(40)))
    options = Calibration(source=str(path), sequences=2, length=10)
    tokens = make_sequences(build_network("llama"), Plain(), options)
    stream = Plain()(path.read_text())["input_ids"]
    assert tokens.tolist() == [stream[0:10], stream[20:30]]


def test_a_document_at_the_start_of_a_window_has_one_start_token(
    build_network: Any, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "defgh", "ij")))
    options = Calibration(source=str(path), sequences=3, length=4)
    tokens = make_sequences(build_network("llama"), Bytes(), options)
    a, *_ = Bytes()("a", add_special_tokens=False)["input_ids"]
    b, c, d, e, f, g, h = range(a + 1, a + 8)
    assert tokens.tolist() == [[1, a, b, c], [1, d, e, f], [1, g, h, 1]]


def test_line_breaks_of_windows_and_a_mark_change_nothing(
    build_network: Any, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    found = []
    for data in (b"one\ntwo\n\nthree", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree"):
        path.write_bytes(data)
        options = Calibration(source=str(path), sequences=1, length=14)
        found.append(make_sequences(build_network("llama"), Bytes(), options).tolist())
    assert found[0] == found[1]


def test_json_lines_are_joined_documents(build_network: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": text, "more": 1}) for text in ("abc", "dé f", "g\u2028h")]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    options = Calibration(source=str(path), sequences=1, length=15)
    tokens = make_sequences(build_network("llama"), Bytes(), options)
    expected = [t for text in ("abc", "dé f", "g\u2028h") for t in Bytes()(text)["input_ids"]]
    assert tokens[0].tolist() == expected[:15]


Write = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.txt", lambda path: None, "no such file; --calibration takes self, copy, none"),
        ("a.txt", lambda path: path.mkdir(), "cannot be read"),
        ("a.txt", lambda path: path.write_bytes(b""), "no text in it"),
        ("a.txt", lambda path: path.write_bytes(b" \n\t\n"), "no text in it"),
        ("a.txt", lambda path: path.write_bytes(b"ab\xe9cd"), "byte 2 is not UTF-8"),
        ("a.txt", lambda path: path.write_bytes("abc".encode("utf-16")), "is not UTF-8"),
        ("a.txt", lambda path: path.write_bytes(b"abc"), "too short: 4 tokens"),
        ("a.jsonl", lambda path: path.write_bytes(b'{"text": "a"}\n{'), "line 2: not JSON"),
        ("a.jsonl", lambda path: path.write_bytes(b'{"body": "a"}'), "line 1: no text; expected"),
        ("a.jsonl", lambda path: path.write_bytes(b'"text"'), "line 1: no text; expected"),
        ("a.jsonl", lambda path: path.write_bytes(b'{"text": 3}'), "line 1: no text; expected"),
        ("a.jsonl", lambda path: path.write_bytes(b'{"text": ""}'), "no text in it"),
        ("a.jsonl", lambda path: path.write_bytes(b"\n"), "no text in it"),
    ],
)
def test_texts_that_cannot_serve(
    name: str, write: Write, message: str, build_network: Any, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    options = Calibration(source=str(path), sequences=1, length=10)
    with pytest.raises(ConversionError) as caught:
        make_sequences(build_network("llama"), Bytes(), options)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(path))
    assert "\n" not in text


def test_other_refusals(build_network: Any, tmp_path: Path) -> None:
    network = build_network("llama", vocab_size=50)
    path = tmp_path / "text.txt"
    path.write_text("XYZ " * 9)
    with pytest.raises(ConversionError, match="no tokenizer"):
        make_sequences(network, None, Calibration(str(path), 1, 10))
    with pytest.raises(ConversionError, match="the model has 50"):
        make_sequences(network, Bytes(), Calibration(str(path), 1, 10))
    for sequences, length in [(0, 10), (-1, 10), (1, 1)]:
        with pytest.raises(ConversionError, match="expected at least 1 of at least 2"):
            sample(network, sequences=sequences, length=length)


def test_logits_that_overflow_are_refused(build_network: Any) -> None:
    network = build_network("llama")
    with torch.no_grad():
        network.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ConversionError, match="logits are not finite"):
        sample(network, sequences=1, length=4)


def test_context_length(build_network: Any) -> None:
    for architecture in ("llama", "gpt2", "opt"):
        config = build_network(architecture).config
        assert context_length(config.get_text_config().to_dict()) == 64
    assert context_length({}) is None


def test_sampled_tokens_are_valid_inputs(build_network: Any) -> None:
    """OPT's positions start at an offset; a full context must still fit."""
    network = build_network("opt")
    tokens = sample(network, sequences=2, length=64)
    with torch.no_grad():
        logits = network(input_ids=tokens).logits
    assert np.isfinite(logits.numpy()).all()
