"""Rate → bit depths: the dual ascent against exact searches written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from cvxq_converter.allocate.allocation import (
    ASCENT_STEPS,
    THRESHOLDS,
    BitAllocation,
    Worths,
    allocate_bit_depths,
    code_bytes,
    column_step,
    depths_of,
    fit_additive,
    free_worths,
    group_bytes,
    separable_worths,
    trusted_offsets,
)
from cvxq_converter.allocate.sizes import allocate_for_rate
from cvxq_converter.errors import RateError
from hypothesis import given, settings
from hypothesis import strategies as st


def random_worths(seed: int, matrices: int = 3, separable: bool = True) -> list[Worths]:
    """Worths of a few matrices of different sizes and spreads; some clusters are short."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(matrices):
        clusters, columns = rng.integers(1, 9), rng.integers(1, 40)
        rows = np.full(clusters, rng.choice([8, 16, 64]))
        rows[-1] = rng.integers(1, rows[0] + 1)
        worth = rng.normal(rng.normal(0, 3), 0.3, (clusters, columns))
        worth += rng.normal(0, 1.5, clusters)[:, None] + rng.normal(0, 1, columns)
        made.append((separable_worths if separable else free_worths)(worth, rows))
    return made


def bisect_offset(worths: Sequence[Worths], budget: int) -> int:
    """The smallest common offset whose depths fit the budget, found by bisection alone."""

    def size(offset: int) -> int:
        total = 0
        for w in worths:
            for units, plane in zip(w.units(), w.group_bytes, strict=True):
                depth = ((units - offset)[:, None] >= THRESHOLDS).sum(1)
                total += int(depth.sum()) * int(plane)
        return total

    low, high = -(1 << 20), 1 << 20
    assert size(low) > budget >= size(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) <= budget else (middle, high)
    return high


def plane_total(worths: Sequence[Worths]) -> int:
    return sum(int(w.group_bytes.sum()) * w.units().shape[1] for w in worths)


def distortion(found: BitAllocation, worths: Sequence[Worths]) -> float:
    """Σ bytes · 4^(worth − depth): the modelled distortion."""
    return sum(
        float((np.exp2(2 * (w.units() / 256 - d)) * w.group_bytes[:, None]).sum())
        for w, d in zip(worths, found.depths, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0, 7.95), st.booleans())
def test_the_ascent_finds_what_exact_bisection_finds(
    seed: int, mean_depth: float, separable: bool
) -> None:
    worths = random_worths(seed, separable=separable)
    budget = int(mean_depth * plane_total(worths))
    found = allocate_bit_depths(worths, budget)
    offset = bisect_offset(worths, budget)
    assert found.dual_variable == offset / 256
    for w, depths, offsets in zip(worths, found.depths, found.cluster_offsets, strict=True):
        assert set(offset - offsets) <= {0, 1}  # a cluster may take one unit more
        expected = ((w.units() - offsets[:, None])[..., None] >= THRESHOLDS).sum(-1)
        assert (depths == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0, 8))
def test_the_size_is_what_it_says_and_never_above_the_budget(seed: int, mean_depth: float) -> None:
    worths = random_worths(seed)
    budget = int(mean_depth * plane_total(worths))
    found = allocate_bit_depths(worths, budget)
    size = sum(code_bytes(d, w.group_bytes) for d, w in zip(found.depths, worths, strict=True))
    assert found.code_bytes == size <= budget
    assert all(d.max(initial=0) <= 8 for d in found.depths)


@pytest.mark.parametrize("mean_depth", [0.5, 2.0, 2.1, 2.5, 3.0, 3.3, 4.0, 5.0, 7.5])
def test_no_cluster_could_have_taken_one_more_unit_at_the_end(mean_depth: float) -> None:
    worths = random_worths(5, matrices=6)
    budget = int(mean_depth * plane_total(worths))
    found = allocate_bit_depths(worths, budget)
    lowest = round(found.dual_variable * 256)
    for w, offsets, depths in zip(worths, found.cluster_offsets, found.depths, strict=True):
        for c in np.flatnonzero(offsets == lowest):
            raised = depths_of(w.units()[c] - lowest + 1)
            step = (int(raised.sum()) - int(depths[c].sum())) * int(w.group_bytes[c])
            assert step == 0 or found.code_bytes + step > budget


