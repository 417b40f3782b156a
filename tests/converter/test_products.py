"""Products of a conversion go to the faster library, lose nothing by it, and only there."""

from __future__ import annotations

import pytest
import torch
from cvxq_converter import products
from cvxq_converter.products import coarse_products, fast_products


def test_products_are_as_exact_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 64, 64), (64, 576, 192), (256, 1536, 576), (7, 33, 91)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(columns, inner, generator=generator)
        exact = a.double() @ b.double().T
        with fast_products("cpu"):
            found = torch.nn.functional.linear(a, b)
        assert float((found - exact).abs().max() / exact.abs().max()) < 4e-6


def test_the_setting_holds_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    before = torch.get_float32_matmul_precision()
    during = []

    def fail() -> None:
        with fast_products("cpu"):
            during.append(torch.get_float32_matmul_precision())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert during == ["medium"]
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("supported", "faster"),
    [
        ({"avx512_bf16"}, True),
        ({"avx512_bf16", "amx_tile"}, False),
        (set(), False),
    ],
)
def test_processors_with_matrix_units_keep_what_they_have(
    supported: set[str], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what in ("avx512_bf16", "amx_tile"):
        asked = f"_is_{what}_supported"
        monkeypatch.setattr(torch.cpu, asked, lambda what=what: what in supported, raising=False)
    assert products._onednn_is_faster() == faster


def test_a_device_computes_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    before = torch.get_float32_matmul_precision()
    with fast_products("cuda"):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("device", "loss", "supported", "coarse"),
    [
        ("cpu", 0.3, True, True),
        ("cpu", 0.3, False, False),
        ("cpu", 0.003, True, False),  # as little as bfloat16 adds
        ("cuda", 0.3, True, False),
    ],
)
def test_products_are_coarse_where_that_is_fast_and_does_not_show(
    device: str, loss: float, supported: bool, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "rounds_fast", lambda: supported)
    a, b = torch.randn(8, 64), torch.randn(8, 64)
    with coarse_products(device, loss):
        found = torch.nn.functional.linear(a, b)
    assert (found.dtype == torch.bfloat16) == coarse
    assert torch.nn.functional.linear(a, b).dtype == torch.float32
