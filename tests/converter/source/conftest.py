"""What a decoder's record means, in plain torch, straight from `cvxq_format.decoder_record`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from cvxq_format.decoder_record import Attention, DecoderRecord, FeedForward, Norm, Part, Rope
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class Oracle:
    """Executes a record on the tensors of a file: weights (N, K), biases and norms (N,)."""

    def __init__(self, record: DecoderRecord, tensors: Mapping[str, Tensor]) -> None:
        self.record = record
        self.tensors = {name: value.double() for name, value in tensors.items()}

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (M, V) after each of `ids` (M,)."""
        record = self.record
        x = self.tensors[record.embedding][ids] * record.embedding_scale
        if record.project_in is not None:
            x = self.product(x, record.project_in)
        if record.positions is not None:
            x = x + self.tensors[record.positions][torch.arange(len(ids)) + record.position_offset]
        for layer in record.layers:
            start, scale = x, record.residual_scale
            y = self.attention(self.norm(x, layer.attention_in), layer.attention)
            x = self.norm(x + scale * self.norm(y, layer.attention_out), layer.attention_sum)
            y = self.norm(start if layer.parallel else x, layer.ffn_in)
            y = self.norm(self.feed_forward(y, layer.feed_forward), layer.ffn_out)
            x = self.norm(x + scale * y, layer.ffn_sum)
        x = self.norm(x, record.final_norm)
        if record.project_out is not None:
            x = self.product(x, record.project_out)
        return softcap(self.product(x, record.head) * record.logit_scale, record.logit_softcap)

    def product(self, x: Tensor, part: Part, outputs: int | None = None) -> Tensor:
        """x (M, K) times a matrix, or `outputs` of its rows."""
        y = x @ self.tensors[part.weight].T
        if part.bias is not None:
            y = y + self.tensors[part.bias]
        if part.rows is None:
            return y
        assert outputs is not None
        place, rows = torch.arange(outputs), part.rows
        return y[:, rows.first + rows.step * (place // rows.run) + place % rows.run]

    def norm(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return x
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt()
        if norm.weight is not None:
            x = x * (self.tensors[norm.weight] + norm.offset)
        return x if norm.bias is None else x + self.tensors[norm.bias]

    def feed_forward(self, x: Tensor, block: FeedForward) -> Tensor:
        act, ffn = ACTIVATIONS[block.activation], self.record.ffn
        up = self.product(x, block.up, ffn)
        inner = act(up) if block.gate is None else act(self.product(x, block.gate, ffn)) * up
        return self.product(inner, block.down)

    def attention(self, x: Tensor, block: Attention) -> Tensor:
        """Heads are put beside each other: (M, heads, head_dim)."""
        record, size = self.record, self.record.head_dim
        counts = (record.heads, record.kv_heads, record.kv_heads)
        q, k, v = (
            self.product(x, part, count * size)
            for part, count in zip((block.q, block.k, block.v), counts, strict=True)
        )
        if not block.norms_over_heads:
            q, k = self.norm(q, block.q_norm), self.norm(k, block.k_norm)
        q, k, v = (y.view(len(x), count, size) for y, count in zip((q, k, v), counts, strict=True))
        if block.norms_over_heads:
            q, k = self.norm(q, block.q_norm), self.norm(k, block.k_norm)
        if block.rope is not None:
            q, k = turned(q, record.ropes[block.rope]), turned(k, record.ropes[block.rope])
        k, v = (y.repeat_interleave(record.heads // record.kv_heads, 1) for y in (k, v))
        scores = softcap(torch.einsum("ihd,jhd->hij", q, k) * block.scale, block.softcap)
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        seen = (distance >= 0) & (distance < (block.window or len(x)))
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.product(torch.einsum("hij,jhd->ihd", shares, v).flatten(1), block.o)


def turned(x: Tensor, rope: Rope) -> Tensor:
    """Turn pairs (d, d + R/2) of the heads (M, heads, head_dim)."""
    table, factor = rope.inverse_frequencies, rope.factor
    if rope.switch is not None and len(x) > rope.switch:
        table, factor = rope.long_inverse_frequencies, rope.long_factor
    half = len(table)
    angles = torch.arange(len(x))[:, None, None] * torch.tensor(table, dtype=x.dtype)
    cosine, sine = factor * angles.cos(), factor * angles.sin()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    pair = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat((*pair, rest), -1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


@pytest.fixture(scope="session")
def execute() -> Callable[..., Tensor]:
    """Return execute(record, tensors, ids): the logits (M, V) that the record stands for."""
    return lambda record, tensors, ids: Oracle(record, tensors).logits(ids)
