"""Every kernel compiled for GPUs that are not there, and what the machine code costs.

Compiling happens in one process of its own, since these tests' own may have Triton's interpreter
switched on.  The limits are the instruction budgets of the project: what lets a GPU stream packed
weights at full bandwidth, the prologue included; a change that breaks one is a regression.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "count_instructions.py"

# Instructions and ALU instructions per weight on sm_90, tiles of 64 rows.
MATVEC_LIMITS = {2: (1.6, 0.8), 3: (1.8, 1.0), 4: (2.2, 1.5), 8: (7.5, 1.5)}
GEMM_LIMITS = {3: 3.5}


def count(*flags: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--json", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def matvec() -> dict[int, dict[str, Any]]:
    depths = map(str, MATVEC_LIMITS)
    flags = ("--kernel", "matvec", "--arch", "90", "--rows", "64", "--depth", *depths)
    return {found["depth"]: found for found in count(*flags)}


@pytest.mark.slow
@pytest.mark.parametrize("depth", MATVEC_LIMITS)
def test_matvec_stays_within_its_budget(matvec: dict[int, dict[str, Any]], depth: int) -> None:
    found, (limit, alu_limit) = matvec[depth], MATVEC_LIMITS[depth]
    assert found["total"] + found["prologue"] <= limit
    assert found["alu"] + found["prologue_alu"] <= alu_limit
    assert found["spills"] == 0
    assert found["registers"] <= 64  # 32 warps fit a multiprocessor
    assert found["shared_bytes"] <= 1024


@pytest.mark.slow
def test_gemm_stays_within_its_budget() -> None:
    depths = map(str, GEMM_LIMITS)
    flags = ("--kernel", "gemm", "--arch", "90", "--rows", "64", "--depth", *depths)
    for found in count(*flags):
        assert found["total"] <= GEMM_LIMITS[found["depth"]]
        assert found["spills"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100"])
def test_the_same_code_serves_other_gpus(arch: str) -> None:
    """Budgets with a tenth to spare: schedules differ, the work does not."""
    found = count("--arch", arch, "--rows", "64", "--depth", "3", "--kernel", "matvec", "gemm")
    limits = {"matvec": MATVEC_LIMITS[3][0], "gemm": GEMM_LIMITS[3]}
    for kernel in found:
        assert kernel["total"] + kernel["prologue"] <= 1.1 * limits[kernel["kernel"]]
        assert kernel["spills"] == 0


@pytest.mark.slow
def test_all_kernels_compile_without_spills_for_all_depths_together() -> None:
    found = count("--compile-only", "--arch", "90")
    assert {kernel["kernel"] for kernel in found} == {
        "matvec", "matvec of 4", "gemm", "repack", "expand", "rows", "means", "transpose",
    }  # fmt: skip
    for kernel in found:
        assert kernel["spills"] == 0, kernel
