"""Hypothesis strategies: companded tensors of every legal kind."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from cvxq_format import Codebook, CompandedTensor, Geometry, pack_codes
from hypothesis import strategies as st

CODEBOOKS = {bits: Codebook.default(bits) for bits in range(1, 9)}


@st.composite
def geometries(draw: st.DrawFn, transposed: bool = False) -> tuple[tuple[int, ...], int, int]:
    """Shape of W, group size and partitions."""
    partitions = 1 if transposed else draw(st.integers(1, 4))
    rows = partitions * draw(st.integers(1, 19))
    columns = draw(st.integers(1, 19))
    group_size = draw(st.integers(1, 24))
    stack = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (columns, rows) if transposed else (rows, columns)
    return (*stack, *shape), group_size, partitions


@st.composite
def tensors(draw: st.DrawFn) -> tuple[CompandedTensor, np.ndarray]:
    """A tensor and its codes (E, R, Kc); sizes and switches are drawn, contents seeded."""
    transposed = draw(st.booleans())
    shape, group_size, partitions = draw(geometries(transposed))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale_bits = draw(st.integers(1, 8))
    g = Geometry.of(shape, group_size, partitions, transposed)
    groups = (g.experts, g.clusters, g.columns)
    fields: dict[str, Any] = {}
    if draw(st.booleans()):
        bits, shift = draw(st.integers(0, 8)), draw(st.integers(0, 8))
        columns = rng.integers(0, 1 << bits, (g.experts, g.columns)).astype(np.uint8)
        clusters = rng.integers(-3000, 3000, groups[:2]).astype(np.int16)
        depths = CODEBOOKS[scale_bits].depths_of(columns, clusters, shift)
        fields |= {"column_terms": columns, "cluster_terms": clusters}
        fields |= {"column_bits": bits, "column_shift": shift}
    else:
        depths = rng.integers(0, 9, groups).astype(np.uint8)
    if draw(st.booleans()):
        fields["mean_codes"] = rng.integers(-128, 128, groups).astype(np.int8)
        fields["mean_step"] = np.float32(rng.random())
    if draw(st.booleans()):
        inside = rng.permuted(
            np.tile(np.arange(g.partition_rows), (g.experts, partitions, 1)), axis=2
        )
        first = np.arange(partitions)[:, None] * g.partition_rows
        permutation = (inside + first).reshape(g.experts, g.rows)
        fields["cluster_map"] = draw(st.booleans())
        if fields["cluster_map"]:
            for start, end in pairwise(g.cluster_starts()):
                permutation[:, start:end].sort(axis=1)
        fields["permutation"] = permutation
    row_scale_bits = 0 if transposed else draw(st.integers(0, 8))
    if row_scale_bits:
        row_scale_codes = rng.integers(0, 1 << row_scale_bits, (g.experts, g.rows))
        fields["row_scale_codes"] = row_scale_codes.astype(np.uint8)
        fields["row_scale_bits"] = row_scale_bits
    row_depths = np.repeat(depths, g.cluster_rows(), axis=1).astype(np.int64)
    codes = rng.integers(0, 1 << row_depths).astype(np.uint8)
    tensor = CompandedTensor(
        shape=shape,
        group_size=group_size,
        partitions=partitions,
        scale_unit=np.float32(rng.random() * 10.0 ** rng.integers(-38, 30)),
        depths=depths,
        scale_codes=rng.integers(0, 1 << scale_bits, groups).astype(np.uint8),
        packed_codes=pack_codes(codes, depths, group_size, partitions),
        scale_bits=scale_bits,
        transposed=transposed,
        source_orientation=draw(st.sampled_from(["out_in", "in_out"])),
        **fields,
    )
    return tensor, codes
