"""Rate target → bit depths.

Minimise Σ P_n G_n² D_n(B_n) subject to Σ P_n B_n = R Σ P_n. At the optimum all groups have the
same slope; with D_n(B) = H S_n² 2^(−2B) that gives (CVXQ, Eq. 6)

    B_n = clamp(round(½ log2(2 ln 2 · H · G_n² S_n² / V)), 0, 8).

The **worth** of a group is ½ log2(G_n² S_n²), in bits; the dual variable enters as an **offset**
v = ½ log2(V / (2 ln 2 H)), so that B = round(worth − v) and the update V ← V + α(rate − R) becomes
v ← v + α(rate − R), which settles in a few steps because the rate falls by at most one bit per
unit of v. The ascent runs on the depths that the file will hold: worths in steps of 1/256 bit,
rounded to whole depths, codes padded to bytes. `D_n` measured instead of modelled would move the
`THRESHOLDS` between the depths, nothing else; it allocates no better (docs/ablation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cvxq_format.codebook import DEPTHS
from cvxq_format.limits import MAX_DEPTH

from cvxq_converter.errors import RateError

UNITS_PER_BIT = 256
THRESHOLDS = np.arange(1, MAX_DEPTH + 1, dtype=np.int32) * UNITS_PER_BIT - UNITS_PER_BIT // 2
ASCENT_STEPS = 20  # more than these and the bracket is halved instead
WORTH_DEPTH = 8.0  # bits below the median at which a group's worth no longer matters
FIT_STEPS = 8
BEST_STEP = 12.5  # of column terms: rows of the matrix times the square of the step, in bits
NARROWEST_STEP, WIDEST_STEP = 4, 8  # log2 of it in units: 1/16 bit to a whole one
GAUSSIAN_DISTORTION = np.array(  # squared error of the Lloyd–Max quantizers of depths 0 to 8
    [1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.4e-4, 1.6e-4, 4.1e-5]
)
ASCENT_RATE = 1.0  # α, bits of offset per bit of excess rate


@dataclass(frozen=True)
class Worths:
    """What a bit is worth in each group of one matrix, in 1/256 bit, as the file can hold it.

    cluster_terms: (C,) int64 and column_terms: (K,) uint8 when separable: the worth of group
    (c, k) is cluster_terms[c] + (column_terms[k] << column_shift). Otherwise `free` holds it.
    group_bytes: (C,) bytes of one bit plane of a group. largest_offsets: (C,) int64, the most that
    the dual variable may take from each cluster (`trusted_offsets`), or None.
    """

    group_bytes: np.ndarray
    cluster_terms: np.ndarray | None = None
    column_terms: np.ndarray | None = None
    column_bits: int = 0
    column_shift: int = 0
    free: np.ndarray | None = None
    largest_offsets: np.ndarray | None = None

    def units(self) -> np.ndarray:
        """(C, K) int64 worth of every group in 1/256 bit."""
        if self.free is not None:
            return self.free
        assert self.cluster_terms is not None
        assert self.column_terms is not None
        columns = self.column_terms.astype(np.int64) << self.column_shift
        return self.cluster_terms[:, None] + columns[None, :]

    def offsets(self, offset: int) -> np.ndarray:
        """(C,) int64 what a common offset takes from each cluster."""
        common = np.full(len(self.group_bytes), offset, dtype=np.int64)
        return common if self.largest_offsets is None else np.minimum(common, self.largest_offsets)


@dataclass(frozen=True)
class Span:
    """Where the worths of one matrix lie, in 1/256 bit, and how many columns it has."""

    lowest: int
    highest: int
    mean: float
    columns: int

    @classmethod
    def of(cls, units: np.ndarray) -> Span:
        """Of the worths (C, K) of all groups."""
        return cls(int(units.min()), int(units.max()), float(units.mean()), units.shape[1])


@dataclass(frozen=True)
class BitAllocation:
    """Depths of every group of every matrix, and the dual variable that gave them.

    depths: per matrix (C, K) uint8. cluster_offsets: per matrix (C,) int64, what the dual
    variable takes from each cluster's worth, in 1/256 bit. code_bytes: the packed codes' size.
    stored_depths: those whose level tables the file is to hold.
    """

    depths: list[np.ndarray]
    cluster_offsets: list[np.ndarray]
    code_bytes: int
    dual_variable: float
    steps: int
    stored_depths: tuple[int, ...] = DEPTHS


def separable_worths(worth: np.ndarray, cluster_rows: np.ndarray) -> Worths:
    """Fit worth (C, K), in bits, by a cluster term plus a column term, and round both.

    Groups of zeros have worth −∞ and do not count in the fit. It removes much of the sampling
    noise in the sensitivities and makes the depth map nearly free. Column terms take as few bits
    as their spread and their step (`column_step`) need.
    """
    clusters, columns = fit_additive(worth, cluster_rows)
    lowest = columns.min()
    spread = columns.max() - lowest
    shift = column_step(int(cluster_rows.sum()))
    while spread * UNITS_PER_BIT >= 255 << shift and shift < WIDEST_STEP:
        shift += 1
    terms = np.rint((columns - lowest) * UNITS_PER_BIT / (1 << shift))
    terms = np.minimum(terms, 255).astype(np.uint8)
    return Worths(
        group_bytes=group_bytes(cluster_rows),
        cluster_terms=np.rint((clusters + lowest) * UNITS_PER_BIT).astype(np.int64),
        column_terms=terms,
        column_bits=int(terms.max()).bit_length(),
        column_shift=shift,
    )


def column_step(rows: int) -> int:
    """log2, in units, of the step of the column terms that loses least in a matrix of these rows.

    A step of Δ bits adds Δ² / 12 to the variance of the depths, and errors are convex in them: it
    costs (2 ln 2)² / 2 · Δ² / 12 of the squared error, ½ log2 of which is 0.058 Δ² bits per weight.
    The codes take log2(spread / Δ) bits for `rows` weights. The sum is least at Δ² = 12.5 / rows.
    """
    step = 0.5 * np.log2(BEST_STEP / rows) + np.log2(UNITS_PER_BIT)
    return int(np.clip(np.rint(step), NARROWEST_STEP, WIDEST_STEP))


def fit_additive(worth: np.ndarray, cluster_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares cluster terms (C,) and column terms (K,) of worth (C, K), by alternation.

    A group far below the median will hold no bits whatever its exact worth: it counts as
    `WORTH_DEPTH` below, so that it cannot pull on the others. A cluster or column of nothing but
    zeros is put as far below.
    """
    seen = np.isfinite(worth)
    if not seen.any():
        return np.zeros(worth.shape[0]), np.zeros(worth.shape[1])
    lowest = np.median(worth[seen]) - WORTH_DEPTH
    weight = seen * cluster_rows[:, None].astype(np.float64)
    value = np.where(seen, np.maximum(worth, lowest), 0.0)
    columns = np.zeros(worth.shape[1])
    for _ in range(FIT_STEPS):
        clusters = _mean(weight, value - columns, 1, lowest)
        columns = _mean(weight, value - clusters[:, None], 0, -WORTH_DEPTH)
        columns -= columns.mean()
    return _mean(weight, value - columns, 1, lowest), columns


