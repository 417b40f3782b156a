"""Drawing on a device follows the rules of `cvxq.sample`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cvxq.lean.cuda.sample import DeviceSampler, truncate
from cvxq.sample import Sampler, SamplingSettings
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCABULARY = 50
SEEN = [3, 3, 7, 20]
DRAWS = 20_000

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-k-beyond": {"top_k": 500},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.7},
    "all": {
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
    },
}


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2


def reference(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Probabilities by transformers' processors, in their order."""
    ids, scores = torch.tensor([SEEN]), logits[None]
    processors = [
        RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        TemperatureLogitsWarper(settings.temperature),
    ]
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p > 0:
        processors.append(MinPLogitsWarper(settings.min_p))
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].softmax(0)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_distribution_is_the_reference(name: str, logits: torch.Tensor) -> None:
    """Counts of many draws: no token without probability, the others within five deviations."""
    settings = SamplingSettings(**RULES[name])
    expected = reference(logits, settings).double().numpy()
    sampler = DeviceSampler(settings, VOCABULARY, torch.device("cpu"))
    sampler.restart(11, SEEN)
    token = torch.zeros(1, dtype=torch.int64)
    counts = np.zeros(VOCABULARY)
    for _ in range(DRAWS // 10):  # the penalty remembers what was drawn: begin anew each time
        sampler._seen.zero_()
        sampler._seen[SEEN] = True
        sampler.choose(logits, token)
        counts[int(token)] += 1
    draws = counts.sum()
    assert not counts[expected == 0].any()
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 5 * deviation + 1).all()


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_is_left_out(name: str, logits: torch.Tensor) -> None:
    settings = SamplingSettings(**{**RULES[name], "repetition_penalty": 1.0})
    kept = truncate(logits / settings.temperature, settings).isfinite()
    assert kept.tolist() == (reference(logits, settings) > 0).tolist()


def test_zero_temperature_takes_the_likeliest(logits: torch.Tensor) -> None:
    sampler = DeviceSampler(SamplingSettings(temperature=0), VOCABULARY, torch.device("cpu"))
    token = torch.zeros(1, dtype=torch.int64)
    for seed in range(5):
        sampler.restart(seed, [])
        sampler.choose(logits, token)
        assert int(token) == int(logits.argmax())


@pytest.mark.parametrize(
    "rules",
    [
        {"presence_penalty": 4.0},
        {"frequency_penalty": 0.4},
        {"presence_penalty": 0.3, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
        {"logit_bias": ((7, 30.0), (3, -100.0)), "frequency_penalty": 9.0},
    ],
)
def test_penalties_and_biases_are_those_of_the_host(
    rules: dict[str, Any], logits: torch.Tensor
) -> None:
    settings = SamplingSettings(temperature=0, **rules)
    device = DeviceSampler(settings, VOCABULARY, torch.device("cpu"))
    token = torch.zeros(1, dtype=torch.int64)
    for _ in range(2):  # a second text begins with a clean slate
        device.restart(None, SEEN)
        host, text = Sampler(settings), list(SEEN)
        for _ in range(20):
            device.choose(logits, token)
            text.append(host.choose(logits.numpy(), text))
            assert int(token) == text[-1]
    assert len(set(text[len(SEEN) :])) > 1


def test_equal_seeds_draw_equal_tokens(logits: torch.Tensor) -> None:
    def draw(seed: int) -> list[int]:
        sampler = DeviceSampler(SamplingSettings(), VOCABULARY, torch.device("cpu"))
        sampler.restart(seed, [])
        token = torch.zeros(1, dtype=torch.int64)
        found = []
        for _ in range(20):
            sampler.choose(logits, token)
            found.append(int(token))
        return found

    assert draw(5) == draw(5) != draw(6)
