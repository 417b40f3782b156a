"""The numbers of `layout` for kernels, which may use no globals but `tl.constexpr`."""

from __future__ import annotations

import triton.language as tl

import cvxq_kernels.gpu.layout as layout

CHUNK = tl.constexpr(layout.CHUNK)
MAX_DEPTH = tl.constexpr(layout.MAX_DEPTH)
LOW_DEPTH = tl.constexpr(layout.LOW_DEPTH)
LOW_DEPTHS = tl.constexpr(layout.LOW_DEPTHS)
EIGHTHS = tl.constexpr(layout.EIGHTHS)
PAIRS = tl.constexpr(layout.PAIRS)
SCALES = tl.constexpr(layout.SCALES)

TILE_FIELDS = tl.constexpr(layout.TILE_FIELDS)
CLUSTER = tl.constexpr(layout.CLUSTER)
WORD_BASE = tl.constexpr(layout.WORD_BASE)
CHUNK_BASE = tl.constexpr(layout.CHUNK_BASE)
SLOT_BASE = tl.constexpr(layout.SLOT_BASE)
ORDER_BASE = tl.constexpr(layout.ORDER_BASE)
MATRIX = tl.constexpr(layout.MATRIX)

RUN_FIELDS = tl.constexpr(layout.RUN_FIELDS)
RUN_END = tl.constexpr(layout.RUN_FIELDS - 1)

START_SHIFT = tl.constexpr(layout.START_SHIFT)
DEPTH_SHIFT = tl.constexpr(layout.DEPTH_SHIFT)
DEPTH_MASK = tl.constexpr(layout.DEPTH_MASK)
WIDTH_MASK = tl.constexpr(layout.WIDTH_MASK)

BYTE_WORDS = tl.constexpr(layout.BYTE_WORDS)
WIDE_WORDS = tl.constexpr(layout.WIDE_WORDS)
HALF_WORDS = tl.constexpr(layout.HALF_WORDS)
BYTE_UNITS = tl.constexpr(layout.BYTE_UNITS)
WIDE_UNITS = tl.constexpr(layout.WIDE_UNITS)
HALF_UNITS = tl.constexpr(layout.HALF_UNITS)
