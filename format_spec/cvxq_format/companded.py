"""A companded matrix to the bytes of its section and back, and the header's entry for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cvxq_format.checks import check_depths, check_spare_rows, check_tensor, check_values
from cvxq_format.codebook import Codebook
from cvxq_format.entries import CompandedEntry
from cvxq_format.errors import CorruptError
from cvxq_format.tensor import CompandedTensor

Bytes = npt.NDArray[np.uint8]


def encode(tensor: CompandedTensor) -> bytes:
    """Return the payload; raises WriteError if the fields contradict each other."""
    check_tensor(tensor)
    return tensor.layout.pack(vars(tensor)) + tensor.packed_codes.tobytes()


def entry_of(name: str, tensor: CompandedTensor) -> CompandedEntry:
    """Return the header's entry for a tensor whose bytes have no place yet."""
    layout = tensor.layout
    return CompandedEntry(
        0,
        0,
        0,
        name=name,
        shape=tuple(int(dimension) for dimension in tensor.shape),
        codebook=tensor.codebook,
        group_size=tensor.group_size,
        partitions=tensor.partitions,
        transposed=bool(tensor.transposed),
        source_orientation=tensor.source_orientation,
        depths="separable" if layout.separable else "explicit",
        column_bits=layout.column_bits,
        column_shift=tensor.column_shift,
        means=layout.means,
        permuted=layout.permuted,
        cluster_map=layout.cluster_map,
        row_scale_bits=layout.row_scale_bits,
    )


def decode(
    entry: CompandedEntry, payload: memoryview | bytes | Bytes, codebook: Codebook
) -> CompandedTensor:
    """Parse and check a payload; `packed_codes` stays a view of it.

    Raises CorruptError, naming the tensor, if sizes, depths, permutation or spare bits break the
    format. Memory: at most some 250 bytes per byte of payload.
    """
    try:
        return _decode(entry, np.frombuffer(payload, np.uint8), codebook)
    except ValueError as error:
        if isinstance(error, CorruptError):
            raise
        where = f"tensor {entry.name!r} at byte {entry.offset:#x}"
        raise CorruptError(f"{where}: {error}; the file is corrupt") from error


def _decode(entry: CompandedEntry, data: Bytes, codebook: Codebook) -> CompandedTensor:
    layout = entry.layout(codebook.scale_bits)
    fields = layout.unpack(data)
    if layout.separable:
        terms = (fields["column_terms"], fields["cluster_terms"], entry.column_shift)
        fields["depths"] = codebook.depths_of(*terms)
    check_depths(fields["depths"])
    codes = data[layout.side_bytes :]
    expected = int(layout.geometry.code_sizes(fields["depths"]).sum())
    if codes.size != expected:
        raise ValueError(f"{codes.size} bytes of codes, the bit depths need {expected}")
    tensor = CompandedTensor(
        shape=entry.shape,
        group_size=entry.group_size,
        partitions=entry.partitions,
        packed_codes=codes,
        column_bits=entry.column_bits,
        column_shift=entry.column_shift,
        scale_bits=codebook.scale_bits,
        transposed=entry.transposed,
        source_orientation=entry.source_orientation,
        codebook=entry.codebook,
        cluster_map=entry.cluster_map,
        row_scale_bits=entry.row_scale_bits,
        **fields,
    )
    check_values(tensor, codebook)
    check_spare_rows(tensor)
    return tensor
