"""Repacking, its inverse, expansion and rows: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from cvxq_format import Codebook, CompandedTensor, unpack_codes
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import GpuWeight, UnsupportedWeightError
from cvxq_kernels.gpu.layout import CHUNK, place_table
from cvxq_kernels.gpu.matrix import AHEAD_WORDS, DeviceMatrix

CODEBOOK = Codebook.default()
Make = Callable[..., PackedWeight]

RISING = np.minimum(np.arange(45) // 5, 8)  # 5 columns of every depth
SEPARABLE = np.clip(RISING[::-1] + np.array([[0], [1], [-1]]), 0, 8)


def bits(values: torch.Tensor) -> torch.Tensor:
    """float32 as int32, so that −0 and +0 differ."""
    return values.cpu().contiguous().view(torch.int32)


def unpack(matrix: DeviceMatrix) -> torch.Tensor:
    """Codes of every slot from device words: (slots, 32, rows) uint8, the inverse of `repack`."""
    tiles = matrix.tiles[matrix.slot_tiles].to(torch.int64)
    number = torch.arange(len(tiles), device=tiles.device) - tiles[:, 3]
    depth = (matrix.chunks[tiles[:, 2] + number] >> 6 & 15).to(torch.int64)
    base = depth.cumsum(0) - depth
    places = torch.from_numpy(place_table()).to(tiles)
    codes = tiles.new_zeros((len(tiles), CHUNK, matrix.rows))
    lanes = torch.arange(matrix.rows, device=tiles.device)
    for bit in range(8):
        place = places[depth, :, bit]  # (slots, 32)
        has_bit = (bit < depth)[:, None].expand_as(place)
        slot, column = has_bit.nonzero(as_tuple=True)
        where = place[slot, column]
        word = (base[slot] + where // 32) * matrix.rows
        value = matrix.words[word[:, None] + lanes].to(torch.int64) >> (where % 32)[:, None]
        codes[slot, column] |= (value & 1) << bit
    return codes.to(torch.uint8)


def test_unpacking_gives_the_codes_back(
    random_companded: Callable[..., CompandedTensor], device: torch.device
) -> None:
    tensor = random_companded((23, 37), seed=1, group_size=16, partitions=1)
    packed = PackedWeight.from_tensor(tensor, CODEBOOK)
    matrix = GpuWeight.from_packed(packed, device).matrix
    found = unpack(matrix).cpu()
    expected = unpack_codes(tensor).reshape(23, 37)  # stored rows
    count = 0
    slot = 0
    runs = matrix.runs.cpu()
    for tile in matrix.tiles.cpu().tolist():
        cluster, chunk_base, order_base = tile[0], tile[2], tile[4]
        first = int(packed.cluster_first_row[cluster])
        height = int(packed.cluster_rows[cluster])
        for number in range(int(runs[cluster, 9])):
            entry = int(matrix.chunks[chunk_base + number])
            start, width = entry >> 10, entry & 63
            columns = matrix.order[order_base + start : order_base + start + width].tolist()
            block = expected[first : first + height, columns]
            assert np.array_equal(found[slot, :width, :height].T.numpy(), block)
            count += block.size
            slot += 1
    assert count == expected.size


@pytest.mark.parametrize(
    ("shape", "depths", "options"),
    [
        ((23, 37), None, {"means": True}),
        ((48, 45), SEPARABLE, {"means": True}),
        ((33, 45), SEPARABLE, {"permuted": False}),
        ((1, 9), 4, {"group_size": 4}),
        ((17, 1), 3, {}),
        ((40, 45), RISING, {"group_size": 40}),
        ((20, 33), 0, {}),
        ((20, 33), 0, {"means": True}),
    ],
    ids=[
        "explicit", "separable", "remainder", "row", "column", "two tiles", "pruned", "means only",
    ],
)  # fmt: skip
def test_dense_and_rows_are_bit_equal(
    make: Make, device: torch.device, nans: Callable[..., torch.Tensor],
    shape: tuple[int, int], depths: np.ndarray | int | None, options: dict[str, object],
) -> None:  # fmt: skip
    packed = make(shape, depths, **options)
    weight = GpuWeight.from_packed(packed, device)
    expected = packed.dense()
    assert torch.equal(bits(weight.dense(out=nans(*shape))), bits(expected))
    ids = torch.tensor([[shape[0] - 1, 0], [shape[0] // 2, 0]])
    assert torch.equal(bits(weight.rows(ids.to(device))), bits(expected[ids]))


def test_one_order_of_columns_serves_separable_depths(make: Make, device: torch.device) -> None:
    shared = GpuWeight.from_packed(make((33, 12), SEPARABLE[:, ::4]), device).matrix
    assert shared.shared_order
    assert shared.order.shape == (12 + CHUNK,)
    own = GpuWeight.from_packed(make((33, 12)), device).matrix
    assert not own.shared_order
    assert own.order.shape == (3 * 12 + CHUNK,)


def test_fused_weights_lie_below_each_other(make: Make, device: torch.device) -> None:
    parts = [
        make((16, 20), 3, seed=1, scale=0.3),
        make((5, 20), None, seed=2, means=True),
        make((32, 20), 5, seed=3),
    ]
    fused = GpuWeight.fused(parts, device)
    expected = torch.cat([part.dense() for part in parts])
    assert fused.matrix.outputs == (16, 5, 32)
    assert fused.shape == (53, 20)
    assert torch.equal(bits(fused.dense()), bits(expected))
    ids = torch.tensor([0, 17, 52])
    assert torch.equal(bits(fused.rows(ids.to(device))), bits(expected[ids]))


def test_rows_of_a_vocabulary(make: Make, device: torch.device) -> None:
    """SmolLM2's 49,152, in clusters of two tiles, all but one of them pruned."""
    depths = np.zeros((192, 2), np.uint8)
    depths[191] = [4, 7]
    packed = make((49_152, 2), depths, group_size=256, permuted=False, means=True)
    weight = GpuWeight.from_packed(packed, device)
    ids = torch.tensor([49_151, 0, 255, 256, 100 * 256 + 200, 40_000])
    assert torch.equal(bits(weight.rows(ids.to(device))), bits(packed.rows(ids)))


