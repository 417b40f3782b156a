"""Level tables in the forms that the kernels look up.

Every form is ℓ_B divided by a number per depth, the *unit*, which is multiplied back where it costs
nothing.

Signed bytes (depths 1–4).  The unit is searched for between 127 and 64 steps for the largest
magnitude, so that the roundings of the few levels agree best.  Four tables bytes per int32.
Depth 4 needs no selection between two tables of eight: with the lowest bit of the code as the
nibble's highest, `prmt` of a table t by the other three bits gives t[i], and `prmt` of a table d of
negative numbers by the whole nibble gives d[i] for even codes and, its highest bit replicating the
sign, −1 for odd ones.  So t[i] = ℓ(2i+1) + 1 and d[i] = ℓ(2i) − t[i] make t + d the level.

Two signed bytes (depths 1–4): 256 · upper + lower, 32512 units being the largest magnitude.  At
depth 4 they are t, and d is a third byte that counts c times: levels 2i and 2i+1 are t[i] + c·d[i]
and t[i] − c.  The float32 c is searched for, and both levels share what rounding their gap costs.

float16 (all depths).  The unit is the largest magnitude, so that neither end of float16 is near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvxq_kernels.gpu.layout import BYTE_WORDS, LOW_DEPTH, MAX_DEPTH, WIDE_WORDS, operand_order

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LevelTables:
    """Tables of all depths; `byte_words` (9, 4) and `wide_words` (9, 8) int32, `units` (3, 9).

    halves (float16) and exact (float32): depth B's levels at [2^B, 2^(B+1)), by nibble or byte of
    the device layout. half_words (9, 8) int32: the low bytes, then the high bytes of `halves` for
    depths 1–4. wide_words: eight upper bytes, eight lower, at depth 4 eight d and c / 256.
    units: of the bytes, of the halves and of the wide words.
    """

    byte_words: npt.NDArray[np.int32]
    wide_words: npt.NDArray[np.int32]
    half_words: npt.NDArray[np.int32]
    halves: npt.NDArray[np.float16]
    exact: Array
    units: Array


def make_tables(joined: Array) -> LevelTables:
    """Tables for levels (512,) float32, depth B's at [2^B, 2^(B+1)), finite and ascending."""
    words = np.zeros((MAX_DEPTH + 1, BYTE_WORDS), np.int32)
    half_words, wide_words = np.zeros((2, MAX_DEPTH + 1, WIDE_WORDS), np.int32)
    halves, exact = np.zeros(512, np.float16), np.zeros(512, np.float32)
    units = np.zeros((3, MAX_DEPTH + 1), np.float32)
    for depth in range(1, MAX_DEPTH + 1):
        part = slice(1 << depth, 2 << depth)
        levels = joined[part][operand_order(depth)]
        exact[part] = levels
        units[1, depth] = np.abs(levels).max() or 1
        halves[part] = levels / units[1, depth]
        if depth <= LOW_DEPTH:
            units[0, depth], integers = _round_levels(joined[part].astype(np.float64))
            words[depth] = _byte_table(integers).view(np.int32)
            units[2, depth], wide_words[depth] = _wide_table(joined[part].astype(np.float64))
            both = halves[part].view(np.uint8).reshape(-1, 2)
            half_words[depth] = np.concatenate([_filled(both[:, i]) for i in (0, 1)]).view(np.int32)
    return LevelTables(words, wide_words, half_words, halves, exact, units)


def _round_levels(levels: npt.NDArray[np.float64]) -> tuple[np.float32, npt.NDArray[np.int64]]:
    """Unit and integers −127 … 126 such that unit · integer is nearest to `levels` (2^B,)."""
    largest = np.abs(levels).max()
    if largest == 0:
        return np.float32(1), np.zeros(len(levels), np.int64)
    units = largest / np.linspace(64, 126, 1241)
    integers = np.rint(levels / units[:, None])
    odd = np.diff(integers[:, : len(levels)], axis=1)[:, ::2].max(axis=1) > 126
    error = ((integers * units[:, None] - levels) ** 2).sum(axis=1)
    best = int(np.argmin(np.where(odd, np.inf, error)))
    return np.float32(units[best]), integers[best].astype(np.int64)


def _wide_table(
    levels: npt.NDArray[np.float64],
) -> tuple[np.float32, npt.NDArray[np.int32]]:
    """Unit and words (8,) of 16-bit levels; see the module's first lines."""
    # At depth 4, t exceeds a level by less than 512.
    unit = np.float32((np.abs(levels).max() or 1) / (32512 if len(levels) < 16 else 32000))
    whole = levels / np.float64(unit)
    gaps, factor = np.zeros(0, np.int8), 0.0
    if len(levels) == 16:
        wanted = np.diff(whole)[::2]
        factors = max(wanted.max(), 1.0) / np.linspace(64, 127, 4001)[:, None]
        off = np.rint(wanted / factors) * factors - wanted
        # Where levels lie close, weights are many.
        best = np.argmin((off**2 / np.maximum(wanted, 1.0) ** 2).sum(1))
        factor = float(factors[best, 0])
        gaps = (-1 - np.rint(wanted / factor)).astype(np.int8)
        whole = whole[1::2] + factor + off[best] / 2
    rounded = np.rint(whole).astype(np.int64)
    upper, lower = (rounded + 128) >> 8, (rounded + 128) % 256 - 128
    parts = [_filled(part.astype(np.int8).view(np.uint8), 8) for part in (upper, lower, gaps)]
    last = np.array([factor / 256, 0], np.float32)
    return unit, np.concatenate([*parts, last.view(np.uint8)]).view(np.int32)


def _byte_table(integers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """(16,) bytes for depths 1–4; see the module's first lines for depth 4."""
    if len(integers) < 16:
        return _filled(integers.astype(np.int8).view(np.uint8), 16)
    table = integers[1::2] + 1
    return np.concatenate([table, integers[::2] - table]).astype(np.int8).view(np.uint8)


def _filled(values: npt.NDArray[np.uint8], size: int = 16) -> npt.NDArray[np.uint8]:
    result = np.zeros(size, np.uint8)
    result[: len(values)] = values
    return result
