"""Rows of a table: seen ones by what they felt, all others by how often they are to be expected."""

from __future__ import annotations

import pytest
import torch
from cvxq_converter.measure.lookups import PRIOR_LOOKUPS, expect, row_squares


def test_rows_by_hand() -> None:
    expected = torch.zeros(4, dtype=torch.float64)
    expect(expected, torch.tensor([0, 1]), torch.tensor([0.0, 1.5, 0.25, 0.25]))
    x = torch.tensor([1.0, 0.75, 0.125, 0.125], dtype=torch.float64)
    torch.testing.assert_close(expected, x)  # the first token nothing foretells; L − 1 others
    felt = torch.tensor([1.0, 9.0, 0.0, 0.0], dtype=torch.float64)
    rows = x * (felt + PRIOR_LOOKUPS * 5) / (x + PRIOR_LOOKUPS)
    torch.testing.assert_close(row_squares(felt, expected, 2), rows * 10 / rows.sum())


def test_unseen_rows_take_what_is_expected_of_them_from_the_seen_ones_and_no_more() -> None:
    """Tokens drawn from a known distribution: the rows near their true share of what is felt."""
    generator = torch.Generator().manual_seed(0)
    V, L, S = 2000, 256, 8
    share = 1 / (torch.arange(V) + 2.7)
    share /= share.sum()
    felt, expected = torch.zeros(2, V, dtype=torch.float64)
    for _ in range(S):
        ids = torch.multinomial(share, L, replacement=True, generator=generator)
        rows, counts = ids.unique(return_counts=True)
        drawn = torch.randn(len(rows), 2, generator=generator) * counts.sqrt()[:, None]
        felt[rows] += drawn.double().square().sum(1)
        expect(expected, ids, share.double() * L)
    found = row_squares(felt, expected, S * L) / felt.sum()
    unseen = felt == 0
    assert unseen.float().mean() > 0.5
    assert float(found[unseen].sum()) == pytest.approx(float(share[unseen].sum()), rel=0.2)
    off = torch.log2(found / share)
    assert float(off.square().mean().sqrt()) < 0.7  # half of it is of depth


@pytest.mark.parametrize("known", [4, 6, 9])
def test_a_head_of_another_size_than_the_table(known: int) -> None:
    expected = torch.zeros(6, dtype=torch.float64)
    expect(expected, torch.tensor([3, 2]), torch.full((known,), 0.5))
    assert expected[: min(known, 6)].sum() == pytest.approx(1 + 0.25 * min(known, 6))
    assert (row_squares(torch.zeros(6), expected, 2) == 0).all()  # nothing was felt
