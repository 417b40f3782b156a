"""Perplexity and divergence against a direct computation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cvxq import evaluate
from cvxq.errors import ArgumentError
from cvxq.evaluate import Window, divergence, perplexity, token_ids, windows

IDS = [(token * token + 3) % 96 for token in range(75)]


@pytest.fixture
def networks(make_file: Callable[..., Any]) -> tuple[Any, Any]:
    """Two networks of one shape that differ a little."""
    ours = make_file("llama").network
    theirs = make_file("llama", "other.cvxq").network
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return ours, theirs


def probabilities(network: Any, ids: np.ndarray) -> np.ndarray:
    """Next-token probabilities (L, V) float64, written from the definition."""
    with torch.no_grad():
        logits = network(input_ids=torch.from_numpy(ids)[None]).logits[0].double().numpy()
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def spans(found: list[Window]) -> list[tuple[int, int]]:
    return [(len(window.ids), window.first_scored) for window in found]


def test_windows_lie_end_to_end_and_drop_the_rest() -> None:
    found = windows(IDS, 20)
    assert spans(found) == [(20, 1)] * 3
    assert np.concatenate([window.ids for window in found]).tolist() == IDS[:60]


def test_a_short_text_is_one_window() -> None:
    assert spans(windows(IDS, 2048)) == [(75, 1)]
    assert spans(windows(IDS[:2], 2048)) == [(2, 1)]


@pytest.mark.parametrize("stride", [1, 7, 13, 19])
def test_overlapping_windows_score_every_token_once(stride: int) -> None:
    found = windows(IDS, 20, stride)
    scored = [int(i) for window in found for i in window.ids[window.first_scored :]]
    assert scored == IDS[1:]
    assert all(len(window.ids) <= 20 for window in found)
    assert all(window.first_scored >= 20 - stride for window in found[1:-1])


def test_a_stride_of_the_context_is_no_overlap() -> None:
    assert spans(windows(IDS, 20, 20)) == spans(windows(IDS, 20))


@pytest.mark.parametrize("start", [[1], [7, 8]])
@pytest.mark.parametrize("stride", [None, 1, 7, 17])
def test_every_window_begins_with_the_start_tokens_and_scores_what_follows(
    stride: int | None, start: list[int]
) -> None:
    found = windows(IDS, 20, stride, start)
    scored = [int(i) for window in found for i in window.ids[window.first_scored :]]
    places = 20 - len(start)
    assert scored == (IDS if stride else IDS[: len(IDS) // places * places])
    assert all(window.ids[: len(start)].tolist() == start for window in found)
    assert all(len(window.ids) == 20 for window in found[:-1])
    assert found[0].first_scored == len(start)


def test_start_tokens_take_places_of_the_context() -> None:
    assert spans(windows([4], 2, start=[1])) == [(2, 1)]
    with pytest.raises(ArgumentError, match="context is 2 tokens, allowed: 3 or more"):
        windows(IDS, 2, start=[7, 8])
    with pytest.raises(ArgumentError, match="stride is 20, allowed: 1 to 19"):
        windows(IDS, 20, 20, [1])


@pytest.mark.parametrize(
    ("ids", "context", "stride", "message"),
    [
        ([], 20, None, "the text has 0 tokens"),
        ([4], 20, None, "the text has 1 tokens"),
        (IDS, 1, None, "context is 1 tokens"),
        (IDS, 20, 0, "stride is 0, allowed: 1 to 20, the tokens of"),
        (IDS, 20, 21, "stride is 21"),
    ],
)
def test_impossible_windows_are_refused(
    ids: list[int], context: int, stride: int | None, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        windows(ids, context, stride)


@pytest.mark.parametrize("stride", [None, 9])
@pytest.mark.parametrize("chunk", [1 << 22, 96 * 4, 1])
def test_perplexity_by_definition(
    networks: tuple[Any, Any], stride: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", chunk)
    network = networks[0]
    losses = []
    for window in windows(IDS, 20, stride):
        table = probabilities(network, window.ids)
        for place in range(window.first_scored, len(window.ids)):
            losses.append(-math.log(table[place - 1, window.ids[place]]))
    calls: list[tuple[str, int, int]] = []
    found = perplexity(network, windows(IDS, 20, stride), lambda *call: calls.append(call))
    assert found.tokens == len(losses)
    assert found.nll.mean == pytest.approx(np.mean(losses), rel=1e-6)
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert found.nll.standard_error == pytest.approx(error, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.standard_error == pytest.approx(found.perplexity * error, rel=1e-5)
    count = len(windows(IDS, 20, stride))
    assert calls == [("evaluate", index + 1, count) for index in range(count)]


@pytest.mark.parametrize("chunk", [1 << 22, 96 * 4])
def test_divergence_by_definition(
    networks: tuple[Any, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", chunk)
    ours, theirs = networks
    kl, same = [], []
    for window in windows(IDS, 20):
        q, p = probabilities(ours, window.ids), probabilities(theirs, window.ids)
        for place in range(len(window.ids) - 1):
            kl.append(float(np.sum(p[place] * np.log(p[place] / q[place]))))
            same.append(float(p[place].argmax() == q[place].argmax()))
    found = divergence(ours, theirs, windows(IDS, 20))
    assert found.tokens == len(kl) == 57
    assert found.kl.mean == pytest.approx(np.mean(kl), rel=1e-5)
    error = np.std(kl, ddof=1) / math.sqrt(len(kl))
    assert found.kl.standard_error == pytest.approx(error, rel=1e-4)
    percentiles = [found.kl_median, found.kl_p90, found.kl_p99]
    assert percentiles == pytest.approx(np.quantile(kl, [0.5, 0.9, 0.99]), rel=1e-5)
    assert found.same_top.mean == pytest.approx(np.mean(same))
    assert 0 < found.same_top.mean < 1
    error = np.std(same, ddof=1) / math.sqrt(len(same))
    assert found.same_top.standard_error == pytest.approx(error)
    assert found.perplexity == perplexity(ours, windows(IDS, 20))
    assert found.original_perplexity == perplexity(theirs, windows(IDS, 20))


def test_a_network_does_not_diverge_from_itself(networks: tuple[Any, Any]) -> None:
    found = divergence(networks[0], networks[0], windows(IDS, 20))
    assert found.kl.mean == found.kl_p99 == 0
    assert found.same_top.mean == 1


def test_different_vocabularies_are_refused(networks: tuple[Any, Any]) -> None:
    class Narrow(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, **inputs: Any) -> Any:
            output = networks[1](**inputs)
            output.logits = output.logits[..., :90]
            return output

    with pytest.raises(ArgumentError, match="vocabularies differ: 96 tokens, the original 90"):
        divergence(networks[0], Narrow(), windows(IDS, 20))  # type: ignore[arg-type]


def test_no_windows_are_refused(networks: tuple[Any, Any]) -> None:
    with pytest.raises(ArgumentError, match="there are no windows"):
        perplexity(networks[0], [])
    with pytest.raises(ArgumentError, match="there are no windows"):
        divergence(*networks, [])


def test_the_tokenizer_decides_on_special_tokens() -> None:
    def tokenizer(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not verbose  # no warning about the length; windows are cut later
        return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, text)]}

    assert token_ids(tokenizer, "ab") == [1, 97, 98]
    assert token_ids(tokenizer, "ab", with_special_tokens=False) == [97, 98]
