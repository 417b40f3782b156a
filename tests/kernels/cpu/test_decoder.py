"""The native forward pass against one in float64 numpy, on every instruction set, odd sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cvxq_kernels import cpu

if not cpu.is_available():
    pytest.skip(cpu.why_not(), allow_module_level=True)

from cvxq_kernels.cpu.decoder import Decoder, Expert, Layer, Norm, Rope, Shape

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Sums of up to a hundred float32 products of size one, a few layers deep.
TOLERANCE = 2e-5
CAPACITY, VOCABULARY = 150, 23  # three blocks of 64 positions


@pytest.fixture(params=["avx512", "avx2", "neon", "scalar"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if not cpu.force_isa(request.param):
        pytest.skip(f"this machine or build has no {request.param}")
    yield request.param
    cpu.force_isa("")


class Case:
    """Random weights of a small decoder: the native parts, and a dense copy of each matrix."""

    def __init__(self, pool: cpu.Pool, *, width: int, group: int, rotary: int, **options: Any):
        self.rng = np.random.default_rng(0)
        self.pool = pool
        self.dense: dict[int, Floats] = {}
        hidden, kv_heads, ffn = 21, 2, 37
        heads = kv_heads * group
        kind = options.pop("norm", "rms")
        gated = options.pop("gated", True)
        window = options.pop("window", 0)
        names = options.pop("norms", ("attention_in", "ffn_in"))
        over = options.pop("head_norms", None)
        scale, cap = options.pop("scale", width**-0.5), options.pop("cap", 0.0)
        fused, parallel = options.pop("fused", False), options.pop("parallel", False)
        activation, factor = options.pop("activation", "silu"), options.pop("rotary_scale", 1.0)
        sizes = (width, width) if over == "each" else (heads * width, kv_heads * width)
        experts, chosen = options.pop("experts", 0), options.pop("chosen", 0)
        bounds = options.pop("bounds", {})
        of_all, sinks = options.pop("shares_of_all", False), options.pop("sinks", False)
        q_norm, k_norm = (self.norm(n, kind) if over else Norm() for n in sizes)
        self.layers = [
            Layer(
                q=self.matrix((heads + 2 * kv_heads * fused) * width, hidden, bias=True),
                k=None if fused else self.matrix(kv_heads * width, hidden),
                v=None if fused else self.matrix(kv_heads * width, hidden, bias=True),
                o=self.matrix(hidden, heads * width),
                gate=self.matrix(ffn * (1 + fused), hidden) if gated and not experts else None,
                up=None if (fused and gated) or experts else self.matrix(ffn, hidden),
                down=None if experts else self.matrix(hidden, ffn),
                scale=scale * (1 + index),
                cap=cap,
                q_norm=q_norm,
                k_norm=k_norm,
                window=window if index else 0,
                rope=(0, 1, None)[index],
                wide_norms=over == "all",
                is_parallel=parallel,
                activation=activation if index else "silu",
                **bounds,
                sinks=self.vector(heads) if sinks else None,
                router=self.matrix(experts, hidden, bias=True) if experts else None,
                experts=tuple(
                    Expert(
                        up=self.matrix(ffn, hidden, bias=True),
                        down=self.matrix(hidden, ffn, bias=True),
                        gate=self.matrix(ffn, hidden, bias=True) if gated else None,
                    )
                    for _ in range(experts)
                ),
                chosen=chosen,
                shares_of_all=of_all,
                **{name: self.norm(hidden, kind) for name in names},
            )
            for index in range(3)
        ]
        embed = self.matrix(VOCABULARY, hidden)
        self.shape = Shape(
            hidden=hidden,
            embedding=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            ffn=ffn,
            vocabulary=VOCABULARY,
            capacity=CAPACITY,
            chunk=CAPACITY,
            ropes=(self.rope(rotary, 0.7, factor), self.rope(rotary // 2, 0.4, 1.0)),
            embed=embed,
            head=embed,
            final=self.norm(hidden, kind),
        )
        self.shape = replace(self.shape, **options)

    @staticmethod
    def rope(pairs: int, base: float, factor: float) -> Rope:
        frequencies = (base ** np.arange(pairs)).astype(np.float32)
        return Rope(frequencies, factor, frequencies * np.float32(0.3), 1.1)

    def matrix(self, outputs: int, inputs: int, bias: bool = False) -> cpu.Matrix:
        dense = (self.rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)
        added = self.rng.standard_normal(outputs).astype(np.float32) if bias else None
        matrix = cpu.Matrix.from_dense(dense, added, self.pool)
        zero = np.zeros(outputs, np.float32)
        self.dense[id(matrix)] = np.column_stack([dense, zero if added is None else added])
        return matrix

    def vector(self, size: int) -> Floats:
        return self.rng.standard_normal(size).astype(np.float32)

    def norm(self, size: int, kind: str) -> Norm:
        weight = self.rng.standard_normal(size).astype(np.float32)
        bias = self.rng.standard_normal(size).astype(np.float32) if kind == "layer" else None
        return Norm(kind, weight, bias, 1e-3)

    def times(self, x: Doubles, matrix: cpu.Matrix) -> Doubles:
        dense = self.dense[id(matrix)].astype(np.float64)
        return x @ dense[:, :-1].T + dense[:, -1]

    def logits(self, ids: Any, is_long: bool = False) -> Doubles:
        """The whole pass over `ids`, written from the definitions."""
        s = self.shape
        x = self.dense[id(s.embed)][ids, :-1].astype(np.float64) * s.embedding_scale
        for layer in self.layers:
            branch = self.attend(layer, norm(layer.attention_in, x), is_long)
            before = x
            x = x + s.residual_scale * norm(layer.attention_out, branch)
            x = norm(layer.attention_sum, x)
            inner = norm(layer.ffn_in, before if layer.is_parallel else x)
            if layer.experts:
                branch = self.through_experts(layer, inner)
            else:
                branch = self.block(layer, inner, layer.gate, layer.up, layer.down)
            x = x + s.residual_scale * norm(layer.ffn_out, branch)
            x = norm(layer.ffn_sum, x)
        return capped(self.times(norm(s.final, x), s.head) * s.logit_scale, s.logit_cap)

    def block(self, layer: Layer, x: Doubles, gate: Any, up: Any, down: Any) -> Doubles:
        """One feed-forward block; up None: the gate gives both."""
        if gate is None:
            return self.times(activate(layer.activation, self.times(x, up)), down)
        made = self.times(x, gate)
        gates, ups = np.split(made, 2, axis=1) if up is None else (made, self.times(x, up))
        gates, ups = np.minimum(gates, layer.limit), np.clip(ups, -layer.limit, layer.limit)
        acted = activate(layer.activation, gates * layer.slope) / layer.slope
        return self.times(acted * (ups + layer.up_offset), down)

    def through_experts(self, layer: Layer, x: Doubles) -> Doubles:
        assert layer.router is not None
        scores = self.times(x, layer.router)
        chosen = np.argsort(-scores, axis=1)[:, : layer.chosen]
        powers = np.exp(scores - scores.max(1, keepdims=True))
        kept = np.take_along_axis(powers, chosen, 1)
        shares = kept / (powers if layer.shares_of_all else kept).sum(1, keepdims=True)
        result = np.zeros_like(x)
        for token, experts in enumerate(chosen):
            for share, index in zip(shares[token], experts, strict=True):
                expert = layer.experts[index]
                line = x[token : token + 1]
                made = self.block(layer, line, expert.gate, expert.up, expert.down)
                result[token] += share * made[0]
        return result

    def attend(self, layer: Layer, x: Doubles, is_long: bool) -> Doubles:
        s, length = self.shape, len(x)
        place = np.arange(length)
        matrices = [matrix for matrix in (layer.q, layer.k, layer.v) if matrix]
        made = np.concatenate([self.times(x, matrix) for matrix in matrices], axis=1)
        keys, few = s.heads * s.head_dim, s.kv_heads * s.head_dim
        parts = np.split(made, [keys, keys + few], axis=1)
        queries = self.turned(parts[0], layer, layer.q_norm, is_long)
        keys = self.turned(parts[1], layer, layer.k_norm, is_long)
        values = parts[2].reshape(length, s.kv_heads, -1)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < (layer.window or length))
        heads = []
        for head in range(s.heads):
            key = head // (s.heads // s.kv_heads)
            scores = queries[:, head] @ keys[:, key].T * layer.scale
            scores = np.where(seen, capped(scores, layer.cap), -np.inf)
            most = scores.max(1, keepdims=True)
            shares = np.exp(scores - most)
            total = shares.sum(1, keepdims=True)
            if layer.sinks is not None:
                total += np.exp(float(layer.sinks[head]) - most)
            heads.append(shares / total @ values[:, key])
        return self.times(np.concatenate(heads, axis=1), layer.o)

    def turned(self, x: Doubles, layer: Layer, chosen: Norm, is_long: bool) -> Doubles:
        if layer.wide_norms:
            x = norm(chosen, x)
        heads = x.reshape(len(x), -1, self.shape.head_dim)
        if not layer.wide_norms:
            heads = norm(chosen, heads).copy()
        if layer.rope is None:
            return heads
        rope = self.shape.ropes[layer.rope]
        frequencies = rope.long_frequencies if is_long else rope.frequencies
        assert frequencies is not None
        pairs, factor = len(frequencies), rope.long_scale if is_long else rope.scale
        angle = np.arange(len(x))[:, None, None] * frequencies.astype(np.float64)
        cosine, sine = np.cos(angle) * factor, np.sin(angle) * factor
        first, second = heads[..., :pairs].copy(), heads[..., pairs : 2 * pairs].copy()
        heads[..., :pairs] = first * cosine - second * sine
        heads[..., pairs : 2 * pairs] = second * cosine + first * sine
        return heads


def norm(settings: Norm, x: Doubles) -> Doubles:
    if settings.kind == "none":
        return x
    if settings.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + settings.epsilon)
    if settings.weight is not None:
        x = x * settings.weight
    return x if settings.bias is None else x + settings.bias


def activate(kind: str, x: Doubles) -> Doubles:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def capped(x: Doubles, cap: float) -> Doubles:
    return cap * np.tanh(x / cap) if cap else x


SANDWICH = ("attention_in", "attention_out", "ffn_in", "ffn_out")
CASES: dict[str, dict[str, Any]] = {
    "one head a group": {"width": 10, "group": 1, "rotary": 5},
    "groups of five, partly rotated": {"width": 17, "group": 5, "rotary": 4},
    "wide heads and a window": {"width": 70, "group": 3, "rotary": 35, "window": 66},
    "window of one": {"width": 16, "group": 2, "rotary": 8, "window": 1},
    "head norms, rotary scale": {
        "width": 12, "group": 2, "rotary": 6, "head_norms": "each", "rotary_scale": 1.3,
    },
    "norms over all heads": {"width": 12, "group": 2, "rotary": 6, "head_norms": "all"},
    "one matrix, layer norms of heads": {
        "width": 10, "group": 3, "rotary": 5, "fused": True, "head_norms": "each", "norm": "layer",
    },
    "one matrix, norms over all heads": {
        "width": 10, "group": 2, "rotary": 3, "fused": True, "head_norms": "all",
    },
    "parallel": {
        "width": 9, "group": 2, "rotary": 4, "parallel": True, "fused": True, "gated": False,
        "norm": "layer", "activation": "gelu", "residual_scale": 0.7,
    },
    "parallel with every norm": {
        "width": 9, "group": 1, "rotary": 4, "parallel": True,
        "norms": ("attention_in", "attention_out", "attention_sum", "ffn_in", "ffn_out", "ffn_sum"),
    },
    "parallel without norms": {
        "width": 9, "group": 1, "rotary": 4, "parallel": True, "norms": (), "residual_scale": 0.1,
    },
    "caps and scales": {
        "width": 8, "group": 2, "rotary": 4, "cap": 0.7, "logit_cap": 1.1,
        "logit_scale": 0.8, "embedding_scale": 3.0, "residual_scale": 0.4, "scale": 0.9,
    },
    "sandwich": {"width": 8, "group": 1, "rotary": 4, "norms": SANDWICH, "activation": "gelu_tanh"},
    "sums, not gated": {
        "width": 9, "group": 2, "rotary": 0, "norms": ("attention_sum", "ffn_sum"),
        "gated": False, "norm": "layer", "activation": "relu",
    },
    "gelu": {"width": 9, "group": 2, "rotary": 2, "activation": "gelu"},
    "experts": {"width": 9, "group": 2, "rotary": 4, "experts": 7, "chosen": 3},
    "experts, shares of all": {
        "width": 9, "group": 2, "rotary": 4, "experts": 6, "chosen": 6, "shares_of_all": True,
        "residual_scale": 0.6,
    },
    "experts beside attention, not gated": {
        "width": 9, "group": 1, "rotary": 4, "experts": 12, "chosen": 5, "parallel": True,
        "gated": False, "activation": "relu", "shares_of_all": True,
    },
    "one expert, bounds and sinks": {
        "width": 16, "group": 4, "rotary": 8, "experts": 1, "chosen": 1, "sinks": True,
        "bounds": {"limit": 0.8, "slope": 1.7, "up_offset": 1.0}, "window": 20,
    },
    "bounds without experts": {
        "width": 9, "group": 3, "rotary": 4, "sinks": True, "fused": True,
        "bounds": {"limit": 0.5, "up_offset": 0.3},
    },
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_numpy(name: str, threads: int) -> None:
    pool = cpu.Pool(threads)
    case = Case(pool, **CASES[name])
    decoder = Decoder(pool, case.shape, case.layers)
    ids = np.random.default_rng(1).integers(VOCABULARY, size=CAPACITY)
    expected = case.logits(ids)
    assert expected.std() > 0.1
    found = decoder.feed(ids[:131], 0, 131, exact=True)
    np.testing.assert_allclose(found, expected[:131], atol=TOLERANCE, rtol=TOLERANCE)
    for place in range(131, CAPACITY):
        found = decoder.step(int(ids[place]), place, exact=True)
        np.testing.assert_allclose(found, expected[place], atol=TOLERANCE, rtol=TOLERANCE)


def test_long_texts_are_turned_by_frequencies_of_their_own() -> None:
    pool = cpu.Pool(1)
    case = Case(pool, width=10, group=2, rotary=5)
    decoder = Decoder(pool, case.shape, case.layers)
    ids = np.arange(70) % VOCABULARY
    for is_long in (True, False):
        decoder.turn(is_long)
        found = decoder.feed(ids, 0, 70, exact=True)
        expected = case.logits(ids, is_long)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_memory_grows_by_blocks_and_is_told() -> None:
    pool = cpu.Pool(1)
    case = Case(pool, width=10, group=1, rotary=5)
    decoder = Decoder(pool, case.shape, case.layers)
    empty = decoder.nbytes
    decoder.step(1, 0)
    block = 3 * 2 * 64 * (10 + 16) * 4  # layers, key heads, positions, key and padded value
    block += 4096 + 64  # which prefetches reach
    assert decoder.nbytes == empty + block
    decoder.step(1, 63)
    assert decoder.nbytes == empty + block
    decoder.feed(np.ones(CAPACITY - 64, np.int64), 64, 0)
    assert decoder.nbytes == empty + 3 * block


@pytest.mark.parametrize(
    ("ids", "start", "wanted"),
    [
        ([VOCABULARY], 0, 1),
        ([-1], 0, 1),
        ([1, 2], CAPACITY - 1, 1),
        ([1], -1, 1),
        ([1], 0, 2),
        ([], 0, 0),
        ([1] * (CAPACITY + 1), 0, 1),
    ],
)
def test_what_is_out_of_range_is_refused(ids: list[int], start: int, wanted: int) -> None:
    pool = cpu.Pool(1)
    case = Case(pool, width=10, group=1, rotary=5)
    decoder = Decoder(pool, case.shape, case.layers)
    with pytest.raises(ValueError, match="allowed are tokens 0 to 22, up to 150 at once"):
        decoder.feed(np.array(ids, np.int64), start, wanted)
