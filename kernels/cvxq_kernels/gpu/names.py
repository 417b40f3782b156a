"""The numbers of `layout` and `shares` for kernels, which may use no globals but `tl.constexpr`."""

from __future__ import annotations

import triton.language as tl

import cvxq_kernels.gpu.layout as layout
import cvxq_kernels.gpu.shares as shares

CHUNK = tl.constexpr(layout.CHUNK)
MAX_DEPTH = tl.constexpr(layout.MAX_DEPTH)
LOW_DEPTH = tl.constexpr(layout.LOW_DEPTH)
LOW_DEPTHS = tl.constexpr(layout.LOW_DEPTHS)
EIGHTHS = tl.constexpr(layout.EIGHTHS)
PAIRS = tl.constexpr(layout.PAIRS)
LOOK_AHEAD = tl.constexpr(layout.LOOK_AHEAD)
SCALES = tl.constexpr(layout.SCALES)

TILE_FIELDS = tl.constexpr(layout.TILE_FIELDS)
CLUSTER = tl.constexpr(layout.CLUSTER)
WORD_BASE = tl.constexpr(layout.WORD_BASE)
CHUNK_BASE = tl.constexpr(layout.CHUNK_BASE)
SLOT_BASE = tl.constexpr(layout.SLOT_BASE)
ORDER_BASE = tl.constexpr(layout.ORDER_BASE)
MATRIX = tl.constexpr(layout.MATRIX)

RUN_FIELDS = tl.constexpr(layout.RUN_FIELDS)
RUN_END = tl.constexpr(layout.RUN_END)

ITEM_FIELDS = tl.constexpr(shares.ITEM_FIELDS)
ITEM_TILE = tl.constexpr(shares.ITEM_TILE)
ITEM_CLUSTER = tl.constexpr(shares.ITEM_CLUSTER)
ITEM_PART = tl.constexpr(shares.ITEM_PART)
ITEM_PARTS = tl.constexpr(shares.ITEM_PARTS)
ITEM_SUMS = tl.constexpr(shares.ITEM_SUMS)
ITEM_CHUNK = tl.constexpr(shares.ITEM_CHUNK)
ITEM_SLOT = tl.constexpr(shares.ITEM_SLOT)
ITEM_WORD = tl.constexpr(shares.ITEM_WORD)
ITEM_ORDER = tl.constexpr(shares.ITEM_ORDER)
ITEM_MATRIX = tl.constexpr(shares.ITEM_MATRIX)
ITEM_COUNTS = tl.constexpr(shares.ITEM_COUNTS)
COUNT_BITS = tl.constexpr(shares.COUNT_BITS)
COUNT_MASK = tl.constexpr(shares.COUNT_MASK)

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
