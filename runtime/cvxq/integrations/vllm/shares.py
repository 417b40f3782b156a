"""The part of a packed matrix that one of several ranks holds, packed, too.

Ranks share a matrix by its outputs (rows of W) or by its inputs (columns).  Where such a part is
made of whole partitions, or of whole stored columns, it is cut out as it lies.  Elsewhere the order
of the stored rows mixes the parts inside of clusters; then each cluster keeps the rows that belong
to the part, with its own depths, scales and means.  Clusters have to be of one height, so shorter
ones are filled up with rows that nobody asked for, behind those of the part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from cvxq_format import CompandedTensor, pack_codes, unpack_codes

Along = Literal["rows", "columns"]

_CODES_AT_ONCE = 1 << 24  # unpacked at a time, bytes


def share(tensor: CompandedTensor, along: Along, start: int, stop: int) -> CompandedTensor:
    """Return rows (outputs) or columns (inputs) `start` to `stop` of W (N, K), and maybe filler.

    The values that were asked for are equal bit for bit, and come first: at least `stop - start`
    rows or columns, further ones mean nothing.
    Raises ValueError for rows or columns that W does not have.
    """
    rows, columns = tensor.shape
    if (start, stop) == (0, rows if along == "rows" else columns):
        return tensor
    try:
        return tensor.part(along, start, stop)
    except ValueError:
        if not 0 <= start < stop <= (rows if along == "rows" else columns):
            raise
    return _regroup(tensor, start, stop)


def _regroup(tensor: CompandedTensor, start: int, stop: int) -> CompandedTensor:
    """Return stored rows `start` to `stop`, in source order, each in the cluster that it was in."""
    order = tensor.stored_to_source()
    cluster_of = np.repeat(np.arange(tensor.clusters), tensor.cluster_rows())
    kept = np.flatnonzero((order >= start) & (order < stop))  # stored positions
    counts = np.bincount(cluster_of[kept], minlength=tensor.clusters)
    clusters = np.flatnonzero(counts)
    height = int(counts.max())
    place_of_cluster = np.cumsum(counts > 0) - 1
    inside = np.arange(kept.size) - (np.cumsum(counts) - counts)[cluster_of[kept]]
    places = place_of_cluster[cluster_of[kept]] * height + inside
    count = clusters.size * height
    permutation = np.full(count, -1, np.int64)
    permutation[places] = order[kept] - start
    permutation[permutation < 0] = np.arange(stop - start, count)
    row_scales = tensor.row_scale_codes
    if row_scales is not None:
        row_scales = np.pad(row_scales[:, start:stop], ((0, 0), (0, count - (stop - start))))
    terms = tensor.cluster_terms
    return replace(
        tensor,
        shape=(tensor.columns, count) if tensor.transposed else (count, tensor.columns),
        group_size=height,
        partitions=1,
        depths=np.ascontiguousarray(tensor.depths[:, clusters]),
        scale_codes=np.ascontiguousarray(tensor.scale_codes[:, clusters]),
        mean_codes=None if tensor.mean_codes is None else tensor.mean_codes[:, clusters],
        packed_codes=_repacked(tensor, kept, places, clusters, height),
        permutation=permutation[None],
        cluster_terms=None if terms is None else terms[:, clusters],
        cluster_map=False,
        row_scale_codes=row_scales,
    )


def _repacked(
    tensor: CompandedTensor,
    kept: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    clusters: npt.NDArray[np.int64],
    height: int,
) -> npt.NDArray[np.uint8]:
    """Pack the codes of stored rows `kept` (ascending) into `clusters` anew, at `places`."""
    starts = tensor.geometry.cluster_starts()
    step = max(1, _CODES_AT_ONCE // (height * tensor.columns))
    packed = []
    for first in range(0, clusters.size, step):
        some = clusters[first : first + step]
        base, end = starts[some[0]], starts[some[-1] + 1]
        now = slice(*np.searchsorted(kept, [base, end]))
        codes = np.zeros((some.size * height, tensor.columns), np.uint8)
        whole = unpack_codes(tensor, 0, slice(some[0], some[-1] + 1))
        codes[places[now] - first * height] = whole[kept[now] - base]
        packed.append(pack_codes(codes, tensor.depths[0, some], height, 1))
    return np.concatenate(packed)
