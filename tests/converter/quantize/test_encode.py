"""Plans and a budget → packed tensors: sizes known beforehand, and every way to encode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.allocation import THRESHOLDS, BitAllocation
from cvxq_converter.allocate.plan import MatrixPlan, Sensitivity, plan_matrix
from cvxq_converter.allocate.sizes import allocate_for_rate, make_ledger, matrix_entry
from cvxq_converter.job import convert
from cvxq_converter.journal import Journal
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.companding import (
    HISTOGRAM_BINS,
    HISTOGRAM_LIMIT,
    LevelHistogram,
    default_levels,
)
from cvxq_converter.quantize.encode import (
    _add_to_histograms,
    _fit_tables,
    encode_matrices,
)
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import LoadedModel, Weights, load_model
from cvxq_format import CompandedTensor, companded, dequantize, verify
from cvxq_format.codebook import DEPTHS

OPTIONS = ConversionOptions.of(bits=4.0, group_size=12, calibration="none", largest_error=1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "free depths": {"separable_depths": False},
    "compander": {"levels": "compander"},
    "uniform": {"uniform_depths": True},
    "no means": {"means": False},
    "no refinement": {"refine_scales": False},
    "one partition": {"partitions": 1},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded(save_network: Callable[..., Path]) -> LoadedModel:
    """A tiny GPT-2: biases, Conv1D, a tied head; 12 does not divide its rows."""
    return load_model(open_source(str(save_network("gpt2")), None), OPTIONS)


def sensitivity(rows: int, columns: int) -> Sensitivity:
    """Columns of very different worth, so that depths differ."""
    return Sensitivity(np.ones(rows), np.geomspace(1, 300, columns))


def plans_of(loaded: LoadedModel, options: ConversionOptions) -> list[MatrixPlan]:
    return [
        plan_matrix(m, loaded.originals[m.name], sensitivity(*m.weight.shape), options.method)
        for m in loaded.matrices
    ]


def encode(
    loaded: LoadedModel, options: ConversionOptions
) -> tuple[list[MatrixPlan], list[CompandedTensor], Any]:
    plans = plans_of(loaded, options)
    ledger = make_ledger(loaded, plans, [], {}, options.method)
    allocation = allocate_for_rate(
        [p.worths for p in plans], 4.0, loaded.quantized_weights, ledger.side_bytes(DEPTHS)
    )
    steps: list[tuple[int, int]] = []
    note = lambda *step: steps.append(step)  # noqa: E731
    encoded = encode_matrices(loaded, plans, allocation, options.method, note, None, Journal())
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    return plans, encoded.tensors, encoded


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_are_known_before_anything_is_packed(name: str, loaded: LoadedModel) -> None:
    options = OPTIONS.having(**VARIANTS[name])
    plans, tensors, encoded = encode(loaded, options)
    bits = encoded.codebook.scale_bits
    side = 0
    for plan, tensor in zip(plans, tensors, strict=True):
        entry = matrix_entry(plan, bits, options.method)
        assert entry.size + tensor.packed_codes.size == len(companded.encode(tensor))
        side += entry.size
    ledger = make_ledger(loaded, plans, [], {}, options.method)
    assert ledger.side_bytes(DEPTHS) - side == len(encoded.codebook.to_bytes())


def test_each_variant_differs_from_the_default_as_it_says(loaded: LoadedModel) -> None:
    _, default, encoded = encode(loaded, OPTIONS)
    assert all(t.column_terms is not None for t in default)
    for depth in range(2, 6):
        assert (encoded.codebook.levels[depth - 1] != default_levels()[depth - 1]).all()
    assert encoded.codebook.depth_thresholds.tolist() == THRESHOLDS.tolist()
    _, free, _ = encode(loaded, OPTIONS.having(separable_depths=False))
    assert all(t.column_terms is None for t in free)
    _, _, compander = encode(loaded, OPTIONS.having(levels="compander"))
    for table, fixed in zip(compander.codebook.levels, default_levels(), strict=True):
        assert (table == fixed).all()
    _, uniform, _ = encode(loaded, OPTIONS.having(uniform_depths=True))
    assert np.ptp(np.concatenate([t.depths.ravel() for t in uniform])) <= 1
    assert np.ptp(np.concatenate([t.depths.ravel() for t in default])) >= 2


def test_levels_are_fitted_to_every_weight_once_in_units_of_its_group(loaded: LoadedModel) -> None:
    plans = plans_of(loaded, OPTIONS)
    histograms = {4: LevelHistogram.empty()}
    for plan in plans:
        weight = plan.row_scales.normalize(loaded.originals[plan.matrix.name])
        depths = np.full(plan.moments[0].shape, 4, np.uint8)
        _add_to_histograms(histograms, weight, plan, depths)
    counts = histograms[4].counts
    assert counts.sum() == pytest.approx(loaded.quantized_weights, rel=1e-6)
    centres = (np.arange(HISTOGRAM_BINS) + 0.5) * HISTOGRAM_LIMIT / HISTOGRAM_BINS
    assert counts @ centres**2 / counts.sum() == pytest.approx(1.0, rel=1e-3)


def test_a_depth_has_tables_of_its_own_if_it_has_weights_for_them(loaded: LoadedModel) -> None:
    """One matrix of ±1 at depth 2, the others at depth 4: 2 bits need 64 weights."""
    signs, *others = loaded.matrices
    weights = {m.name: loaded.originals[m.name].float() for m in others}
    weights[signs.name] = torch.ones(signs.weight.shape)
    weights[signs.name][::2] = -1
    changed = replace(loaded, originals=cast(Weights, weights))
    plans = plans_of(loaded, OPTIONS.having(means=False))
    _, columns = signs.weight.shape
    for rows, has_own in ((64 // columns + 1, True), (64 // columns - 1, False)):
        row_weights = np.zeros(len(signs.weight), np.float32)
        row_weights[:rows] = 1
        moments = (torch.zeros_like(plans[0].moments[0]), torch.ones_like(plans[0].moments[1]))
        plans[0] = replace(plans[0], row_weights=row_weights, moments=moments)
        depths = [np.full(p.moments[0].shape, 4, np.uint8) for p in plans]
        depths[0][:] = 2
        allocation = BitAllocation(depths, [], 0, 0.0, 0)
        tables = _fit_tables(changed, plans, allocation, lambda _: None)
        assert (np.abs(np.abs(tables[1]) - 1).min() < 1e-3) == has_own
        assert np.abs(tables[2]).max() > 1.5  # depth 3 has no weights: those of all the others


def test_fitted_levels_and_refinement_each_lower_the_error(
    loaded: LoadedModel,
) -> None:
    def error(**options: Any) -> float:
        _, tensors, encoded = encode(loaded, OPTIONS.having(**options))
        return sum(
            float(
                (loaded.originals[n] - torch.from_numpy(dequantize(t, encoded.codebook)))
                .pow(2)
                .sum()
            )
            for n, t in zip(loaded.originals, tensors, strict=True)
        )

    default = error()
    for worse in ({"levels": "compander"}, {"refine_scales": False}):
        assert default < 0.99 * error(**worse)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_makes_a_sound_file_of_the_rate(
    name: str, save_network: Callable[..., Path], tmp_path: Path
) -> None:
    path, changes = tmp_path / "a.cvxq", {"largest_error": 1 / 3, **VARIANTS[name]}
    options = OPTIONS.having(bits=5.0, **changes)
    report = convert(str(save_network("gpt2")), path, options)
    assert not verify(path)
    # uniform depths can only be raised a whole cluster at a time
    assert report.rate_bits_per_weight <= 5.0
    assert report.rate_bits_per_weight >= 5.0 * (0.98 if name == "uniform" else 0.995)
