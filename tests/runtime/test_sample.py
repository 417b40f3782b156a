"""Sampling against transformers' own processors, and against the definition."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cvxq.errors import ArgumentError
from cvxq.sample import Sampler, SamplingSettings, penalize, truncate
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def random_logits(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, 50).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 0.7, 0.0), (7, 1.0, 0.0), (9, 0.6, 0.2)])
def test_truncation_agrees_with_transformers(
    seed: int, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(seed)
    expected = torch.from_numpy(logits)[None]
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    found = truncate(logits, SamplingSettings(top_k=top_k, top_p=top_p, min_p=min_p))
    assert np.array_equal(found, expected[0].numpy())
    assert np.isinf(found).any()


def test_penalty_agrees_with_transformers() -> None:
    logits, ids = random_logits(1), [3, 3, 8, 20]
    own = torch.from_numpy(logits.copy())[None]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([ids]), own)
    assert np.array_equal(penalize(logits, ids, 1.7), expected[0].numpy())
    assert penalize(logits, ids, 1.0) is logits


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    logits = random_logits(2)
    assert np.array_equal(truncate(logits, SamplingSettings(top_k=500)), logits)


def test_the_likeliest_token_always_stays() -> None:
    logits = np.array([0.0, 5.0, 1.0], np.float32)
    found = truncate(logits, SamplingSettings(top_p=1e-9, min_p=0.999))
    assert found.tolist() == [-math.inf, 5.0, -math.inf]


def test_temperature_zero_is_greedy_after_the_penalty() -> None:
    logits = np.array([0.0, 5.0, 4.0], np.float32)
    assert Sampler(SamplingSettings(temperature=0)).choose(logits, []) == 1
    greedy = SamplingSettings(temperature=0, repetition_penalty=2.0)
    assert Sampler(greedy).choose(logits, [1]) == 2


def test_presence_and_frequency_penalties_count_what_was_drawn() -> None:
    logits = np.array([0.0, 5.0, 4.2, 3.0], np.float32)
    once = Sampler(SamplingSettings(temperature=0, presence_penalty=1.0))
    assert [once.choose(logits, [1, 1, 1]) for _ in range(4)] == [1, 2, 1, 1]
    each = Sampler(SamplingSettings(temperature=0, frequency_penalty=1.0))
    assert [each.choose(logits, [1, 1, 1]) for _ in range(4)] == [1, 2, 1, 2]
    assert logits.tolist() == pytest.approx([0, 5, 4.2, 3])


def test_biases_are_added() -> None:
    logits = np.array([0.0, 5.0, 4.0], np.float32)
    biased = SamplingSettings(temperature=0, logit_bias=((1, -100.0), (0, 4.5)))
    assert Sampler(biased).choose(logits, []) == 0


def test_a_constraint_leaves_out_and_follows() -> None:
    class Descending:
        last = 3

        def allow(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return np.where(np.arange(len(logits)) < self.last, logits, np.float32(-math.inf))

        def accept(self, token: int) -> None:
            self.last = token

    sampler = Sampler(SamplingSettings(seed=1), Descending())
    logits = np.array([-50.0, -50.0, 0.0, 50.0], np.float32)
    drawn = [sampler.choose(logits, []) for _ in range(2)]
    assert drawn in ([2, 1], [2, 0])


def test_frequencies_are_the_probabilities() -> None:
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32)) * 2
    sampler = Sampler(SamplingSettings(temperature=2.0, seed=5))
    draws = [sampler.choose(logits, []) for _ in range(2000)]
    shares = np.bincount(draws, minlength=3) / len(draws)
    # three standard errors of a share of one half over 2000 draws
    np.testing.assert_allclose(shares, [0.2, 0.5, 0.3], atol=0.034, rtol=0)


def test_the_seed_decides() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingSettings(seed=seed))
        return [sampler.choose(random_logits(3) / 5, []) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, "0 or more"),
        ("temperature", math.nan, "0 or more"),
        ("top_k", -1, r"0 \(all tokens\) or more"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", 1.0, "at least 0 and below 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("presence_penalty", math.nan, "any number"),
        ("frequency_penalty", math.inf, "any number"),
        ("logit_bias", ((-1, 1.0),), "finite numbers for tokens from 0 on"),
        ("logit_bias", ((1, math.nan),), "finite numbers for tokens from 0 on"),
        ("seed", -1, "0 to"),
        ("max_tokens", 0, "1 or more"),
        ("stop", ("x", ""), "strings of at least one character"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is .*allowed: {allowed}"):
        SamplingSettings(**{name: value})  # type: ignore[arg-type]