@pytest.mark.parametrize("seed", range(4))
def test_distortion_falls_as_the_rate_rises(seed: int) -> None:
    worths = random_worths(seed)
    rates = np.linspace(0, 8, 33)
    found = [allocate_bit_depths(worths, int(r * plane_total(worths))) for r in rates]
    errors = [distortion(f, worths) for f in found]
    assert (np.diff(errors) <= 0).all()
    assert errors[-1] < errors[0] / 1000
    assert (np.diff([f.dual_variable for f in found]) <= 0).all()


def test_no_other_allocation_of_the_same_size_is_better() -> None:
    """Exhaustive: three groups of equal size, all depths, every budget."""
    worths = [free_worths(np.array([[0.3, 1.9, -0.6]]), np.array([8]))]
    grid = np.stack(np.meshgrid(*[np.arange(9)] * 3, indexing="ij"), -1).reshape(-1, 3)
    errors = np.exp2(2 * (worths[0].units() / 256 - grid)).sum(1)
    for budget in range(25):
        found = allocate_bit_depths(worths, budget)
        best = errors[grid.sum(1) <= found.code_bytes].min()
        assert distortion(found, worths) == pytest.approx(best, rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0, 8), st.booleans())
def test_the_ascent_ends_soon(seed: int, mean_depth: float, separable: bool) -> None:
    worths = random_worths(seed, separable=separable)
    budget = int(mean_depth * plane_total(worths))
    assert allocate_bit_depths(worths, budget).steps <= ASCENT_STEPS + 14  # 2^14 units


def test_groups_of_zeros_take_no_bits_while_others_want_them() -> None:
    worth = np.random.default_rng(0).normal(0, 0.5, (4, 12))
    worth[1] = -np.inf  # a cluster of zeros
    worth[:, 5] = -np.inf  # a column of zeros
    rows = np.full(4, 8)
    for worths in (separable_worths(worth, rows), free_worths(worth, rows)):
        found = allocate_bit_depths([worths], 3 * plane_total([worths]))
        zeros = ~np.isfinite(worth)
        assert found.depths[0][zeros].max() <= 1
        assert found.depths[0][zeros].mean() < found.depths[0][~zeros].mean() / 4


@pytest.mark.parametrize("fit", [separable_worths, free_worths])
def test_a_matrix_of_nothing_but_zeros_is_allocated_too(fit: object) -> None:
    nothing = fit(np.full((2, 3), -np.inf), np.array([8, 5]))  # type: ignore[operator]
    found = allocate_bit_depths([nothing], 6)
    assert found.code_bytes <= 6


def test_an_exactly_separable_worth_is_recovered() -> None:
    rng = np.random.default_rng(2)
    clusters, columns = rng.normal(0, 2, 5), rng.uniform(0, 3, 30)
    worth = clusters[:, None] + columns
    found = separable_worths(worth, np.array([1024, 1024, 1024, 1024, 3]))
    assert np.abs(found.units() / 256 - worth).max() <= 1 / 32 + 1 / 512  # half a step of each
    assert found.column_shift == 4
    assert found.column_bits == int(found.column_terms.max()).bit_length() == 6  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [32, 64, 172, 256, 1024, 4096])
def test_columns_of_few_rows_take_the_step_of_least_cost(rows: int) -> None:
    """Brute force over the steps: depths round(worth − offset), squared errors 2^(−2 depth)."""
    rng = np.random.default_rng(rows)
    worth, offset = rng.uniform(0, 8, 1 << 16), rng.uniform(0, 1, 1 << 16)

    def cost(step: int) -> float:
        units = 2.0**step / 256
        excess = np.rint(np.rint(worth / units) * units - offset) - (worth - offset)
        error = np.exp2(-2 * excess).mean()
        return float(np.log2(error) / 2 + excess.mean() + np.log2(8 / units) / rows)

    assert column_step(rows) == min(range(4, 9), key=cost)


