"""A kernel that computes something else is noticed before a model's first token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cvxq
import numpy as np
import pytest
from cvxq.errors import UnsupportedModelError
from cvxq_kernels import cpu
from cvxq_kernels.cpu import self_check
from cvxq_kernels.cpu.matrix import matmul_many
from cvxq_kernels.cpu.self_check import ROWS

GOLDEN = Path(__file__).parents[2] / "golden" / "llama-3-bits.cvxq"
pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the native library is missing")


@pytest.fixture(autouse=True)
def checked_anew() -> Iterator[None]:
    self_check._check.cache_clear()
    yield
    cpu.force_isa("")
    self_check._check.cache_clear()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_right_kernels_pass(isa: str) -> None:
    if not cpu.force_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    cpu.check_kernels()


@pytest.mark.parametrize("depth", [0, 3, 8])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("wrong", [np.nan, 0.5])
def test_a_wrong_product_is_named(
    depth: int, tokens: int, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miscompiled(weights: Any, x: Any, exact: bool, pool: Any) -> Any:
        (product,) = matmul_many(weights, x, exact, pool)
        if len(x) == tokens:
            product[-1, depth * ROWS + 3] += wrong * np.linalg.norm(x[-1])
        return [product]

    monkeypatch.setattr(self_check, "matmul_many", miscompiled)
    with pytest.raises(RuntimeError, match=rf"wrong product at bit depth {depth}, {tokens} tokens"):
        cpu.check_kernels()


def test_a_model_is_not_loaded_on_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "matmul_many", lambda _, x, *rest: [np.zeros((len(x), 144))])
    with pytest.raises(UnsupportedModelError, match="install cvxq again"):
        cvxq.load(GOLDEN)
    with cvxq.load(GOLDEN, check=False) as model:
        assert model.decoder is not None
