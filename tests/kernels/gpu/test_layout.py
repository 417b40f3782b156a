"""The arrangement of bits and the level tables, without running a kernel."""

from __future__ import annotations

import numpy as np
import pytest
from cvxq_format import Codebook
from cvxq_kernels.gpu.layout import bit_places, operand_order, tile_rows
from cvxq_kernels.gpu.tables import make_tables
from cvxq_kernels.tables import joined_levels

CODEBOOK = Codebook.default()
GAUSS = np.random.default_rng(0).standard_normal(200_000)


@pytest.mark.parametrize("depth", range(1, 9))
def test_every_bit_of_a_chunk_has_its_own_place(depth: int) -> None:
    assert sorted(bit_places(depth).reshape(-1)) == list(range(32 * depth))


@pytest.mark.parametrize("depth", range(1, 5))
def test_columns_of_an_eighth_lie_in_nibbles_in_order(depth: int) -> None:
    nibble = bit_places(depth).reshape(4, 8, depth) % 32 // 4
    assert (nibble == np.arange(8)[None, :, None]).all()


@pytest.mark.parametrize("depth", range(5, 9))
def test_columns_of_a_quad_lie_in_bytes_in_order(depth: int) -> None:
    byte = bit_places(depth).reshape(8, 4, depth) % 32 // 8
    assert (byte == np.arange(4)[None, :, None]).all()


@pytest.mark.parametrize(
    ("group", "rows"),
    [(1, 16), (16, 16), (17, 32), (64, 64), (96, 32), (100, 16), (128, 128), (192, 64), (512, 128)],
)
def test_tiles_pad_little(group: int, rows: int) -> None:
    assert tile_rows(group) == rows


def byte_values(words: np.ndarray, depth: int) -> np.ndarray:
    """Signed level that the kernels find for every nibble of `depth`."""
    table = words.view(np.int8).astype(int)
    if depth < 4:
        return table[: 1 << depth]
    nibble = np.arange(16)
    added = np.where(nibble < 8, table[8 + nibble % 8], np.where(table[8 + nibble % 8] < 0, -1, 0))
    return table[nibble % 8] + added


def distortion(depth: int, levels: np.ndarray) -> float:
    """Mean squared error of a unit Gaussian quantized to the nearest level."""
    edges = (levels[1:] + levels[:-1]) / 2
    return float(np.mean((GAUSS - levels[np.searchsorted(edges, GAUSS)]) ** 2))


@pytest.mark.parametrize("depth", range(1, 5))
def test_bytes_add_little_to_a_depths_own_error(depth: int) -> None:
    """Rounded levels cost less than 2 % of what the depth costs anyway."""
    levels = CODEBOOK.levels[depth - 1].astype(np.float64)
    tables = make_tables(joined_levels(CODEBOOK))
    rounded = np.empty_like(levels)
    found = byte_values(tables.byte_words[depth], depth)
    rounded[operand_order(depth)] = found * tables.units[0, depth]
    edges = (levels[1:] + levels[:-1]) / 2
    code = np.searchsorted(edges, GAUSS)
    extra = np.mean((rounded[code] - levels[code]) ** 2)
    assert extra < 0.02 * distortion(depth, levels)


@pytest.mark.parametrize("seed", range(20))
def test_any_table_of_depth_4_fits(seed: int) -> None:
    """Uneven tables too: no byte of the two tables overflows, and the error is half a unit."""
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.standard_cauchy(16)).astype(np.float32)
    joined = joined_levels(CODEBOOK)
    joined[16:32] = levels
    tables = make_tables(joined)
    found = byte_values(tables.byte_words[4], 4) * tables.units[0, 4]
    assert np.abs(found - levels[operand_order(4)]).max() <= tables.units[0, 4] * 0.5001
    assert tables.units[0, 4] <= np.abs(levels).max() / 60


def wide_values(words: np.ndarray, depth: int) -> np.ndarray:
    """Level, in units, that the kernels find for every nibble of `depth` with 16 bits."""
    upper, lower, gap = words.view(np.int8)[:24].astype(int).reshape(3, 8)
    nibble = np.arange(1 << depth)
    whole = (256 * upper + lower)[nibble % 8]
    if depth < 4:
        return whole
    return whole + 256 * words[6:7].view(np.float32)[0] * np.where(nibble < 8, gap[nibble % 8], -1)


@pytest.mark.parametrize("depth", range(1, 5))
def test_16_bits_add_next_to_nothing_to_a_depths_own_error(depth: int) -> None:
    levels = CODEBOOK.levels[depth - 1].astype(np.float64)
    tables = make_tables(joined_levels(CODEBOOK))
    found = np.empty_like(levels)
    wide = wide_values(tables.wide_words[depth], depth)
    found[operand_order(depth)] = wide * float(tables.units[2, depth])
    edges = (levels[1:] + levels[:-1]) / 2
    code = np.searchsorted(edges, GAUSS)
    extra = np.mean((found[code] - levels[code]) ** 2)
    assert extra < 1e-4 * distortion(depth, levels)


@pytest.mark.parametrize("seed", range(20))
def test_any_table_of_depth_4_fits_16_bits(seed: int) -> None:
    """At most a quarter of the factor is lost, which is a 64th of the largest gap at worst."""
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.standard_cauchy(16)).astype(np.float32)
    joined = joined_levels(CODEBOOK)
    joined[16:32] = levels
    tables = make_tables(joined)
    found = wide_values(tables.wide_words[4], 4) * float(tables.units[2, 4])
    allowed = np.diff(levels).max() / 64 / 4 + float(tables.units[2, 4])
    assert np.abs(found - levels[operand_order(4)]).max() <= allowed
    assert (tables.wide_words[4].view(np.int8)[16:24] < 0).all()  # or signs are not ones


@pytest.mark.parametrize("depth", range(1, 9))
def test_halves_are_the_levels(depth: int) -> None:
    tables = make_tables(joined_levels(CODEBOOK))
    part = slice(1 << depth, 2 << depth)
    levels = CODEBOOK.levels[depth - 1][operand_order(depth)]
    assert np.array_equal(tables.exact[part], levels)
    halves = tables.halves[part].astype(np.float64) * tables.units[1, depth]
    assert np.abs(halves / levels - 1).max() < 2**-11
    if depth <= 4:
        both = tables.half_words[depth].view(np.uint8).reshape(2, 16)[:, : 1 << depth]
        assert np.array_equal(both.T.copy().view(np.float16)[:, 0], tables.halves[part])


def test_a_table_of_zeros() -> None:
    tables = make_tables(np.zeros(512, np.float32))
    assert not tables.byte_words[1:4].any()
    assert not tables.halves.any()
    assert np.isfinite(tables.units).all()
    assert not byte_values(tables.byte_words[4], 4).any()
    for depth in range(1, 5):
        assert np.abs(wide_values(tables.wide_words[depth], depth)).max() <= 0.5