def test_rows_are_cast_after_decoding(make: Make, device: torch.device) -> None:
    packed = make((20, 33))
    weight = GpuWeight.from_packed(packed, device)
    ids = torch.tensor([3, 19])
    expected = packed.dense()[ids].half()  # the interpreter rounds bfloat16 the wrong way
    assert torch.equal(weight.rows(ids.to(device), torch.float16).cpu(), expected)
    assert weight.rows(torch.empty((0,), dtype=torch.long)).shape == (0, 33)


def test_memory_is_codes_and_little_else(make: Make, device: torch.device) -> None:
    packed = make((64, 256), 3, group_size=64)
    weight = GpuWeight.from_packed(packed, device)
    assert weight.matrix.words.nbytes == packed.codes.nbytes + 4 * AHEAD_WORDS
    groups = 256
    assert weight.nbytes - weight.matrix.words.nbytes < 2 * groups + 4 * 256 + 16 * 64 + 8192


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"transposed": True}, None, r"transposed weight \(20, 33\): plain \(N, K\) ones only"),
        ({}, {"shape": (20, 32)}, "inputs 32 and 33 differ: fused weights share theirs"),
        ({}, {"codebook": "other"}, "weights with different level tables cannot be fused"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(
    make: Make, device: torch.device, first: dict[str, object],
    second: dict[str, object] | None, said: str,
) -> None:  # fmt: skip
    weights = [make((20, 33), **first)]
    if second is not None:
        other = make(second.get("shape", (20, 33)))
        if "codebook" in second:
            other = replace(other, levels=other.levels * 2)
        weights.append(other)
    with pytest.raises(UnsupportedWeightError, match=said):
        GpuWeight.fused(weights, device)
