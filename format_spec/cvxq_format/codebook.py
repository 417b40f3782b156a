"""A codebook: the tables that give codes their values, shared by any number of matrices.

It holds the scale table (a group's scale code picks an entry), the eight depth thresholds that
turn separable depth terms into bit depths, and one level table per bit depth 1…8. The default
levels are the expander of the Laplace companding function, arXiv 2409.02026: a code's position
u on the companded interval maps back to −(3/√2)·sgn(u)·ln(1 − 2|u|). Tables that equal the default
need not be stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cvxq_format.errors import CorruptError
from cvxq_format.limits import ALL_LEVEL_DEPTHS, MAX_DEPTH

Floats = npt.NDArray[np.float32]

DEPTHS = tuple(range(1, MAX_DEPTH + 1))


def codebook_size(scale_bits: int, level_depths: int = ALL_LEVEL_DEPTHS) -> int:
    """Return the bytes of a codebook section; level_depths: bit B − 1 set for each table stored."""
    levels = sum(2**depth for depth in _depths_in(level_depths))
    return 4 * (2**scale_bits + MAX_DEPTH + levels)


def depth_mask(depths: Iterable[int]) -> int:
    """Return bit B − 1 set for each depth B, as the header names stored level tables."""
    return sum(1 << (depth - 1) for depth in depths)


def _depths_in(level_depths: int) -> tuple[int, ...]:
    return tuple(depth for depth in DEPTHS if level_depths >> (depth - 1) & 1)


def compander_levels(depth: int) -> Floats:
    """Return the default levels of one bit depth, in units of the group's scale.

    depth: 1…8. Returns (2^depth,) float32, ascending and exactly symmetric:
    ℓ(q) = −(3/√2)·sgn(u)·ln(1 − 2|u|), u = (q + ½)/2^depth − ½, in float64 and then rounded.
    """
    half = 2 ** (depth - 1)
    positive = [-3 / math.sqrt(2) * math.log(1 - (2 * j + 1) / 2**depth) for j in range(half)]
    upper = np.array(positive, np.float64).astype(np.float32)
    return np.concatenate([-upper[::-1], upper])


def first_levels(depths: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Return where the levels of each bit depth B begin in `flat_levels`: 2^B − 1."""
    return np.left_shift(1, depths, dtype=np.intp) - 1


