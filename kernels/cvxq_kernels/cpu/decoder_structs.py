"""The structs of `native/decoder.h` field by field, and its functions declared for ctypes."""

from __future__ import annotations

import ctypes

FLOATS = ctypes.POINTER(ctypes.c_float)


class NormStruct(ctypes.Structure):
    _fields_ = (
        ("weight", FLOATS),
        ("bias", FLOATS),
        ("kind", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    )


LAYER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
LAYER_NORMS = (
    "q_norm",
    "k_norm",
    "attention_in",
    "attention_out",
    "attention_sum",
    "ffn_in",
    "ffn_out",
    "ffn_sum",
)


class ExpertStruct(ctypes.Structure):
    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in LAYER_MATRICES),
        *((name, NormStruct) for name in LAYER_NORMS),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
        ("wide_norms", ctypes.c_int32),
        ("is_parallel", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("limit", ctypes.c_float),
        ("slope", ctypes.c_float),
        ("up_offset", ctypes.c_float),
        ("sinks", FLOATS),
        ("router", ctypes.c_void_p),
        ("experts", ctypes.POINTER(ExpertStruct)),
        ("expert_count", ctypes.c_int32),
        ("chosen", ctypes.c_int32),
        ("shares_of_all", ctypes.c_int32),
    )


class RopeStruct(ctypes.Structure):
    _fields_ = (
        ("frequencies", FLOATS),
        ("long_frequencies", FLOATS),
        ("scale", ctypes.c_float),
        ("long_scale", ctypes.c_float),
        ("pairs", ctypes.c_int32),
    )


SIZES = ("hidden", "embedding", "heads", "kv_heads", "head_dim", "ffn", "vocabulary")
FACTORS = ("embedding_scale", "residual_scale", "logit_scale", "logit_cap")
SHAPE_MATRICES = ("embed", "head", "positions", "project_in", "project_out")


class ShapeStruct(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in SIZES),
        ("capacity", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
        ("ropes", ctypes.c_int32),
        ("position_offset", ctypes.c_int32),
        *((name, ctypes.c_float) for name in FACTORS),
        ("rope", ctypes.POINTER(RopeStruct)),
        *((name, ctypes.c_void_p) for name in SHAPE_MATRICES),
        ("final", NormStruct),
    )


class PieceStruct(ctypes.Structure):
    _fields_ = (
        ("decoder", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("wanted", ctypes.c_int32),
    )


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the functions of `decoder.h` declared."""
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    library.cvxq_decoder_new.restype = pointer
    library.cvxq_decoder_new.argtypes = [
        pointer,
        ctypes.POINTER(ShapeStruct),
        ctypes.POINTER(LayerStruct),
    ]
    library.cvxq_decoder_free.restype = None
    library.cvxq_decoder_free.argtypes = [pointer]
    integer = ctypes.c_int
    library.cvxq_decoder_feed.argtypes = [
        *(pointer, pointer, pointer),
        *(integer, integer, pointer),
    ]
    library.cvxq_decoder_copy.argtypes = [pointer, pointer, int64]
    library.cvxq_decoder_turn.restype = None
    library.cvxq_decoder_turn.argtypes = [pointer, integer]
    clock = ctypes.POINTER(int64)
    library.cvxq_decoder_clock.restype = None
    library.cvxq_decoder_clock.argtypes = [pointer, clock, clock, clock]
    library.cvxq_decoder_bytes.restype = int64
    library.cvxq_decoder_bytes.argtypes = [pointer]
    return library
