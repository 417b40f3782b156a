"""The trellis search finds the best path there is, and without a code it is plain feedback."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cvxq_converter.quantize.companding import fit_levels
from trellis_codes import (
    Code,
    Computed,
    Ungerboeck,
    encode,
    encode_plain,
    histogram,
    nearest,
)

DEPTH, COLUMNS = 2, 5


def table_code() -> Code:
    code = Ungerboeck(2)
    code.tables[DEPTH] = torch.tensor([-1.9, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1, 1.9])
    return code


def computed_code() -> Code:
    code = Computed(5)
    code.amplitudes[DEPTH] = 1.0
    return code


@pytest.mark.parametrize("code", [table_code(), computed_code()], ids=["table", "computed"])
def test_no_path_is_better_than_the_one_found(code: Code) -> None:
    weights = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
    levels, entering = code.levels(DEPTH), code.entering(DEPTH)
    least = torch.full((len(weights),), torch.inf)
    for codes in product(range(1 << DEPTH), repeat=COLUMNS):
        window, values = 0, []
        for bits in codes:
            window = (window << entering | bits & ((1 << entering) - 1)) % (1 << code.window)
            values.append(levels[window, bits >> entering])
        least = torch.minimum(least, (weights - torch.stack(values)).square().sum(1))
    found = (weights - encode_plain(weights, DEPTH, code)).square().sum(1)
    torch.testing.assert_close(found, least)


def test_without_a_code_errors_are_fed_back_one_column_after_the_other() -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(3, COLUMNS, generator=random)
    factor = torch.randn(COLUMNS, COLUMNS, generator=random).triu() * 0.3 + torch.eye(COLUMNS)
    table = torch.tensor([-1.0, 1.0])
    depths = np.ones((1, COLUMNS), np.int64)
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
    coded = encode(weights[None], depths, lambda *_: (ones, zeros), [table] * 2, None, factor)
    found = coded.quantized[0]
    moved = weights.clone()
    for j in range(COLUMNS):
        quantized = nearest(moved[:, j], table)
        torch.testing.assert_close(found[:, j], quantized)
        error = (moved[:, j] - quantized) / factor[j, j]
        moved[:, j:] -= error[:, None] * factor[j, j:]


def test_four_states_gain_nearly_a_decibel_on_gaussian_weights() -> None:
    samples = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    code = Ungerboeck(2)
    code.fit(DEPTH, samples)
    error = (samples - encode_plain(samples, DEPTH, code)).square().mean()
    scalar = (
        (samples - nearest(samples, torch.from_numpy(fit_levels(histogram(samples), DEPTH))))
        .square()
        .mean()
    )
    assert error < 10**-0.09 * scalar