def logarithmic_scales(scale_bits: int, steps_per_octave: int = 8) -> Floats:
    """Return a scale table (2^scale_bits,) float32: 0, then powers 2^(−i/steps_per_octave) up to 1.

    Eight steps per octave, 9 % between neighbours, cost nothing measurable.
    """
    top = 2**scale_bits - 1
    scales = [0.0] + [2.0 ** ((i - top) / steps_per_octave) for i in range(1, top + 1)]
    return np.array(scales, np.float64).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Codebook:
    """The tables of one codebook section.

    scale_table: (2^scale_bits,) float32, strictly ascending, first ≥ +0.
    depth_thresholds: (8,) int32, non-decreasing, in 1/256 bit.
    levels: eight (2^B,) float32 tables, B = 1…8, strictly ascending.
    stored_depths: ascending, the depths B whose level tables the section holds; the others must be
    the default levels.
    Raises CorruptError if any table breaks these rules.
    """

    scale_table: Floats
    depth_thresholds: npt.NDArray[np.int32]
    levels: tuple[Floats, ...]
    stored_depths: tuple[int, ...] = DEPTHS

    def __post_init__(self) -> None:
        size = self.scale_table.size
        if size not in {2**bits for bits in range(1, 9)}:
            raise CorruptError(f"scale table of {size} entries, allowed 2, 4, … 256")
        _check_ascending(self.scale_table, "scale table")
        if np.signbit(self.scale_table[0]):
            raise CorruptError(f"scale table starts at {self.scale_table[0]}, allowed 0 or more")
        if self.depth_thresholds.shape != (MAX_DEPTH,):
            raise CorruptError(f"{self.depth_thresholds.size} depth thresholds, allowed 8")
        if np.any(self.depth_thresholds[1:] < self.depth_thresholds[:-1]):
            raise CorruptError("depth thresholds decrease, allowed only equal or rising")
        if len(self.levels) != MAX_DEPTH:
            raise CorruptError(f"{len(self.levels)} level tables, allowed 8")
        for depth, table in enumerate(self.levels, start=1):
            if table.shape != (2**depth,):
                raise CorruptError(f"level table {depth} has shape {table.shape}")
            _check_ascending(table, f"level table {depth}")
        if self.stored_depths != _depths_in(self.level_depths):
            raise CorruptError(
                f"stored depths {self.stored_depths}, allowed 1 to {MAX_DEPTH}, ascending"
            )
        for depth in set(DEPTHS).difference(self.stored_depths):
            if not np.array_equal(self.levels[depth - 1], compander_levels(depth)):
                raise CorruptError(
                    f"level table {depth} is not the default, so that it must be stored"
                )

    @classmethod
    def default(cls, scale_bits: int = 6) -> Codebook:
        """Return the compander's levels, scales 2^(−i/8), and thresholds at half bits."""
        thresholds = 256 * np.arange(1, MAX_DEPTH + 1, dtype=np.int32) - 128
        levels = tuple(compander_levels(depth) for depth in DEPTHS)
        return cls(logarithmic_scales(scale_bits), thresholds.astype(np.int32), levels)

    @property
    def scale_bits(self) -> int:
        return int(self.scale_table.size).bit_length() - 1

    @property
    def level_depths(self) -> int:
        """The stored depths as the header has them: bit B − 1 for depth B."""
        return depth_mask(set(DEPTHS).intersection(self.stored_depths))

    def flat_levels(self) -> Floats:
        """Return all levels as (511,) float32; depth B's level q is at `first_levels(B)` + q."""
        return np.concatenate([np.zeros(1, np.float32), *self.levels]).astype(np.float32)

    def largest_level(self) -> np.float32:
        """Return the largest magnitude among all levels."""
        return np.float32(max(float(np.abs(table).max()) for table in self.levels))

    def depths_of(
        self,
        column_terms: npt.NDArray[np.uint8],
        cluster_terms: npt.NDArray[np.int16],
        column_shift: int,
    ) -> npt.NDArray[np.uint8]:
        """Return bit depths (E, C, Kc) from column terms (E, Kc) and cluster terms (E, C).

        A depth counts the thresholds that do not exceed cluster term + column term · 2^shift.
        """
        depths = np.empty((*cluster_terms.shape, column_terms.shape[1]), np.uint8)
        for out, columns, clusters in zip(depths, column_terms, cluster_terms, strict=True):
            # Few terms differ: one column for each of them, and copies of those.
            present = np.bincount(columns) > 0
            terms = np.flatnonzero(present).astype(np.int32)
            places = (np.cumsum(present) - 1)[columns]
            total = (terms << column_shift) + clusters.astype(np.int32)[:, None]
            table = np.zeros(total.shape, np.uint8)
            for threshold in self.depth_thresholds:
                table += total >= threshold
            np.take(table, places, axis=1, out=out, mode="clip")
        return depths

    def to_bytes(self) -> bytes:
        """Return the codebook section's bytes."""
        parts = [self.scale_table.astype("<f4"), self.depth_thresholds.astype("<i4")]
        parts += [self.levels[depth - 1].astype("<f4") for depth in self.stored_depths]
        return b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, scale_bits: int, level_depths: int = ALL_LEVEL_DEPTHS
    ) -> Codebook:
        """Parse a codebook section; raises CorruptError if it breaks a rule."""
        size = codebook_size(scale_bits, level_depths)
        if len(data) != size:
            raise CorruptError(f"{len(data)} bytes, {size} expected")
        scales = np.frombuffer(data, "<f4", 2**scale_bits).astype(np.float32)
        position = 4 * scales.size
        thresholds = np.frombuffer(data, "<i4", MAX_DEPTH, position).astype(np.int32)
        position += 4 * MAX_DEPTH
        levels = []
        stored = _depths_in(level_depths)
        for depth in DEPTHS:
            if depth in stored:
                table = np.frombuffer(data, "<f4", 2**depth, position).astype(np.float32)
                position += 4 * table.size
            else:
                table = compander_levels(depth)
            levels.append(table)
        return cls(scales, thresholds, tuple(levels), stored)


def _check_ascending(table: Floats, what: str) -> None:
    if not np.isfinite(table).all():
        raise CorruptError(f"{what} holds a value that is not finite")
    if np.any(table[1:] <= table[:-1]):
        raise CorruptError(f"{what} is not strictly ascending")
