"""Every kernel compiled for GPUs that are not there, and what the machine code costs.

Compiling happens in one process of its own, since these tests' own may have Triton's interpreter
switched on.  The limits are the instruction budgets of the project: what lets a GPU stream packed
weights at full bandwidth, the prologue included; a change that breaks one is a regression.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "count_instructions.py"

# Instructions per weight on sm_90, tiles of 64 rows, by depth; for matvec, ALU instructions too.
MATVEC_LIMITS = {2: (1.6, 0.8), 3: (1.8, 1.0), 4: (2.2, 1.5)}
EXACT_LIMITS = {
    ("matvec16", 2): 2.7, ("matvec16", 3): 2.8, ("matvec16", 4): 3.5,
    ("gemm", 2): 4.3, ("gemm", 3): 4.5, ("gemm", 4): 6.0,
}  # fmt: skip
OTHER_LIMITS = {3: 1.8, 8: 6.5}  # of matvec on sm_80 and sm_100


def count(*flags: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--json", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, int], dict[str, Any]]:
    found = count("--arch", "90", "--rows", "64", "--depth", *map(str, MATVEC_LIMITS))
    return {(kernel["kernel"], kernel["depth"]): kernel for kernel in found}


@pytest.mark.slow
@pytest.mark.parametrize("depth", MATVEC_LIMITS)
def test_matvec_stays_within_its_budget(
    counts: dict[tuple[str, int], dict[str, Any]], depth: int
) -> None:
    found, (limit, alu_limit) = counts["matvec", depth], MATVEC_LIMITS[depth]
    assert found["total"] + found["prologue"] <= limit
    assert found["alu"] + found["prologue_alu"] <= alu_limit
    assert found["spills"] == 0
    assert found["registers"] <= 64  # 32 warps fit a multiprocessor
    assert found["shared_bytes"] <= 1024


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "width"), [("gfx942", 64), ("gfx1100", 32)])
def test_the_plain_twins_compile_for_amd(
    architecture: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends = pytest.importorskip("triton.backends")
    if "amd" not in backends.backends:
        pytest.skip("this Triton has no AMD backend")
    tool = importlib.import_module("count_instructions")
    variants = [tool.matvec_variant(1 << 3, 16), tool.full_variants(16)["rows"]]
    for variant in variants:
        off = {name: False for name in variant.constants if name == "PTX"}
        plain = replace(variant, constants=variant.constants | off)
        compiled = tool.compile_target(plain, tool.GPUTarget("hip", architecture, width))
        assert "s_endpgm" in compiled.asm["amdgcn"]


@pytest.mark.slow
def test_a_matvec_that_starts_early_touches_nothing_before_its_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing but what says what to multiply, and requests; the inputs' rows come after."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tool = importlib.import_module("count_instructions")
    compiled = tool.compile_for(tool.matvec_variant(1 << 3, 64, overlap=True), 90)
    listing = tool.run_tool("nvdisasm", compiled.asm["cubin"], "-c")
    before, wait, after = listing.partition("ACQBULK")
    assert wait
    assert "CCTL.E.PF2" in before
    assert "STG" not in before
    assert before.count("LDG") <= 24  # the item, rows of the tile and their factors
    assert "STG" in after


@pytest.mark.slow
@pytest.mark.parametrize("depth", MATVEC_LIMITS)
def test_the_model_of_devices_has_these_counts(
    counts: dict[tuple[str, int], dict[str, Any]], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    known = importlib.import_module("model_gpu").INSTRUCTIONS[90][depth - 1]
    found = counts["matvec", depth]
    assert 64 * (found["total"] + found["prologue"]) == pytest.approx(known, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "depth"), EXACT_LIMITS)
def test_exact_paths_stay_within_their_budgets(
    counts: dict[tuple[str, int], dict[str, Any]], kernel: str, depth: int
) -> None:
    found = counts[kernel, depth]
    assert found["total"] + found["prologue"] <= EXACT_LIMITS[kernel, depth]
    assert found["spills"] == 0


@pytest.mark.slow
def test_the_same_code_serves_other_gpus() -> None:
    """Budgets with a tenth to spare: schedules differ, the work does not."""
    flags = ("--arch", "80", "100", "--rows", "64", "--depth", *map(str, OTHER_LIMITS))
    for found in count(*flags, "--kernel", "matvec"):
        assert found["total"] + found["prologue"] <= 1.1 * OTHER_LIMITS[found["depth"]]
        assert found["spills"] == 0


@pytest.mark.slow
def test_all_kernels_compile_without_spills_for_all_depths_together() -> None:
    found = count("--compile-only", "--arch", "90")
    assert {kernel["kernel"] for kernel in found} == {
        "matvec", "matvec of 4", "gemm", "gemm of 64", "repack", "expand", "rows", "means", "sort",
    }  # fmt: skip
    for kernel in found:
        assert kernel["spills"] == 0, kernel