def _mean(weight: np.ndarray, value: np.ndarray, axis: int, empty: float) -> np.ndarray:
    total = weight.sum(axis)
    return np.where(total > 0, (weight * value).sum(axis) / np.maximum(total, 1e-300), empty)


def free_worths(worth: np.ndarray, cluster_rows: np.ndarray) -> Worths:
    """Every group keeps its own worth; the file then stores four bits of depth per group."""
    seen = np.isfinite(worth)
    worth = np.where(seen, worth, worth[seen].min() - WORTH_DEPTH if seen.any() else 0.0)
    units = np.rint(worth * UNITS_PER_BIT).astype(np.int64)
    return Worths(group_bytes=group_bytes(cluster_rows), free=units)


def group_bytes(cluster_rows: np.ndarray) -> np.ndarray:
    """(C,) int64 bytes of one bit plane of one group of each cluster."""
    return (cluster_rows.astype(np.int64) + 7) // 8


def trusted_offsets(worths: Worths, energy: np.ndarray, largest_error: float) -> np.ndarray:
    """(C,) int64 largest offset that keeps the error of each cluster's outputs within bounds.

    The sensitivities are derivatives: they say nothing of errors as large as the signal. A
    saturated attention head hardly feels small errors in its queries, and is destroyed when they
    are pruned. So no cluster's outputs may lose more than `largest_error` of their power:
    Σ_k e_ck d(B_ck) ≤ largest_error · Σ_k e_ck, with d the distortion at unit scale.

    energy: (C, K) float64 e_ck, variance of the group times mean square of the input.
    """
    units = worths.units()
    total = energy.sum(axis=1)
    low = units.min(axis=1) - int(THRESHOLDS[-1]) - 1  # all at depth 8: within any bound
    high = units.max(axis=1) - int(THRESHOLDS[0]) + 1  # all at depth 0
    while (high - low > 1).any():
        middle = (low + high) // 2
        depths = depths_of(units - middle[:, None])
        fits = (energy * GAUSSIAN_DISTORTION[depths]).sum(axis=1) <= largest_error * total
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low


def depths_of(units: np.ndarray) -> np.ndarray:
    """(…,) uint8 depth of groups by their worth in 1/256 bit, less the dual variable's offset."""
    return np.searchsorted(THRESHOLDS, units, side="right").astype(np.uint8)


