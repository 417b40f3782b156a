"""The fused kernels against their definitions, run by Triton's interpreter.

Run by `test_fused.py` in a process of its own, since Triton chooses between interpreter and
compiler when it is imported.  Both sides compute in float32 and differ by the order of sums: 1e-5
of values near 1, and the rounding of the result's type.  Outputs are allocated by the launchers and
filled with NaN here, so that nothing unwritten passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cvxq_kernels.decode import Norm, launch, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: make(*args, **options).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(kind: Any, width: int, affine: bool = True, bias: bool = True) -> Norm:
    weight = random(width, seed=8) if affine else None
    has_bias = affine and bias and kind == "layer"
    return Norm(kind, weight, random(width, seed=9) if has_bias else None, 1e-5)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=max(1e-5, 2 * step), atol=max(1e-5, 2 * step)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 40])
@pytest.mark.parametrize("kind", ["rms", "layer", "plain", "none"])
def test_norms(kind: str, width: int, dtype: torch.dtype) -> None:
    chosen = {"rms": norm("rms", width), "layer": norm("layer", width), "none": None}.get(
        kind, norm("layer", width, affine=False)
    )
    x, delta = random(3, width), random(3, width, seed=1, dtype=dtype)
    ours, theirs = x.clone(), x.clone()
    found = launch.add_and_normalize(ours, delta, 0.5, chosen, dtype)
    assert_close(found, reference.add_and_normalize(theirs, delta, 0.5, chosen, dtype))
    assert_close(ours, theirs)
    if chosen is not None:
        assert_close(launch.normalize(delta, chosen), reference.normalize(delta, chosen))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", ["no", "rms", "layer", "keys"])
@pytest.mark.parametrize("rotary", [None, 6, 12])
def test_rotation(rotary: int | None, normed: str, dtype: torch.dtype) -> None:
    heads, kv_heads, width, capacity = 4, 2, 12, 9
    positions = torch.tensor([3, 0, 7])
    qkv = random(3, (heads + 2 * kv_heads) * width, dtype=dtype)
    tables = (None, None)
    if rotary is not None:
        angles = random(capacity, rotary // 2, seed=3)
        tables = (angles.cos(), angles.sin())
    other = Norm("rms", random(width, seed=4), None, 1e-6)
    norms = {
        "no": (None, None),
        "rms": (norm("rms", width), other),
        "layer": (norm("layer", width), norm("layer", width, affine=False)),
        "keys": (None, other),
    }[normed]
    caches = [torch.zeros((kv_heads, capacity, width), dtype=dtype) for _ in range(4)]
    found = launch.rotate_and_store(qkv, *tables, positions, norms, *caches[:2])
    expected = reference.rotate_and_store(qkv, *tables, positions, norms, *caches[2:])
    for ours, theirs in ((found, expected), (caches[0], caches[2]), (caches[1], caches[3])):
        assert_close(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("position", [0, 1, 63, 64, 199])
def test_attention(
    monkeypatch: pytest.MonkeyPatch, position: int, window: int | None, softcap: float | None
) -> None:
    """Places beyond the position, and rows of the cache before the window, do not count."""
    heads, kv_heads, width, capacity = 6, 2, 12, 256
    keys, values = (random(kv_heads, capacity, width, seed=seed) for seed in (1, 2))
    keys[:, position + 1 :] = 1e4
    q = random(1, heads, width)
    arguments = (torch.tensor([position]), window, 0.3, softcap)
    monkeypatch.setattr(launch, "_PROGRAMS", 8)  # four splits for each key head
    found = launch.attend_one(q, keys, values, *arguments)
    expected = reference.attend_one(q, keys, values, *arguments)
    assert_close(found, expected)


@pytest.mark.parametrize("width", [64, 72, 80, 96, 128, 256])
def test_heads_of_models(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Turned, stored and attended, three queries to each key head."""
    heads, kv_heads, capacity, at = 3, 1, 64, 33
    qkv, position = random(1, (heads + 2 * kv_heads) * width), torch.tensor([at])
    angles = random(capacity, width // 2, seed=3)
    tables = angles.cos(), angles.sin()
    caches = [random(kv_heads, capacity, width, seed=seed) for seed in (1, 2)]
    twins = [cache.clone() for cache in caches]
    q = launch.rotate_and_store(qkv, *tables, position, (None, None), *caches)
    expected = reference.rotate_and_store(qkv, *tables, position, (None, None), *twins)
    for ours, theirs in zip((q, *caches), (expected, *twins), strict=True):
        assert_close(ours, theirs)
    monkeypatch.setattr(launch, "_PROGRAMS", 2)
    rules = position, None, width**-0.5, None
    assert_close(launch.attend_one(q, *caches, *rules), reference.attend_one(q, *twins, *rules))


@pytest.mark.parametrize("window", [None, 50])
def test_a_token_of_each_of_several_texts(window: int | None) -> None:
    """Each goes to its own text's cache, and looks at that one alone."""
    texts, heads, kv_heads, width, capacity = 3, 6, 2, 12, 128
    positions = torch.tensor([3, 0, 99])
    qkv = random(texts, (heads + 2 * kv_heads) * width)
    angles = random(capacity, width // 2, seed=3)
    tables = angles.cos(), angles.sin()
    caches = [random(texts * kv_heads, capacity, width, seed=seed) for seed in (1, 2)]
    alone = [cache.clone() for cache in caches]
    q = launch.rotate_and_store(qkv, *tables, positions, (None, None), *caches, texts)
    found = launch.attend_one(q, *caches, positions, window, 0.3, None, texts)
    for text in range(texts):
        one = slice(text, text + 1)
        own = [cache[text * kv_heads : (text + 1) * kv_heads] for cache in alone]
        query = reference.rotate_and_store(qkv[one], *tables, positions[one], (None, None), *own)
        assert_close(q[one], query)
        expected = reference.attend_one(query, *own, positions[one], window, 0.3, None)
        assert_close(found[one], expected)
    for cache, expected in zip(caches, alone, strict=True):
        assert_close(cache, expected)


def test_attention_in_half_precision() -> None:
    """Weights of the sum are rounded to the cache's type: a few roundings of the result.

    Not bfloat16, whose products the interpreter takes of the bit patterns.
    """
    dtype = torch.float16
    keys, values = (random(2, 128, 16, seed=seed, dtype=dtype) for seed in (1, 2))
    q = random(1, 4, 16, dtype=dtype)
    arguments = (torch.tensor([100]), None, 0.3, None)
    found = launch.attend_one(q, keys, values, *arguments).float()
    exact = reference.attend_one(q.float(), keys.float(), values.float(), *arguments)
    assert float((found - exact).abs().max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(activation: str, gated: bool, dtype: torch.dtype) -> None:
    x = 3 * random(2, 2 * 1100, dtype=dtype)
    found = launch.activate(x, activation, gated)
    assert_close(found, reference.activate(x, activation, gated))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation is 'tanh', allowed: silu, relu, gelu"):
        reference.activate(random(1, 4), "tanh", False)
