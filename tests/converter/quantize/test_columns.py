"""Groups → codes, scales, means: least squares, exact storage, and every odd group there is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.allocation import UNITS_PER_BIT
from cvxq_converter.allocate.clustering import Clustering, cluster_rows, group_moments, row_weights
from cvxq_converter.allocate.plan import MatrixPlan, Sensitivity, means_pay, plan_matrix
from cvxq_converter.measure.hessian import InverseFactor
from cvxq_converter.options import Method
from cvxq_converter.quantize.columns import (
    QuantizedMatrix,
    Task,
    quantize_matrices,
    quantize_matrix,
)
from cvxq_converter.quantize.companding import (
    HISTOGRAM_BINS,
    HISTOGRAM_LIMIT,
    LevelHistogram,
    default_levels,
    fit_levels,
    make_codebook,
)
from cvxq_converter.quantize.encode import _pack
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.source.scratch import Scratch
from cvxq_format import Codebook, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

CODEBOOK = make_codebook(default_levels(), 6)


def plan_of(
    weight: torch.Tensor, sensitivity: Sensitivity | None = None, **options: Any
) -> MatrixPlan:
    """Plan of one matrix with free depths, groups of 8 rows unless told otherwise."""
    matrix = SimpleNamespace(
        name="m.weight", weight=weight, source_orientation="out_in", rows_are_tokens=False
    )
    method = Method(**{"group_size": 8, "partitions": 1, "separable_depths": False, **options})
    sensitivity = sensitivity or Sensitivity.uniform(*weight.shape)
    return plan_matrix(cast(Matrix, matrix), weight, sensitivity, method)


def quantize(
    weight: torch.Tensor,
    depths: np.ndarray | int,
    plan: MatrixPlan | None = None,
    *,
    with_means: bool | None = None,
    refine: bool = True,
    codebook: Codebook = CODEBOOK,
) -> tuple[QuantizedMatrix, np.ndarray]:
    """The quantized matrix, and what the packed tensor of it decodes to, float64 (N, K).

    Errors in the former are of weights whose rows were divided by the plan's scales.
    """
    plan = plan or plan_of(weight)
    if with_means is not None:
        plan = MatrixPlan(**{**plan.__dict__, "with_means": with_means})
    shape = (plan.clustering.clusters, weight.shape[1])
    task = Task(
        plan.row_scales.normalize(weight),
        plan.clustering,
        np.broadcast_to(np.asarray(depths, np.uint8), shape).copy(),
        plan.moments,
        plan.row_weights,
        plan.with_means,
    )
    matrix = quantize_matrix(task, codebook, refine)
    none = np.zeros(plan.clustering.clusters, np.int64)
    tensor = _pack(plan, matrix, none, codebook.scale_bits, Scratch())
    return matrix, dequantize(tensor, codebook).astype(np.float64)


def random_weight(seed: int, rows: int = 20, columns: int = 11) -> torch.Tensor:
    """Gaussian weights whose rows and columns have different spreads and means."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 1, (rows, 1)) + rng.normal(0, 0.7, columns))
    return torch.from_numpy(rng.normal(rng.normal(0, 1, columns), 1, (rows, columns)) * spread).to(
        torch.float32
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, np.ndarray, bool]:
    """A weight of one to three clusters of ≤ 8 rows, depths 0 to 8, with or without means."""
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 12))
    seed = draw(st.integers(0, 1 << 32))
    depths = np.random.default_rng(seed).integers(0, 9, (-(-rows // 8), columns))
    return random_weight(seed, rows, columns), depths, draw(st.booleans())


@settings(max_examples=40, deadline=None)
@given(cases())
def test_codes_fit_their_depth_and_errors_are_those_of_the_decoded_tensor(case: Any) -> None:
    weight, depths, with_means = case
    matrix, decoded = quantize(weight, depths, with_means=with_means)
    plan = plan_of(weight)
    deep = np.repeat(depths, plan.clustering.cluster_rows, axis=0)
    assert (matrix.codes < (1 << deep)).all()
    error = weight.double().numpy() - decoded
    error = (error / plan.row_scales.factors()[:, None])[plan.clustering.permutation] ** 2
    by_depth = np.bincount(deep.ravel(), error.ravel(), minlength=9)
    rounding = 1e-7 * float(weight.double().square().sum())  # the errors are formed in float32
    assert matrix.squared_error == pytest.approx(by_depth, rel=1e-4, abs=rounding)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_refinement_never_raises_the_squared_error(case: Any) -> None:
    """But by what the search's table of levels blurs: 1/256 of the scale, felt at depth 8 only."""
    weight, depths, with_means = case
    plan, exact = plan_of(weight), weight.double().numpy()
    deep = np.empty(weight.shape, np.uint8)
    deep[plan.clustering.permutation] = np.repeat(depths, plan.clustering.cluster_rows, axis=0)
    _, refined = quantize(weight, depths, with_means=with_means)
    _, plain = quantize(weight, depths, with_means=with_means, refine=False)
    blur = 0.2 * np.square(plain - exact)[deep == 8].sum()
    assert np.square(refined - exact).sum() <= np.square(plain - exact).sum() * 1.001 + blur


def test_refinement_is_worth_something() -> None:
    weight = random_weight(0, 64, 32)
    refined, _ = quantize(weight, 2)
    plain, _ = quantize(weight, 2, refine=False)
    assert refined.squared_error.sum() < 0.8 * plain.squared_error.sum()


@pytest.mark.parametrize("depth", range(1, 9))
def test_the_search_is_close_to_the_best_of_all_scales(depth: int) -> None:
    """Exhaustive over the whole scale table, with the nearest level by subtraction."""
    x = (np.arange(HISTOGRAM_BINS) + 0.5) * HISTOGRAM_LIMIT / HISTOGRAM_BINS
    gaussian = LevelHistogram(np.exp(-(x**2) / 2))
    tables = tuple(fit_levels(gaussian, d) for d in range(1, 9))
    codebook = make_codebook(tables, 6)
    weight = torch.from_numpy(np.random.default_rng(depth).normal(0, 1, (64, 40))).float()
    plan = plan_of(weight, group_size=64)
    matrix, decoded = quantize(weight, depth, plan, with_means=False, codebook=codebook)
    w, levels = weight.double().numpy(), tables[depth - 1].astype(np.float64)
    best = np.full(40, np.inf)
    for entry in codebook.scale_table[1:]:
        table = float(entry * matrix.scale_unit) * levels
        best = np.minimum(best, ((w[..., None] - table) ** 2).min(-1).sum(0))
    found = ((w - decoded) ** 2).sum(0)
    assert (found >= best * (1 - 1e-4)).all()  # nobody beats an exhaustive search, but for rounding
    # At many levels the error has shallow side minima, which halving steps may end in.
    assert found.sum() <= best.sum() * (1.01 if depth <= 4 else 1.1)


def test_error_falls_as_depth_rises() -> None:
    weight = random_weight(3, 64, 16)
    errors = [quantize(weight, depth)[0].squared_error.sum() for depth in range(9)]
    assert (np.diff(errors) < 0).all()
    assert errors[8] < errors[0] * 1e-3


def test_a_pruned_group_is_its_mean_where_means_are_stored_else_zero() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, -1.0], [3.0, -2.0], [2.0, -2.0]])
    with_mean, decoded = quantize(weight, 0, with_means=True)
    assert np.abs(decoded - [2.0, -2.0]).max() < 0.05
    assert with_mean.mean_codes is not None
    without, decoded = quantize(weight, 0, with_means=False)
    assert without.mean_codes is None
    assert (decoded == 0).all()
    assert without.squared_error[0] == pytest.approx(float(weight.square().sum()))


