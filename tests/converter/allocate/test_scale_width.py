"""Bits of the scale codes: few where the groups of a matrix are alike, more where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.plan import MatrixPlan, Sensitivity, plan_matrix
from cvxq_converter.allocate.scale_width import NARROWEST, WIDEST, choose_scale_bits
from cvxq_converter.options import Method
from cvxq_converter.source.matrices import Matrix
from torch import nn


def plan(octaves: np.ndarray, rows: int = 64) -> MatrixPlan:
    """A matrix whose columns have deviations of 2^−octaves."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, len(octaves), generator=generator)
    weight *= torch.from_numpy(np.exp2(-octaves)).float()
    return plan_matrix(
        Matrix("w", "", "linear", nn.Parameter(weight), (), None, False, "out_in", None, False),
        weight,
        Sensitivity.uniform(rows, len(octaves)),
        Method(group_size=64, partitions=1, means=False),
    )


@pytest.mark.parametrize(("octaves", "bits"), [(0.3, NARROWEST), (2.0, NARROWEST), (6.0, WIDEST)])
def test_the_ladder_is_as_long_as_the_groups_are_unlike(octaves: float, bits: int) -> None:
    assert choose_scale_bits([plan(np.linspace(0, octaves, 512))]) == bits


def test_one_matrix_with_an_outlier_column_among_many_keeps_the_long_ladder() -> None:
    alike = [plan(np.zeros(256)) for _ in range(20)]
    outlier = plan(np.r_[0.0, np.full(255, 4.5)])
    assert choose_scale_bits(alike) == NARROWEST
    assert choose_scale_bits([*alike, outlier]) == WIDEST


def test_columns_of_zeros_need_no_scale() -> None:
    octaves = np.r_[np.zeros(256), np.full(256, np.inf)]
    assert choose_scale_bits([plan(octaves)]) == NARROWEST


def test_a_matrix_of_zeros_is_no_obstacle() -> None:
    assert NARROWEST <= choose_scale_bits([plan(np.full(8, np.inf))]) <= WIDEST
