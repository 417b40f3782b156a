"""The fused block of columns against PyTorch's, run by Triton's interpreter.

Run by `test_feedback_kernel.py` in a process of its own, since Triton chooses between interpreter
and compiler when it is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.clustering import cluster_rows, group_moments, row_weights
from cvxq_converter.measure.hessian import InverseFactor
from cvxq_converter.quantize import columns
from cvxq_converter.quantize.columns import QuantizedMatrix, Task, quantize_matrix
from cvxq_converter.quantize.companding import default_levels, make_codebook
from cvxq_converter.quantize.feedback_kernel import FUSED_BLOCK

CODEBOOK = make_codebook(default_levels(), 6)
ROWS, GROUP, K = 10, 6, FUSED_BLOCK + 5  # an uneven last cluster, and last block


def quantized(with_means: bool, refine: bool) -> QuantizedMatrix:
    """A matrix with all depths, groups of zeros and outliers, quantized with feedback."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ROWS, K)) * np.exp(rng.normal(0, 1.5, K)) + rng.normal(0, 1, K)
    values[:, 3] = 0
    values[:, 4] *= 1e-6
    values[2, 5] = 40
    weight = torch.from_numpy(values).float()
    inputs = torch.from_numpy(rng.standard_normal((400, K)) @ rng.standard_normal((K, K))).float()
    clustering = cluster_rows(rng.random(ROWS), rng.random(ROWS), GROUP, 1)
    shares = row_weights(rng.random(ROWS), clustering)
    task = Task(
        weight,
        clustering,
        rng.integers(0, 9, (clustering.clusters, K)).astype(np.uint8),
        group_moments(weight, clustering, shares),
        shares,
        with_means,
        InverseFactor.of(inputs.T @ inputs / len(inputs)),
    )
    return quantize_matrix(task, CODEBOOK, refine)


@pytest.mark.parametrize(("with_means", "refine"), [(True, True), (False, False)])
def test_the_choices_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, with_means: bool, refine: bool
) -> None:
    """Nearly: where a sum in another order tips a tie, everything after it differs a little."""
    expected = quantized(with_means, refine)
    monkeypatch.setattr(columns, "runs_fused", lambda _: True)
    found = quantized(with_means, refine)
    assert (found.codes == expected.codes).mean() > 0.99
    deep = expected.depths > 0  # without codes all scales are as good
    assert (found.scale_codes == expected.scale_codes)[deep].mean() > 0.99
    if with_means:
        assert (found.mean_codes == expected.mean_codes).mean() > 0.99
    for name in ("squared_error", "energy", "projection"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-2)
