"""Every kernel compiled for GPUs that are not there, and what the machine code costs.

The limits are the instruction budgets of the project: what lets a GPU stream packed
weights at full bandwidth, the prologue included; a change that breaks one is a regression.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
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


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the tool."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return importlib.import_module("count_instructions")


@pytest.fixture
def count(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, Any]]]:
    """Return count(*flags): what the tool finds."""

    def found(*flags: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--json", *flags])
        tool.main()
        kernels: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return kernels

    return found


@pytest.fixture
def count_one(
    count: Callable[..., list[dict[str, Any]]],
) -> Callable[[str, int], dict[str, Any]]:
    """Return count_one(kernel, depth), for sm_90 and tiles of 64 rows."""

    def found(kernel: str, depth: int) -> dict[str, Any]:
        flags = ("--arch", "90", "--rows", "64", "--depth", str(depth), "--kernel", kernel)
        (one,) = count(*flags)
        assert (one["kernel"], one["depth"]) == (kernel, depth)
        return one

    return found


@pytest.mark.slow
@pytest.mark.parametrize("depth", MATVEC_LIMITS)
def test_matvec_stays_within_its_budget(
    count_one: Callable[[str, int], dict[str, Any]], depth: int
) -> None:
    found, (limit, alu_limit) = count_one("matvec", depth), MATVEC_LIMITS[depth]
    assert found["total"] + found["prologue"] <= limit
    assert found["alu"] + found["prologue_alu"] <= alu_limit
    assert found["spills"] == 0
    assert found["registers"] <= 64  # 32 warps fit a multiprocessor
    assert found["shared_bytes"] <= 1024


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "width"), [("gfx942", 64), ("gfx1100", 32)])
def test_the_plain_twins_compile_for_amd(tool: Any, architecture: str, width: int) -> None:
    backends = pytest.importorskip("triton.backends")
    if "amd" not in backends.backends:
        pytest.skip("this Triton has no AMD backend")
    variants = [tool.matvec_variant(1 << 3, 16), tool.full_variants(16)["rows"]]
    for variant in variants:
        off = {name: False for name in variant.constants if name == "PTX"}
        plain = replace(variant, constants=variant.constants | off)
        compiled = tool.compile_target(plain, tool.GPUTarget("hip", architecture, width))
        assert "s_endpgm" in compiled.asm["amdgcn"]


@pytest.mark.slow
def test_a_matvec_that_starts_early_touches_nothing_before_its_wait(tool: Any) -> None:
    """Nothing but what says what to multiply, and requests; the inputs' rows come after."""
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
    count_one: Callable[[str, int], dict[str, Any]], depth: int
) -> None:
    found = count_one("matvec", depth)
    known = importlib.import_module("model_gpu").INSTRUCTIONS[90][depth - 1]
    assert 64 * (found["total"] + found["prologue"]) == pytest.approx(known, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "depth"), EXACT_LIMITS)
def test_exact_paths_stay_within_their_budgets(
    count_one: Callable[[str, int], dict[str, Any]], kernel: str, depth: int
) -> None:
    found = count_one(kernel, depth)
    assert found["total"] + found["prologue"] <= EXACT_LIMITS[kernel, depth]
    assert found["spills"] == 0


@pytest.mark.slow
def test_the_same_code_serves_other_gpus(count: Callable[..., list[dict[str, Any]]]) -> None:
    """Budgets with a tenth to spare: schedules differ, the work does not."""
    flags = ("--arch", "80", "100", "--rows", "64", "--depth", *map(str, OTHER_LIMITS))
    for found in count(*flags, "--kernel", "matvec"):
        assert found["total"] + found["prologue"] <= 1.1 * OTHER_LIMITS[found["depth"]]
        assert found["spills"] == 0


@pytest.mark.slow
def test_all_kernels_compile_without_spills_for_all_depths_together(
    count: Callable[..., list[dict[str, Any]]],
) -> None:
    found = count("--compile-only", "--arch", "90")
    assert {kernel["kernel"] for kernel in found} == {
        "matvec", "matvec of 4", "gemm", "gemm of 64", "repack", "expand", "rows", "means", "sort",
    }  # fmt: skip
    for kernel in found:
        assert kernel["spills"] == 0, kernel
