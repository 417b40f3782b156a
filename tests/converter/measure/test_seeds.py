"""Drawing tokens: as often as their shares say, and the same again."""

from __future__ import annotations

import pytest
import torch
from cvxq_converter.measure.seeds import draw_one, generator_of


def test_each_row_is_drawn_from_by_its_shares() -> None:
    shares = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.0, 0.5, 0.0, 0.5]])
    count = 20_000
    drawn = draw_one(shares.repeat_interleave(count, 0), generator_of(0, 0)).view(2, count)
    for row, share in zip(drawn, shares, strict=True):
        found = torch.bincount(row, minlength=4) / count
        assert found.tolist() == pytest.approx(share.tolist(), abs=0.015)
        assert not found[share == 0].any()


def test_the_last_of_many_is_drawn_and_nothing_past_it() -> None:
    shares = torch.full((512, 50_001), 1e-9)
    shares[:, -2] = 1.0
    shares[:, -1] = 0.0
    assert int(draw_one(shares[:64], generator_of(0, 1)).min()) >= 0
    assert int(draw_one(shares, generator_of(0, 1)).max()) == 49_999


def test_one_generator_draws_the_same_again() -> None:
    shares = torch.rand(32, 99, generator=generator_of(1, 2))
    first, again, other = (draw_one(shares, generator_of(3, s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
