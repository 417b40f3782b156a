"""The fused block of columns: interpreted on a CPU against PyTorch's, compiled for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton
from cvxq_converter.quantize import search
from cvxq_converter.quantize.feedback_kernel import FUSED_BLOCK, block_kernel, warps
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    "*fp32": "weights shares factor nearest levels borders scales inverse middle errors",
    "*fp64": "sums",
    "*i64": "depths order",
    "*i32": "sizes code_of_cell",
    "*u8": "codes scale_codes",
    "*i8": "mean_codes",
    "fp32": "mean_step",
}


@pytest.mark.slow
def test_under_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    said = run_interpreted(Path(__file__).with_name("interpreted_feedback_kernel.py"))
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("group", "target"), [(64, 80), (64, 90), (256, 90)])
def test_compiles_without_spilling(
    group: int, target: int, disassemble: Callable[[Any], str]
) -> None:
    """With all its options on, for the usual group size and the largest."""
    constants = {
        "SEARCH": search.SEARCH, "HAS_MEANS": True, "COUNT": FUSED_BLOCK, "GROUP": group,
        "LADDER": 64,
    }  # fmt: skip
    kinds = {name: kind for kind, names in TYPES.items() for name in names.split()}
    names = block_kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    compiled = triton.compile(
        ASTSource(block_kernel, signature, constants),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": warps(group)},
    )
    listing = disassemble(compiled)
    assert "EXIT" in listing
    assert "STL" not in listing  # stores to local memory are registers that spilled