@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 3, 8])
def test_zeros_stay_zero(depth: int, with_means: bool) -> None:
    weight = torch.zeros(12, 5)
    assert (quantize(weight, depth, with_means=with_means)[1] == 0).all()
    weight[:8, 2] = random_weight(1, 8, 1)[:, 0]  # one live group beside dead ones
    decoded = quantize(weight, depth, with_means=with_means)[1]
    assert (decoded[:, [0, 1, 3, 4]] == 0).all()


@pytest.mark.parametrize("value", [1.0, -0.3, 700.0])
@pytest.mark.parametrize("depth", [0, 2, 4])
def test_a_constant_group_comes_back_through_its_mean(value: float, depth: int) -> None:
    weight = random_weight(2, 8, 6) * 0.02
    weight[:, 1] = value
    _, decoded = quantize(weight, depth, with_means=True)
    assert decoded[:, 1] == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 4, 8])
def test_extreme_scales_quantize_like_ordinary_ones(
    scale: float, with_means: bool, depth: int
) -> None:
    weight = random_weight(5, 16, 7)
    exact = np.float32(2.0 ** round(np.log2(scale)))
    plain, decoded = quantize(weight, depth, with_means=with_means)
    extreme, far = quantize(weight * exact, depth, with_means=with_means)
    assert (extreme.codes == plain.codes).all()
    assert (extreme.scale_codes == plain.scale_codes).all()
    assert far / float(exact) == pytest.approx(decoded, rel=1e-6)
    allocated = plan_of(weight * exact).worths.units() - plan_of(weight).worths.units()
    assert np.ptp(allocated) <= 1  # every group's worth moves by the same
    assert abs(allocated.mean() / UNITS_PER_BIT - np.log2(float(exact))) < 0.01


