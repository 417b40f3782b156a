"""Codes that move: those that promise most, by one level, and back again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.iteration import quantize_network
from cvxq_converter.quantize.moving import Moves, Moving
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Stages
from cvxq_format import Codebook, dequantize, unpack_codes

OPTIONS = ConversionOptions.of(bits=3.0, group_size=8, gain=0.0)


@pytest.fixture
def moving(build_network: Any, tmp_path: Any) -> tuple[Moving, Codebook]:
    """The first matrix with groups of several depths, of a quantized network."""
    build_network("llama-tied").save_pretrained(tmp_path)
    loaded = load_model(open_source(str(tmp_path), None), OPTIONS)
    loaded.network  # noqa: B018  (its matrices stay)
    found = quantize_network(
        loaded, {}, None, None, {}, OPTIONS.target, OPTIONS.method, Stages(None)
    )
    matrix = next(m for m in loaded.matrices if len(np.unique(found.tensors[m.name].depths)) > 1)
    return _moving(loaded, matrix, found), found.codebook


def _moving(loaded: LoadedModel, matrix: Matrix, found: Any) -> Moving:
    tensor = found.tensors[matrix.name]
    weight = torch.from_numpy(dequantize(tensor, found.codebook))
    loaded.originals.replaced = None
    matrix.parameter.data = weight
    return Moving(matrix, tensor, found.codebook, None)


def promised(moving: Moving, before: torch.Tensor, now: torch.Tensor) -> Moves:
    """By the gradient of the steps before, and that of this one."""
    moving.felt.copy_(0.1 * before)
    moving.matrix.parameter.grad = now.clone()
    moves = moving.promising(moving.felt.numel(), 0.1)
    moving.feel(0.1)
    return moves


def feel(moving: Moving, gradient: torch.Tensor) -> Moves:
    moves = promised(moving, gradient, gradient)
    return moves.at_least(float(moves.gains.sort(descending=True).values[4]))


def test_what_promises_most_moves_against_its_gradient(
    moving: tuple[Moving, Codebook],
) -> None:
    matrix, codebook = moving
    before = matrix.matrix.weight.clone()
    gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    moves = feel(matrix, gradient)
    assert len(moves.places) == 5
    matrix.move_codes(moves)
    change = (matrix.matrix.weight - before).flatten()
    assert set(change.nonzero()[:, 0].tolist()) == set(moves.places.tolist())
    won = -(gradient.flatten() * change)[moves.places]
    torch.testing.assert_close(won, moves.gains, rtol=1e-4, atol=0)
    kept = dequantize(matrix.tensor_now(), codebook)
    np.testing.assert_allclose(matrix.matrix.weight.numpy(), kept, rtol=0, atol=1e-6)

    codes = unpack_codes(matrix.tensor).astype(int)
    steps = unpack_codes(matrix.tensor_now()).astype(int) - codes
    assert np.abs(steps).sum() == 5
    best = max(_alone(matrix, gradient, codebook, codes))
    assert float(moves.gains.max()) == pytest.approx(best, rel=1e-4)


def _alone(
    moving: Moving, gradient: torch.Tensor, codebook: Codebook, codes: np.ndarray
) -> list[float]:
    """What each code wins by each of its two steps, one after the other."""
    tensor = moving.tensor
    order = tensor.stored_to_source()
    cluster, _ = tensor.geometry.locate(np.arange(tensor.rows))
    scales, factors = tensor.scales(codebook)[0], tensor.row_scales()
    found = []
    for row in range(tensor.rows):
        factor = 1.0 if factors is None else float(factors[0, order[row]])
        for column in range(tensor.columns):
            depth = int(tensor.depths[0, cluster[row], column])
            for step in (-1, 1) if depth else ():
                code = codes[row, column] + step
                if 0 <= code < 1 << depth:
                    levels = codebook.levels[depth - 1]
                    change = float(levels[code] - levels[codes[row, column]])
                    change *= float(scales[cluster[row], column]) * factor
                    found.append(-float(gradient[order[row], column]) * change)
    return found


def test_codes_promise_what_two_samples_agree_on(moving: tuple[Moving, Codebook]) -> None:
    matrix, _ = moving
    first, second = (
        torch.randn(matrix.felt.shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
        for seed in (0, 1)
    )
    moves = promised(matrix, first, second)
    a, b = (gradient.flatten()[moves.places] for gradient in (first, second))
    assert (a * b > 0).all()
    assert (moves.steps == -a.sign()).all()
    change = matrix._change(moves.places, moves.steps).abs()
    torch.testing.assert_close(moves.gains, change * torch.minimum(a.abs(), b.abs()))
    assert not len(promised(matrix, first, -first).places)


def test_of_each_row_and_column_one_code_moves(moving: tuple[Moving, Codebook]) -> None:
    matrix, _ = moving
    gradient = torch.ones(matrix.felt.shape) * 1e-3
    moves = promised(matrix, gradient, gradient)
    rows, columns = matrix._at(moves.places)
    assert len(moves.places) > 1
    assert len(rows.unique()) == len(columns.unique()) == len(moves.places)
    assert (moves.gains.diff() <= 0).all()


def test_what_no_token_came_to_promises_nothing(moving: tuple[Moving, Codebook]) -> None:
    matrix, _ = moving
    matrix.matrix.parameter.grad = None
    assert not len(matrix.promising(8, 0.1).places)


def test_what_moved_can_be_undone(moving: tuple[Moving, Codebook]) -> None:
    matrix, _ = moving
    before, codes = matrix.matrix.weight.clone(), matrix.codes.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        matrix.move_codes(feel(matrix, torch.randn(before.shape, generator=generator)))
        with torch.no_grad():
            matrix.octaves += 0.2
        matrix.move_scales()
    assert not torch.equal(matrix.codes, codes)
    matrix.undo()
    with torch.no_grad():
        matrix.octaves.zero_()
    matrix.move_scales()
    assert torch.equal(matrix.codes, codes)
    torch.testing.assert_close(matrix.matrix.weight, before)


def test_what_is_kept_is_not_undone(moving: tuple[Moving, Codebook]) -> None:
    matrix, _ = moving
    matrix.move_codes(feel(matrix, torch.ones(matrix.felt.shape)))
    matrix.keep()
    codes = matrix.codes.clone()
    matrix.undo()
    assert torch.equal(matrix.codes, codes)


def test_weights_in_bfloat16_move_too(moving: tuple[Moving, Codebook]) -> None:
    matrix, codebook = moving
    parameter = matrix.matrix.parameter
    parameter.data = parameter.data.bfloat16()
    before = parameter.data.clone()
    gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    matrix.move_codes(feel(matrix, gradient.bfloat16()))
    matrix.move_scales()
    assert int((parameter.data != before).sum()) == 5
    kept = torch.from_numpy(dequantize(matrix.tensor_now(), codebook))
    torch.testing.assert_close(parameter.data.float(), kept, rtol=2e-2, atol=2e-3)
