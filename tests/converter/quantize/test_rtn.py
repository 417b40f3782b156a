"""Round to nearest against an implementation of a few lines, one group at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.rtn import quantize_rtn, rtn_codebook, turned
from cvxq_converter.source.scratch import Scratch
from cvxq_format import CompandedTensor, Reader, dequantize, verify

CODEBOOK = rtn_codebook()


def quantized(weight: torch.Tensor, depth: int, group_size: int) -> CompandedTensor:
    return quantize_rtn(weight, depth, group_size, CODEBOOK, "out_in", Scratch())


def decoded(weight: np.ndarray, depth: int, group_size: int) -> np.ndarray:
    tensor = quantized(torch.from_numpy(weight.astype(np.float32)), depth, group_size)
    return dequantize(tensor, CODEBOOK).astype(np.float64)


def plain_rtn(weight: np.ndarray, depth: int, group_size: int) -> np.ndarray:
    """Asymmetric round to nearest along the input, clipping searched, in exact arithmetic."""
    out = np.empty_like(weight)
    steps = 2**depth - 1
    for n, row in enumerate(weight):
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            low, high = min(group.min(), 0), max(group.max(), 0)
            best = None
            for shrink in np.linspace(1, 0.5, 17):
                scale = (high - low) * shrink / steps or 1.0
                q = np.clip(np.round((group - low * shrink) / scale), 0, steps)
                tried = low * shrink + q * scale
                if best is None or ((tried - group) ** 2).sum() < ((best - group) ** 2).sum():
                    best = tried
            out[n, start : start + group_size] = best
    return out


def random_weight(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (12, 150)) * np.exp(rng.normal(0, 0.5, (12, 1)))


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("group_size", [32, 64])
def test_it_errs_as_much_as_the_plain_implementation(depth: int, group_size: int) -> None:
    """Scales are stored in steps of 4 %, offsets in 2^depth / 256 of a scale."""
    weight = random_weight()
    ours = ((decoded(weight, depth, group_size) - weight) ** 2).sum()
    plain = ((plain_rtn(weight, depth, group_size) - weight) ** 2).sum()
    assert ours == pytest.approx(plain, rel=0.06)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_every_weight_takes_the_nearest_point_of_its_groups_grid(depth: int) -> None:
    weight = random_weight(1).astype(np.float32)
    tensor = quantized(torch.from_numpy(weight), depth, 64)
    out = dequantize(tensor, CODEBOOK)
    assert tensor.transposed
    assert tensor.mean_codes is not None
    for n in range(12):
        for c in range(3):
            scale = CODEBOOK.scale_table[tensor.scale_codes[0, c, n]] * tensor.scale_unit
            offset = tensor.mean_codes[0, c, n] * tensor.mean_step
            grid = scale * (CODEBOOK.levels[depth - 1] + offset)
            group = weight[n, 64 * c : 64 * (c + 1)]
            nearest = np.abs(group[:, None] - grid).min(1)
            found = np.abs(out[n, 64 * c : 64 * (c + 1)] - group)
            assert found == pytest.approx(nearest, abs=1e-5 * float(scale))


def test_error_falls_with_bits() -> None:
    weight = random_weight(2)
    errors = [((decoded(weight, depth, 64) - weight) ** 2).sum() for depth in range(1, 9)]
    assert (np.diff(errors) < 0).all()
    assert errors[7] < 1e-3 * errors[1]


def test_groups_lie_along_the_input_and_know_nothing_of_each_other() -> None:
    weight = random_weight(3)
    changed, quiet = weight.copy(), weight.std(1).argmin()
    changed[quiet, 70] += 0.5  # in its second group of 64; not the widest, which sets the unit
    same = decoded(weight, 3, 64) == decoded(changed, 3, 64)
    assert not same[quiet, 64:128].all()
    same[quiet, 64:128] = True
    assert same.all()


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_constant_groups_come_back(value: float, depth: int) -> None:
    weight = random_weight(4)
    weight[2, :64] = value
    assert decoded(weight, depth, 64)[2, :64] == pytest.approx(value, rel=0.05, abs=1e-4)
    assert (decoded(np.zeros((3, 5)), depth, 4) == 0).all()


def test_the_grid_is_uniform_and_used_to_its_ends() -> None:
    weight = np.linspace(-1, 1, 64)[None]
    values = np.unique(decoded(weight, 3, 64))
    assert len(values) == 8
    assert np.diff(values) == pytest.approx(values[1] - values[0], rel=1e-5)


def test_one_conversion_per_whole_number_of_bits(
    save_network: Callable[..., Path], tmp_path: Path
) -> None:
    folder, path = save_network("gpt2"), tmp_path / "a.cvxq"
    report = convert(str(folder), path, ConversionOptions.of(bits=3, method="rtn", group_size=16))
    assert not verify(path)
    assert report.depth_histogram[3] == 1.0
    codebook = 8 * len(CODEBOOK.to_bytes()) / report.quantized_weights
    # 3 bits of code, 16 of scale and offset for every 16 weights, and a few bytes per matrix
    assert report.rate_bits_per_weight - codebook == pytest.approx(4.0, abs=0.05)
    assert report.side_bits_per_weight == pytest.approx(report.rate_bits_per_weight - 3, abs=1e-6)
    with Reader(path) as reader:
        assert json.loads(reader.file("provenance.json"))["options"]["method"] == "rtn"
    for bits in (2.5, 0.0):
        with pytest.raises(ConversionError, match="rtn takes whole --bits from 1 to 8"):
            convert(str(folder), path, ConversionOptions.of(bits=bits, method="rtn"))
    with pytest.raises(ConversionError, match="rtn takes whole --bits from 1 to 8"):
        convert(str(folder), path, ConversionOptions.of(size_bytes=99999, method="rtn"))


def test_groups_of_outputs_are_those_of_the_transposed_matrix() -> None:
    weight = torch.from_numpy(random_weight().astype(np.float32))
    across = turned(quantize_rtn(weight.T, 4, 64, CODEBOOK, "out_in", Scratch()))
    along = quantize_rtn(weight.T.contiguous(), 4, 64, CODEBOOK, "out_in", Scratch())
    assert across.shape == (12, 150)
    assert not across.transposed  # which the kernels would go through one code at a time
    assert (dequantize(across, CODEBOOK) == dequantize(along, CODEBOOK).T).all()