def code_bytes(depths: np.ndarray, plane_bytes: np.ndarray) -> int:
    """Bytes of the packed codes of one matrix."""
    return int(depths.sum(axis=1, dtype=np.int64) @ plane_bytes)


def allocate_bit_depths(worths: Sequence[Worths], budget_bytes: int) -> BitAllocation:
    """Choose one bit depth per group so that the packed codes fill `budget_bytes`, never more.

    Dual ascent finds the offset; then the clusters, in order, are raised by one more unit as long
    as the budget allows, which closes the gap that rounding leaves.
    Raises RateError when even depth 0 or depth 8 everywhere misses the budget.
    """
    spans = [Span.of(w.units()) for w in worths]  # units of all groups at once are large
    bottom = max(span.highest for span in spans) - int(THRESHOLDS[0]) + 1  # all at depth 0
    plane_total = sum(
        int(w.group_bytes.sum()) * span.columns for w, span in zip(worths, spans, strict=True)
    )
    if budget_bytes < 0:
        raise RateError(
            "the side information alone exceeds the rate that was asked for; ask for more"
        )
    if budget_bytes > MAX_DEPTH * plane_total:
        raise RateError("the rate that was asked for exceeds 8 bits in every group; ask for less")

    def allocated(offset: int) -> Iterator[np.ndarray]:
        return (depths_of(w.units() - w.offsets(offset)[:, None]) for w in worths)

    def size(offset: int) -> int:
        found = zip(allocated(offset), worths, strict=True)
        return sum(code_bytes(depths, w.group_bytes) for depths, w in found)

    if size(bottom) > budget_bytes:  # not even what the trust region asks for fits
        worths = _relaxed(worths, bottom, budget_bytes)
    offset, steps = _ascend(size, spans, plane_total, budget_bytes)
    depths = list(allocated(offset))
    offsets = [w.offsets(offset) for w in worths]
    spent = size(offset)
    for depth, w, own in zip(depths, worths, offsets, strict=True):
        unit, plane = w.units(), w.group_bytes
        for cluster in range(len(unit)):
            raised = depths_of(unit[cluster] - (own[cluster] - 1))
            step = int(raised.sum(dtype=np.int64) - depth[cluster].sum(dtype=np.int64))
            if 0 < step * plane[cluster] <= budget_bytes - spent:
                spent += step * int(plane[cluster])
                depth[cluster] = raised
                own[cluster] -= 1
    return BitAllocation(depths, offsets, spent, offset / UNITS_PER_BIT, steps)


def _relaxed(worths: Sequence[Worths], bottom: int, budget_bytes: int) -> list[Worths]:
    """Let the dual variable take as much more from all clusters as the budget needs, and no more.

    Clusters that have to keep the most bits then still do. bottom: an offset that leaves none.
    """

    def size(slack: int) -> int:
        limits = (w.offsets(bottom) + slack for w in worths)
        found = ((w, w.units() - limit[:, None]) for w, limit in zip(worths, limits, strict=True))
        return sum(code_bytes(depths_of(units), w.group_bytes) for w, units in found)

    low, high = 0, bottom - min(int(w.offsets(bottom).min()) for w in worths)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) > budget_bytes else (low, middle)
    return [
        w if w.largest_offsets is None else replace(w, largest_offsets=w.largest_offsets + high)
        for w in worths
    ]


def _ascend(
    size: Callable[[int], int],
    spans: Sequence[Span],
    plane_total: int,
    budget_bytes: int,
) -> tuple[int, int]:
    """Dual ascent v ← v + α(rate(v) − R) in the log domain; returns the offset and the steps.

    The offset is the smallest whose size is within the budget. The rounded rate is a staircase in
    v, so the ascent stays inside the bracket of offsets known to overspend and to fit, halving it
    when a step would leave or when the staircase is so flat that steps are too short.
    """
    low = min(s.lowest for s in spans) - int(THRESHOLDS[-1]) - 1  # one below: all at depth 8
    high = max(s.highest for s in spans) - int(THRESHOLDS[0]) + 1  # all at depth 0
    target = budget_bytes / plane_total  # mean depth
    value = float(np.mean([s.mean for s in spans]) - target * UNITS_PER_BIT)
    steps = 0
    while high - low > 1:
        if steps >= ASCENT_STEPS or not low < round(value) < high:
            value = (low + high) // 2
        offset = round(value)
        excess = size(offset) - budget_bytes
        if excess > 0:
            low = offset
        else:
            high = offset
        move = ASCENT_RATE * UNITS_PER_BIT * excess / plane_total
        value = offset + (max(move, 1.0) if excess > 0 else min(move, -1.0))
        steps += 1
    return high, steps
