"""The .cvxq container: bytes to records and back, as FORMAT.md defines them. Needs numpy only."""

from cvxq_format.codebook import Codebook, compander_levels, logarithmic_scales
from cvxq_format.codes import pack_codes, unpack_codes, unpack_column, unpack_rows
from cvxq_format.dequantize import dequantize, dequantize_rows
from cvxq_format.entries import CompandedEntry, RawEntry
from cvxq_format.errors import (
    CorruptError,
    FormatError,
    NotCvxqError,
    TruncatedError,
    UnsupportedError,
    WriteError,
)
from cvxq_format.geometry import Geometry, depth_histogram
from cvxq_format.header import Header
from cvxq_format.limits import MAX_DEPTH, VERSION
from cvxq_format.payload import Layout
from cvxq_format.raw import RawTensor, bfloat16_bits
from cvxq_format.reader import Reader, SectionInfo
from cvxq_format.row_scales import row_scale_factors
from cvxq_format.tensor import CompandedTensor
from cvxq_format.verify import Problem, verify
from cvxq_format.writer import Writer

__all__ = [
    "MAX_DEPTH",
    "VERSION",
    "Codebook",
    "CompandedEntry",
    "CompandedTensor",
    "CorruptError",
    "FormatError",
    "Geometry",
    "Header",
    "Layout",
    "NotCvxqError",
    "Problem",
    "RawEntry",
    "RawTensor",
    "Reader",
    "SectionInfo",
    "TruncatedError",
    "UnsupportedError",
    "WriteError",
    "Writer",
    "bfloat16_bits",
    "compander_levels",
    "depth_histogram",
    "dequantize",
    "dequantize_rows",
    "logarithmic_scales",
    "pack_codes",
    "row_scale_factors",
    "unpack_codes",
    "unpack_column",
    "unpack_rows",
    "verify",
]
