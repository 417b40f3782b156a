"""Launch the fused kernels; the functions are those of `reference`, argument for argument.

They assume contiguous tensors on one CUDA device.  Results do not depend on how programs are
scheduled.
"""

from __future__ import annotations

import torch
import triton

from cvxq_kernels.decode import kernel, reference
from cvxq_kernels.decode.norm import HeadNorms, Norm
from cvxq_kernels.gpu.overlap import early

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_PROGRAMS = 256  # of attention: about two for each multiprocessor of a large GPU
_MOST_SPLITS = 64  # their joining is one program's work
_TEXT_BLOCK = 32  # tokens per step of a program; with 64, registers spill
_SMALLEST_TILE = 16  # of a matrix product


def normalize(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Normalize the rows of x (M, H) in float32; returns float32."""
    return _norm(x, None, 1.0, norm, torch.float32)


def add_and_normalize(
    x: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm | None, dtype: torch.dtype
) -> torch.Tensor:
    """Add `scale · delta` to x (M, H) float32 in place; return it normalized, in `dtype`."""
    return _norm(x, delta, scale, norm, dtype)


def _norm(
    x: torch.Tensor, delta: torch.Tensor | None, scale: float, norm: Norm | None, dtype: torch.dtype
) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty_like(x, dtype=dtype)
    weight = None if norm is None else norm.weight
    bias = None if norm is None else norm.bias
    block = triton.next_power_of_2(width)
    kernel.norm_kernel[(rows,)](
        x, delta, weight, bias, out, scale, width, 0.0 if norm is None else norm.eps,
        ADD=delta is not None, NORM=norm is not None,
        LAYER=norm is not None and norm.kind == "layer",
        WEIGHT=weight is not None, BIAS=bias is not None,
        BLOCK=block, num_warps=min(16, max(1, block // 512)), **early(x.device),
    )  # fmt: skip
    return out


def rotate_and_store(
    qkv: torch.Tensor,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    positions: torch.Tensor,
    norms: HeadNorms,
    keys: torch.Tensor,
    values: torch.Tensor,
    texts: int = 1,
) -> torch.Tensor:
    """Norm and turn queries and keys, fill the cache; return queries (M, H, D)."""
    kv_heads, capacity, width = keys.shape[0] // texts, *keys.shape[1:]
    tokens, heads = len(qkv), qkv.shape[1] // width - 2 * kv_heads
    queries = torch.empty((tokens, heads, width), dtype=keys.dtype, device=keys.device)
    if norms != (None, None) and not all(map(_is_plain, norms)):
        qkv = reference.normalize_heads(qkv, norms, kv_heads, width, over_one=True)
        norms = None, None
    q_norm, k_norm = norms
    kernel.rotate_kernel[(tokens, heads + 2 * kv_heads)](
        qkv, cosine, sine, positions,
        None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
        queries, keys, values, heads, kv_heads, capacity, width,
        0 if cosine is None else cosine.shape[1],
        0.0 if q_norm is None else q_norm.eps, 0.0 if k_norm is None else k_norm.eps,
        TURN=cosine is not None, NORM=q_norm is not None, TEXTS=texts > 1,
        BLOCK=triton.next_power_of_2(width), num_warps=1, **early(qkv.device),
    )  # fmt: skip
    return queries


def _is_plain(norm: Norm | None) -> bool:
    """Whether the kernel has this norm: RMS, with a weight and no bias."""
    return norm is not None and norm.kind == "rms" and norm.weight is not None and norm.bias is None


def attend_one(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    texts: int = 1,
) -> torch.Tensor:
    """Attend from one token of each text, q (texts, H, D), to the cache; return (texts, H·D)."""
    key_heads, capacity, width = keys.shape
    heads = texts * q.shape[1]
    group = heads // key_heads
    splits = triton.next_power_of_2(max(1, min(_MOST_SPLITS, _PROGRAMS // key_heads)))
    block = max(_SMALLEST_TILE, triton.next_power_of_2(width))
    largest = torch.empty((heads, splits), dtype=torch.float32, device=q.device)
    total = torch.empty_like(largest)
    partial = torch.empty((heads, splits, width), dtype=torch.float32, device=q.device)
    out = torch.empty((texts, q.shape[1] * width), dtype=q.dtype, device=q.device)
    kernel.attend_kernel[(key_heads, splits)](
        q, keys, values, position, largest, total, partial,
        key_heads // texts, capacity, width, group, window or 0, scale, softcap or 1.0,
        SPLITS=splits, WINDOW=window is not None, CAP=softcap is not None,
        ROWS=max(_SMALLEST_TILE, triton.next_power_of_2(group)),
        BLOCK=block, LENGTH=_TEXT_BLOCK, num_warps=4, **early(q.device),
    )  # fmt: skip
    kernel.join_kernel[(heads,)](
        largest, total, partial, out, width, SPLITS=splits, BLOCK=block, num_warps=4,
        **early(q.device),
    )  # fmt: skip
    return out


def activate(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """Return act(x), or act(gate) · up for x = (M, 2·F), gate first; in the type of x."""
    tokens, row_width = x.shape
    width = row_width // 2 if gated else row_width
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    block = 1024
    kernel.activate_kernel[(tokens, triton.cdiv(width, block))](
        x, out, width, row_width, KIND=_KINDS[activation], GATED=gated, BLOCK=block, num_warps=4,
        **early(x.device),
    )  # fmt: skip
    return out
