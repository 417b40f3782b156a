"""The operations of `reference` as one Triton kernel each (attention: two).

At one token per step each of them moves a few kilobytes; what they cost is a launch, so the aim
is one launch, not speed within it.  Only attention reads much: keys and values of the whole text,
once, by as many programs as fill the machine (split along the text, partial softmaxes joined by
a second kernel).  The text's length is read from device memory, never passed, so that a captured
graph holds for every length.  All arithmetic is float32.
"""

# mypy: disallow-untyped-defs=False, allow-untyped-calls
# Triton gives the arguments their types when it compiles.
from __future__ import annotations

import triton
import triton.language as tl

from cvxq_kernels.gpu.overlap import wait_for_the_kernel_before


@triton.jit
def _tanh(x):
    shrunk = tl.exp(-2 * tl.abs(x))  # at most 1, whatever x is
    size = (1 - shrunk) / (1 + shrunk)
    return tl.where(x < 0, -size, size)


@triton.jit
def norm_kernel(
    x, delta, weight, bias, out, scale, width, eps,
    ADD: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of `add_and_normalize`: x += scale · delta in place, out = norm(x)."""
    wait_for_the_kernel_before(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, BLOCK)
    inside = place < width
    value = tl.load(x + row + place, mask=inside, other=0).to(tl.float32)
    if ADD:
        value += scale * tl.load(delta + row + place, mask=inside, other=0).to(tl.float32)
        tl.store(x + row + place, value, mask=inside)
    if NORM:
        if LAYER:
            value -= tl.sum(value, axis=0) / width
            value = tl.where(inside, value, 0)
        value *= 1 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
        if WEIGHT:
            value *= tl.load(weight + place, mask=inside, other=0)
        if BIAS:
            value += tl.load(bias + place, mask=inside, other=0)
    tl.store(out + row + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    qkv, cosine, sine, positions, q_weight, k_weight, queries, keys, values,
    heads, kv_heads, capacity, width, half, q_eps, k_eps,
    TURN: tl.constexpr, NORM: tl.constexpr, TEXTS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one token of `rotate_and_store`; heads are those of q, of k, of v.

    TEXTS: every token is of a text of its own.
    """
    wait_for_the_kernel_before(OVERLAP)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    inside = place < width
    source = qkv + (token * (heads + 2 * kv_heads) + head) * width
    value = tl.load(source + place, mask=inside, other=0).to(tl.float32)
    position = tl.load(positions + token)
    if head < heads + kv_heads:
        factor = 1.0
        if NORM:
            weight = q_weight if head < heads else k_weight
            eps = q_eps if head < heads else k_eps
            factor = 1 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
            value *= factor * tl.load(weight + place, mask=inside, other=0)
        if TURN:
            is_first = place < half
            turns = place < 2 * half
            other = tl.where(is_first, place + half, place - half)
            partner = tl.load(source + other, mask=turns, other=0).to(tl.float32)
            if NORM:
                partner *= factor * tl.load(weight + other, mask=turns, other=0)
            angle = position * half + tl.where(is_first, place, place - half)
            c = tl.load(cosine + angle, mask=turns, other=1)
            s = tl.load(sine + angle, mask=turns, other=0)
            value = value * c + tl.where(is_first, -partner, partner) * s
    if TEXTS:
        keys += token * kv_heads * capacity * width
        values += token * kv_heads * capacity * width
    if head < heads:
        target = queries + (token * heads + head) * width
        tl.store(target + place, value.to(queries.dtype.element_ty), mask=inside)
    elif head < heads + kv_heads:
        target = keys + ((head - heads).to(tl.int64) * capacity + position) * width
        tl.store(target + place, value.to(keys.dtype.element_ty), mask=inside)
    else:
        target = values + ((head - heads - kv_heads).to(tl.int64) * capacity + position) * width
        tl.store(target + place, value.to(values.dtype.element_ty), mask=inside)


@triton.jit
def attend_kernel(
    q, keys, values, position, largest, total, partial,
    kv_heads, capacity, width, group, window, scale, cap,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Softmax and weighted sum of one key head's share of its text, for the heads that use it.

    Key heads are those of one text after the other, kv_heads of each.
    """
    wait_for_the_kernel_before(OVERLAP)
    head, split = tl.program_id(0), tl.program_id(1)
    end = tl.load(position + head // kv_heads).to(tl.int32) + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(end - window, 0)
    share = tl.cdiv(tl.cdiv(end - begin, LENGTH), SPLITS) * LENGTH
    start = begin + split * share
    stop = tl.minimum(start + share, end)
    row, place = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    known = (row < group)[:, None] & (place < width)[None, :]
    at = (head * group + row)[:, None] * width + place[None, :]
    query = tl.load(q + at, mask=known, other=0)
    base = head.to(tl.int64) * capacity * width
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(start, stop, LENGTH):
        text = first + tl.arange(0, LENGTH)
        seen = text < stop
        tile = base + text[:, None] * width + place[None, :]
        there = seen[:, None] & (place < width)[None, :]
        key = tl.load(keys + tile, mask=there, other=0)
        value = tl.load(values + tile, mask=there, other=0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAP:
            score = cap * _tanh(score / cap)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(most - higher)
        weight_sum = weight_sum * shrink + tl.sum(weight, axis=1)
        update = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        result = result * shrink[:, None] + update
        most = higher
    part = (head * group + row) * SPLITS + split
    tl.store(largest + part, most, mask=row < group)
    tl.store(total + part, weight_sum, mask=row < group)
    tl.store(partial + part[:, None] * width + place[None, :], result, mask=known)


@triton.jit
def join_kernel(
    largest, total, partial, out, width,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Join the partial softmaxes of one query head."""
    wait_for_the_kernel_before(OVERLAP)
    head = tl.program_id(0)
    split, place = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    part = head * SPLITS + split
    most = tl.load(largest + part)
    factor = tl.exp(most - tl.max(most, axis=0))  # 0 for a split without text
    weight_sum = tl.sum(factor * tl.load(total + part), axis=0)
    inside = (place < width)[None, :] & (split >= 0)[:, None]
    sums = tl.load(partial + part[:, None] * width + place[None, :], mask=inside, other=0)
    value = tl.sum(sums * factor[:, None], axis=0) / weight_sum
    tl.store(out + head * width + place, value.to(out.dtype.element_ty), mask=place < width)


@triton.jit
def activate_kernel(
    x, out, width, row_width,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A block of one row of `activate`; KIND: 0 silu, 1 gelu, 2 gelu_tanh, 3 relu."""
    wait_for_the_kernel_before(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    gate = tl.load(x + row * row_width + place, mask=inside, other=0).to(tl.float32)
    if KIND == 0:
        value = gate * tl.sigmoid(gate)
    elif KIND == 1:
        value = gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate * 0.5 * (1 + _tanh(inner))
    else:
        value = tl.maximum(gate, 0)
    if GATED:
        value *= tl.load(x + row * row_width + width + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + place, value.to(out.dtype.element_ty), mask=inside)
