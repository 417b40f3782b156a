"""The packed weight against the format's own dequantizer, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_format import Codebook, CompandedTensor, dequantize, pack_codes
from cvxq_kernels import PackedWeight, packed

CODEBOOK = Codebook.default()

VARIANTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "whole clusters": ((48, 20), {"group_size": 8, "partitions": 2}),
    "remainder clusters": ((50, 21), {"group_size": 12, "partitions": 2}),
    "cluster larger than the partition": ((30, 7), {"group_size": 512, "partitions": 3}),
    "one row": ((1, 9), {"group_size": 4, "partitions": 1}),
    "one column": ((33, 1), {"group_size": 16, "partitions": 1}),
    "transposed": ((21, 50), {"group_size": 12, "transposed": True}),
    "no permutation": ((26, 13), {"group_size": 8, "permuted": False, "partitions": 1}),
    "no means": ((26, 13), {"group_size": 8, "means": False, "partitions": 1}),
    "no means, transposed": ((26, 13), {"group_size": 8, "means": False, "transposed": True}),
    "stacked experts": ((3, 18, 11), {"group_size": 7, "partitions": 2}),
    "stacked and transposed": ((3, 18, 11), {"group_size": 7, "transposed": True}),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def tensor(
    request: pytest.FixtureRequest, random_companded: Callable[..., CompandedTensor]
) -> CompandedTensor:
    shape, options = request.param
    return random_companded(shape, seed=7, **options)


def bits(values: torch.Tensor) -> torch.Tensor:
    """float32 as int32, so that −0 and +0 differ."""
    return values.contiguous().view(torch.int32)


def test_dense_is_bit_equal_to_the_format(tensor: CompandedTensor) -> None:
    expected = torch.from_numpy(dequantize(tensor, CODEBOOK))
    dense = PackedWeight.from_tensor(tensor, CODEBOOK).dense()
    assert dense.shape == tensor.shape
    assert torch.equal(bits(dense), bits(expected))


def test_dense_does_not_depend_on_the_chunk(
    tensor: CompandedTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = PackedWeight.from_tensor(tensor, CODEBOOK)
    whole = weight.dense()
    monkeypatch.setattr(packed, "CHUNK_WEIGHTS", 1)
    assert torch.equal(bits(weight.dense()), bits(whole))


def test_rows_are_those_of_the_dense_matrix(tensor: CompandedTensor) -> None:
    weight = PackedWeight.from_tensor(tensor, CODEBOOK)
    if len(tensor.shape) == 3:
        with pytest.raises(ValueError, match="rows of a stacked weight"):
            weight.rows(torch.tensor([0]))
        return
    count = tensor.shape[0]
    ids = torch.tensor([[count - 1, 0, 0], [count // 2, count // 3, count - 1]])
    found = weight.rows(ids)
    assert found.shape == (2, 3, tensor.shape[1])
    assert torch.equal(bits(found), bits(weight.dense()[ids]))


def test_rows_in_many_chunks(
    random_companded: Callable[..., CompandedTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = PackedWeight.from_tensor(random_companded((40, 9), seed=1), CODEBOOK)
    monkeypatch.setattr(packed, "CHUNK_WEIGHTS", 20)
    assert torch.equal(weight.rows(torch.arange(40)), weight.dense())


@pytest.mark.parametrize("bad", [-1, 40])
def test_a_row_outside_is_refused(
    random_companded: Callable[..., CompandedTensor], bad: int
) -> None:
    weight = PackedWeight.from_tensor(random_companded((40, 9), seed=1), CODEBOOK)
    with pytest.raises(IndexError, match=r"allowed 0\.\.39"):
        weight.rows(torch.tensor([3, bad]))


def test_no_rows(random_companded: Callable[..., CompandedTensor]) -> None:
    weight = PackedWeight.from_tensor(random_companded((40, 9), seed=1), CODEBOOK)
    assert weight.rows(torch.empty((0,), dtype=torch.long)).shape == (0, 9)


@pytest.mark.parametrize("depth", range(9))
def test_every_depth(depth: int, random_companded: Callable[..., CompandedTensor]) -> None:
    base = random_companded((37, 5), seed=2, group_size=16, partitions=1)
    depths = np.full_like(base.depths, depth)
    codes = np.random.default_rng(3).integers(0, 2**depth, (37, 5)).astype(np.uint8)
    tensor = replace(base, depths=depths, packed_codes=pack_codes(codes, depths[0], 16, 1))
    expected = torch.from_numpy(dequantize(tensor, CODEBOOK))
    weight = PackedWeight.from_tensor(tensor, CODEBOOK)
    assert torch.equal(bits(weight.dense()), bits(expected))
    assert torch.equal(bits(weight.rows(torch.arange(37))), bits(expected))


def test_row_scales(random_companded: Callable[..., CompandedTensor]) -> None:
    tensor = random_companded((40, 9), seed=1)
    codes = np.random.default_rng(6).integers(0, 16, (1, 40), dtype=np.uint8)
    tensor = replace(tensor, row_scale_codes=codes, row_scale_bits=4)
    expected = torch.from_numpy(dequantize(tensor, CODEBOOK))
    weight = PackedWeight.from_tensor(tensor, CODEBOOK)
    assert torch.equal(bits(weight.dense()), bits(expected))
    assert torch.equal(bits(weight.rows(torch.arange(40))), bits(expected))


def test_dtype_is_cast_after_decoding(random_companded: Callable[..., CompandedTensor]) -> None:
    weight = PackedWeight.from_tensor(random_companded((40, 9), seed=1), CODEBOOK)
    assert torch.equal(weight.dense(torch.bfloat16), weight.dense().bfloat16())
    ids = torch.tensor([5, 6])
    assert torch.equal(weight.rows(ids, torch.bfloat16), weight.dense().bfloat16()[ids])


def test_codes_are_not_copied(random_companded: Callable[..., CompandedTensor]) -> None:
    tensor = random_companded((40, 9), seed=1)
    weight = PackedWeight.from_tensor(tensor, CODEBOOK)
    assert weight.codes.data_ptr() == tensor.packed_codes.ctypes.data
    assert weight.to("cpu").codes.data_ptr() == weight.codes.data_ptr()


def test_memory_is_codes_and_little_else(
    random_companded: Callable[..., CompandedTensor],
) -> None:
    tensor = random_companded((512, 256), seed=1, group_size=128, means=False)
    weight = PackedWeight.from_tensor(tensor, CODEBOOK)
    groups, rows, tables = tensor.depths.size, 512, 4 * (512 + 256 + 64)
    little = 2 * groups + 20 * rows + 24 * tensor.clusters + tables
    assert weight.nbytes == tensor.packed_codes.nbytes + little


def test_triton_is_not_imported() -> None:
    code = "import sys, cvxq_kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