def test_groups_of_very_different_scale_share_a_matrix() -> None:
    weight = random_weight(6, 8, 3) * torch.tensor([1.0, 1e-2, 2e-9])
    _, decoded = quantize(weight, 5, with_means=False)
    error = ((weight.double().numpy() - decoded) ** 2).sum(0) / (weight.double().numpy() ** 2).sum(
        0
    )
    assert (error[:2] < 0.01).all()
    assert error[2] <= 1.0  # below the ladder, 2^7.75 down: at worst as good as zero


def test_an_important_row_among_unlike_rows_ends_with_less_error() -> None:
    weight = random_weight(8, 8, 40)
    weight[3] *= 0.2
    sensitivity = Sensitivity(np.ones(8), np.ones(40))
    favoured = Sensitivity(np.where(np.arange(8) == 3, 1000.0, 1.0), np.ones(40))
    errors = []
    for chosen in (sensitivity, favoured):
        _, decoded = quantize(weight, 2, plan_of(weight, chosen), with_means=False)
        errors.append(((weight.double().numpy() - decoded) ** 2).sum(1))
    assert errors[1][3] < 0.3 * errors[0][3]
    assert errors[1].sum() > errors[0].sum()  # at the others' expense


def test_the_search_itself_weighs_the_rows() -> None:
    """The same starting scales, but one row that counts for all: its error is what is searched."""
    weight = random_weight(8, 8, 40)
    plan = plan_of(weight)
    position = 3
    row = int(plan.clustering.permutation[position])
    alone = np.where(np.arange(8) == position, 8.0, 1e-6).astype(np.float32)
    errors = []
    for weights in (np.ones(8, np.float32), alone):
        chosen = MatrixPlan(**{**plan.__dict__, "row_weights": weights})
        _, decoded = quantize(weight, 2, chosen, with_means=False)
        errors.append(float(((weight.double().numpy() - decoded)[row] ** 2).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_means_pay_only_where_groups_are_off_centre() -> None:
    centred = torch.zeros(2, 4), torch.ones(2, 4)
    shifted = torch.full((2, 4), 0.9), torch.ones(2, 4)
    assert not means_pay(*centred, group_size=8)
    assert means_pay(*shifted, group_size=8)  # 1.2 bits per weight for one
    assert not means_pay(*shifted, group_size=4)  # for two
    assert not means_pay(torch.zeros(2, 4), torch.zeros(2, 4), group_size=64)


def test_row_order_and_partitions_do_not_change_what_a_group_decodes_to() -> None:
    """The same rows in another order give the same rows back, in that order."""
    weight = random_weight(9, 24, 5)
    shuffle = np.random.default_rng(0).permutation(24)
    _, plain = quantize(weight, 3)
    _, mixed = quantize(weight[shuffle], 3)
    assert (plain[shuffle] == mixed).all()


def test_moments_of_the_plan_are_weighted_like_the_error() -> None:
    weight = random_weight(4, 16, 3)
    sensitivity = np.linspace(1, 9, 16)
    plan = plan_of(weight, Sensitivity(sensitivity, np.ones(3)))
    clustering: Clustering = cluster_rows(
        weight.double().square().mean(1).numpy(), sensitivity, group_size=8, partitions=1
    )
    weights = row_weights(sensitivity, clustering)
    assert (plan.row_weights == weights).all()
    mean, square = group_moments(weight, clustering, weights)
    assert torch.equal(plan.moments[0], mean)
    assert torch.equal(plan.moments[1], square)


@pytest.mark.parametrize("feeds", [False, True])
def test_clusters_are_quantized_alike_together_and_apart(
    feeds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table too large to be quantized in one go; its last cluster is short."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(44, 20, generator=generator).bfloat16()
    clustering = cluster_rows(np.ones(44), np.ones(44), 8, 1)
    shares = row_weights(np.ones(44), clustering)
    inputs = torch.randn(100, 20, generator=generator)
    depths = np.random.default_rng(0).integers(0, 5, (6, 20), dtype=np.uint8)

    def quantize() -> QuantizedMatrix:
        feedback = InverseFactor.of(inputs.T @ inputs) if feeds else None
        moments = group_moments(weight, clustering, shares)
        task = Task(weight, clustering, depths, moments, shares, True, feedback)
        return quantize_matrix(task, make_codebook(default_levels(), 6))

    together = quantize()
    monkeypatch.setattr("cvxq_converter.quantize.columns.TOGETHER", 2 * 8 * 20)
    apart = quantize()
    for field in ("codes", "scale_codes", "mean_codes", "depths"):
        assert np.array_equal(getattr(apart, field), getattr(together, field)), field
    for field in ("squared_error", "energy", "projection"):
        assert getattr(apart, field) == pytest.approx(getattr(together, field), rel=1e-6), field


def test_matrices_side_by_side_are_quantized_as_each_alone() -> None:
    """With uneven last clusters, and more columns than a block has."""
    generator = torch.Generator().manual_seed(4)
    tasks = []
    for rows in (20, 8, 13):
        weight = torch.randn(rows, 150, generator=generator) * rows
        clustering = cluster_rows(np.ones(rows), np.ones(rows), 8, 1)
        shares = row_weights(np.arange(1.0, rows + 1), clustering)
        inputs = torch.randn(400, 150, generator=generator)
        inputs[:, 1] = inputs[:, 0] * rows
        depths = np.random.default_rng(rows).integers(0, 5, (clustering.clusters, 150), np.uint8)
        moments = group_moments(weight, clustering, shares)
        feedback = InverseFactor.of(inputs.T @ inputs)
        tasks.append(Task(weight, clustering, depths, moments, shares, False, feedback))
    for task, found in zip(tasks, quantize_matrices(tasks, CODEBOOK), strict=True):
        alone = quantize_matrix(task, CODEBOOK)
        assert (found.codes == alone.codes).mean() > 0.99  # sums in another order may tip a tie
        assert (found.scale_codes == alone.scale_codes)[task.depths > 0].mean() > 0.99
        assert found.scale_unit == alone.scale_unit
        assert found.squared_error == pytest.approx(alone.squared_error, rel=1e-2)
