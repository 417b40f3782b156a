"""Divergence between two networks, against the same figures from torch's own loss functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.measure.quality import (
    choosing_and_certifying,
    divergence,
    make_reference,
    make_references,
)
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


@pytest.mark.parametrize(
    ("held", "limit", "choosing", "certifying"),
    [
        (8, 10**6, [0, 1, 2, 3], [4, 5, 6, 7]),
        (7, 10**6, [0, 1, 2], [3, 4, 5, 6]),
        (8, 2 * 2 * 960, [0, 1], [4, 5]),
        (8, 2 * 2 * 960 - 1, [0], [4]),
        (8, 0, [0], [4]),
        (1, 0, [0], [0]),
    ],
)
def test_as_many_sequences_are_judged_as_fit_but_one_at_least(
    held: int,
    limit: int,
    choosing: list[int],
    certifying: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cvxq_converter.measure.quality.LOGIT_LIMIT", limit)
    sequences = torch.arange(held)[:, None].expand(held, 10)
    found = choosing_and_certifying(sequences, vocabulary=96)
    assert [part[:, 0].tolist() for part in found] == [choosing, certifying]


def test_both_references_keep_what_is_judged(build_network: Any) -> None:
    network, held_back = build_network("llama"), torch.arange(40).reshape(4, 10)
    choosing, certifying = make_references(network, held_back)
    assert torch.equal(choosing.sequences, held_back[:2])
    assert torch.equal(certifying.sequences, held_back[2:])
    assert len(choosing.log_probabilities) == len(certifying.log_probabilities) == 2
    one, same = make_references(network, held_back[:1])
    assert one is same
