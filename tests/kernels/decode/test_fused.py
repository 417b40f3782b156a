"""The fused kernels: interpreted on a CPU against their definitions, compiled for every target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton
from cvxq_kernels.decode import kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)


@pytest.mark.slow
def test_under_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    file = Path(__file__).with_name("interpreted_fused.py")
    said = run_interpreted(file)
    assert " passed" in said
    assert "skipped" not in said


HALF, FLOAT, INT, LONG = "*fp16", "*fp32", "i32", "*i64"
COMPILED: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "norm": (
        kernel.norm_kernel,
        {
            **dict.fromkeys(("x", "weight", "bias"), FLOAT),
            **dict.fromkeys(("delta", "out"), HALF),
            "scale": "fp32", "width": INT, "eps": "fp32",
        },
        {"ADD": True, "NORM": True, "LAYER": True, "WEIGHT": True, "BIAS": True, "BLOCK": 4096},
    ),
    "rotate": (
        kernel.rotate_kernel,
        {
            **dict.fromkeys(("qkv", "queries", "keys", "values"), HALF),
            **dict.fromkeys(("cosine", "sine", "q_weight", "k_weight"), FLOAT),
            "positions": LONG,
            **dict.fromkeys(("heads", "kv_heads", "capacity", "width", "half"), INT),
            "q_eps": "fp32", "k_eps": "fp32",
        },
        {"TURN": True, "NORM": True, "TEXTS": True, "BLOCK": 128},
    ),
    "attend": (
        kernel.attend_kernel,
        {
            **dict.fromkeys(("q", "keys", "values"), HALF),
            **dict.fromkeys(("largest", "total", "partial"), FLOAT),
            "position": LONG,
            **dict.fromkeys(("kv_heads", "capacity", "width", "group", "window"), INT),
            "scale": "fp32", "cap": "fp32",
        },
        {"SPLITS": 8, "WINDOW": True, "CAP": True, "ROWS": 16, "BLOCK": 256, "LENGTH": 32},
    ),
    "join": (
        kernel.join_kernel,
        {**dict.fromkeys(("largest", "total", "partial"), FLOAT), "out": HALF, "width": INT},
        {"SPLITS": 64, "BLOCK": 256},
    ),
    "activate": (
        kernel.activate_kernel,
        {"x": HALF, "out": HALF, "width": INT, "row_width": INT},
        {"KIND": 1, "GATED": True, "BLOCK": 1024},
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_compiles_without_spilling(
    name: str, target: int, disassemble: Callable[[Any], str]
) -> None:
    """Every kernel, with all its options on, compiles for each target and keeps to registers."""
    function, types, constants = COMPILED[name]
    constants = constants | {"OVERLAP": target >= 90}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(function, signature, constants)
    options = {"num_warps": 8 if name == "norm" else 4}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    listing = disassemble(compiled)
    assert "EXIT" in listing
    if target >= 90:  # the wait for the kernel before, ahead of whatever it may have written
        before, _, after = listing.partition("ACQBULK")
        assert "LDG" not in before
        assert "LDG" in after
    assert "STL" not in listing  # stores to local memory are registers that spilled
    assert compiled.metadata.shared <= 48 * 1024  # what every GPU has without asking
