"""Divergence between two networks, against the same figures from torch's own loss functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.measure.quality import divergence, make_reference
from torch.nn import functional


def test_kl_and_the_loss_on_the_tokens_that_came(build_network: Any) -> None:
    original, other = build_network("llama", seed=1), build_network("llama", seed=2)
    sequences = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(0))
    found = divergence(other, make_reference(original, sequences))
    with torch.no_grad():
        p, q = (n(sequences, use_cache=False).logits.double() for n in (original, other))
    kl = functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert found.by_position == pytest.approx(kl.numpy(), rel=1e-4)
    assert found.mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.standard_error == pytest.approx(float(kl.std()) / np.sqrt(30), rel=1e-4)
    assert found.tokens == 30
    losses = [
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), sequences[:, 1:].flatten())
        for logits in (p, q)
    ]
    assert found.loss_increase == pytest.approx(float(losses[1] - losses[0]), rel=1e-4)


def test_as_many_sequences_are_kept_as_fit_but_one_at_least(build_network: Any) -> None:
    network, sequences = build_network("llama"), torch.full((4, 10), 3)
    for limit, kept in ((0, 1), (960, 1), (1919, 1), (1920, 2), (10**6, 4)):
        reference = make_reference(network, sequences, limit)
        assert len(reference.sequences) == len(reference.log_probabilities) == kept