def test_a_wide_spread_of_columns_takes_coarser_steps() -> None:
    columns = np.linspace(0, 24, 50)
    found = separable_worths(np.broadcast_to(columns, (2, 50)).copy(), np.array([2048, 2048]))
    assert found.column_shift == 5
    assert found.column_terms is not None
    assert found.column_terms.max() <= 255


def test_the_additive_fit_weighs_clusters_by_their_rows() -> None:
    worth = np.array([[0.0, 2.0], [0.0, 4.0]])
    clusters, columns = fit_additive(worth, np.array([300, 100]))
    # least squares: the column difference is the weighted mean of 2 and 4
    assert columns[1] - columns[0] == pytest.approx(2.5, abs=1e-6)
    assert clusters == pytest.approx([1.0, 2.0], abs=1e-6)


def test_one_dead_group_does_not_pull_on_the_others() -> None:
    worth = np.zeros((4, 8))
    worth[2, 3] = -60.0
    found = separable_worths(worth, np.full(4, 64)).units() / 256
    kept = np.ones_like(worth, dtype=bool)
    kept[2], kept[:, 3] = False, False
    assert np.abs(found[kept]).max() < 0.5


def test_thresholds_decide_depths_at_their_very_unit() -> None:
    units = np.array([127, 128, 383, 384, -5000, 128 + 7 * 256 - 1, 128 + 7 * 256, 99999])
    assert depths_of(units).tolist() == [0, 1, 1, 2, 0, 7, 8, 8]


def test_a_bit_plane_is_padded_to_bytes() -> None:
    assert group_bytes(np.array([1, 8, 9, 64, 65])).tolist() == [1, 1, 2, 8, 9]


def test_targets_out_of_reach_say_so() -> None:
    worths = random_worths(1)
    with pytest.raises(RateError, match="exceeds 8 bits in every group"):
        allocate_bit_depths(worths, 8 * plane_total(worths) + 1)
    with pytest.raises(RateError, match="side information alone exceeds"):
        allocate_bit_depths(worths, -1)
    with pytest.raises(RateError, match=r"--bits 0\.2: .* takes 0\.40 bits per weight; ask for"):
        allocate_for_rate(worths, 0.2, weights=2000, side_bytes=100)


@pytest.mark.parametrize("mean_depth", [0, 8])
def test_the_ends_of_the_range_are_exact(mean_depth: int) -> None:
    worths = random_worths(7)
    found = allocate_bit_depths(worths, mean_depth * plane_total(worths))
    assert all((d == mean_depth).all() for d in found.depths)


def test_a_bound_that_cannot_be_kept_is_relaxed_for_all_alike() -> None:
    """Rows that nothing is felt through lose bits with the others, not before them."""
    rows, columns = np.array([64, 64, 64]), 32
    worth = np.zeros((3, columns)) + np.array([[8.0], [0.0], [-20.0]])
    free = free_worths(worth, rows)
    limits = trusted_offsets(free, np.ones((3, columns)), 1 / 20)
    bounded = replace(free, largest_offsets=limits)
    planes = int(free.group_bytes.sum()) * columns
    kept = depths_of(free.units() - limits[:, None])
    assert (kept == 3).all()  # what the bound asks for
    for bits in (2, 1):
        depths = allocate_bit_depths([bounded], bits * planes).depths[0]
        assert (depths == bits).all()
    enough = allocate_bit_depths([bounded], 4 * planes).depths[0]
    assert (enough[2] == 3).all()
    assert enough.mean() == 4
    without = allocate_bit_depths([free], 2 * planes).depths[0]
    assert (without[2] == 0).all()
