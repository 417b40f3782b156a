"""What a decoder does between its matrices, in plain torch operations, on any device.

These are the definitions; the CPU runs them, and the fused kernels are checked against them.
Nothing here synchronizes with the device or depends on values, so all of it can be captured in a
CUDA graph.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from cvxq_kernels.decode.norm import HeadNorms, Norm

SCORES = 1 << 24  # of soft-capped attention at once: 64 MiB of float32


def normalize(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Normalize the last axis of `x` in float32; returns float32."""
    x = x.float()
    if norm.kind == "layer":
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    scaled = scaled if norm.weight is None else scaled * norm.weight
    return scaled if norm.bias is None else scaled + norm.bias


def add_and_normalize(
    x: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    norm: Norm | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add `scale · delta` to the stream x (M, H) float32 in place; return it normalized.

    delta: (M, H), any floating type.  The result is (M, H) in `dtype`, x itself without a norm.
    """
    x.add_(delta.float(), alpha=scale)
    return (x if norm is None else normalize(x, norm)).to(dtype)


def normalize_heads(
    qkv: torch.Tensor, norms: HeadNorms, kv_heads: int, width: int, over_one: bool
) -> torch.Tensor:
    """Norm queries and keys over each head of `width`, or over all at once; returns float32.

    qkv: (M, (H + 2·KV)·width), queries first.
    """
    keys = kv_heads * width
    parts = qkv.float().split([qkv.shape[1] - 2 * keys, keys, keys], dim=1)
    normed = []
    for part, norm in zip(parts, (*norms, None), strict=True):
        rows = part.unflatten(1, (-1, width)) if over_one else part
        normed.append((rows if norm is None else normalize(rows, norm)).reshape(part.shape))
    return torch.cat(normed, dim=1)


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
    """Norm and turn queries and keys, put keys and values in the cache; return the queries.

    qkv: (M, (H + 2·KV)·D), queries first; cosine, sine: (positions, R/2) float32 tables, None in a
    layer that does not turn; positions: (M,) int64; norms: over each head, or None; keys, values:
    (texts · KV, capacity, D), written at `positions`; with several texts, row m is of text m.
    Returns (M, H, D) in the cache's type.
    """
    kv_heads, width = keys.shape[0] // texts, keys.shape[2]
    heads = qkv.shape[1] // width - 2 * kv_heads
    qkv = normalize_heads(qkv, norms, kv_heads, width, over_one=True)
    q, k, v = qkv.view(len(qkv), -1, width).split([heads, kv_heads, kv_heads], dim=1)
    if cosine is not None and sine is not None:
        at = cosine.index_select(0, positions)[:, None], sine.index_select(0, positions)[:, None]
        q, k = _turn(q, *at), _turn(k, *at)
    if texts == 1:
        keys.index_copy_(1, positions, k.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, positions, v.transpose(0, 1).to(values.dtype))
    else:
        row = torch.arange(texts, device=keys.device)
        for cache, new in ((keys, k), (values, v)):
            own = cache.unflatten(0, (texts, kv_heads))
            own[row, :, positions] = new.to(cache.dtype)
    return q.to(keys.dtype)


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate dimensions i and i + R/2 of x (M, heads, D); those from R on stay."""
    half = cosine.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine, rest)
    return torch.cat(turned, dim=-1)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from q (M, H, D) to keys and values (KV, L, D); mask (M, L) is True where seen.

    Query heads h·H/KV … share key head h.  sinks: (H,) float32, scores that take part in the
    softmax and have no value, or None.  Returns (M, H·D).
    """
    tokens, heads, width = q.shape
    kv_heads, length, _ = keys.shape
    step = max(1, SCORES // (heads * length))
    is_plain = softcap is None and sinks is None
    if not is_plain and tokens > step:  # nothing bounds these scores but their number
        parts = zip(q.split(step), mask.split(step), strict=True)
        return torch.cat([attend(q, keys, values, m, scale, softcap, sinks) for q, m in parts])
    # (KV, H/KV, M, D); keys, values and mask are shared by a group's heads, not repeated for them.
    rows = q.view(tokens, kv_heads, -1, width).permute(1, 2, 0, 3)
    if is_plain:
        keys, values = (x[:, None].expand(-1, rows.shape[1], -1, -1) for x in (keys, values))
        result = functional.scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
    else:
        scores = torch.matmul(rows.reshape(kv_heads, -1, width), keys.transpose(1, 2))
        scores = scores.float().mul_(scale if softcap is None else scale / softcap)
        if softcap is not None:
            scores = scores.tanh_().mul_(softcap)
        scores = scores.view(*rows.shape[:3], length).masked_fill_(~mask, -torch.inf)
        if sinks is not None:
            last = sinks.view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, last), -1)
        weights = scores.softmax(-1)[..., :length].to(values.dtype).reshape(kv_heads, -1, length)
        result = torch.matmul(weights, values).view(rows.shape)
    return result.permute(2, 0, 1, 3).reshape(tokens, -1)


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
    """Attend from one token of each text, q (texts, H, D) at `position` (texts,) int64.

    keys, values: (texts · KV, C, D).  Which of the C places are seen follows from `position` on the
    device, so that one captured graph serves every length.  Returns (texts, H·D).
    """
    places = torch.arange(keys.shape[1], device=keys.device)
    parts = zip(q.split(1), keys.chunk(texts), values.chunk(texts), position.split(1), strict=True)
    found = [
        attend(one, k, v, visible(places, at, window), scale, softcap) for one, k, v, at in parts
    ]
    return found[0] if texts == 1 else torch.cat(found)


def visible(places: torch.Tensor, positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """Tell which places (L,) the tokens at positions (M,) see: (M, L) bool."""
    seen = places <= positions[:, None]
    return seen if window is None else seen & (places > positions[:, None] - window)


def activate_bounded(
    x: torch.Tensor,
    activation: str,
    gated: bool,
    limit: float | None,
    slope: float,
    offset: float,
) -> torch.Tensor:
    """Return act(gate) · (up + offset), gate at most `limit` and up that far from 0 at most.

    x: (M, 2·F), gate first, or (M, F) without a gate; `slope` is that of silu.
    """
    gate, up = x.float().chunk(2, dim=-1) if gated else (x.float(), None)
    if limit is not None and up is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    value = activate(gate * slope, activation, gated=False) / slope
    return (value if up is None else value * (up + offset)).to(x.dtype)


def activate(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """Return act(x), or act(gate) · up for x = (M, 2·F), gate first; in the type of x."""
    gate, up = x.float().chunk(2, dim=-1) if gated else (x.float(), None)
    if activation == "silu":
        value = functional.silu(gate)
    elif activation == "relu":
        value = functional.relu(gate)
    elif activation in ("gelu", "gelu_tanh"):
        value = functional.gelu(gate, approximate="none" if activation == "gelu" else "tanh")
    else:
        raise ValueError(f"activation is {activation!r}, allowed: silu, relu, gelu, gelu_tanh")
    return (value if up is None else value * up).to(x.dtype)
