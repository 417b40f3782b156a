"""Every way to multiply against x · Wᵀ + b in float64 over the decoded weights.

Tolerances.  Errors are compared as powers, Σ(y − y*)², with what quantization to the same depth
costs anyway, D_B · Σ_k (x_k S_k)² per output, D_B being the mean squared error of a unit Gaussian
quantized to the depth's levels; 5 % of that is allowed.  What float16 operands and outputs cost is
far below: 2^−11 per rounding, that is 2^−22 of the power of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_format import Codebook
from cvxq_kernels import PackedWeight
from cvxq_kernels.gpu import GpuWeight, launch, matrix, shares
from cvxq_kernels.gpu.matrix import arrange
from cvxq_kernels.gpu.plan import Plan
from cvxq_kernels.gpu.workspace import Workspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CODEBOOK = Codebook.default()
Make = Callable[..., PackedWeight]
Nans = Callable[..., torch.Tensor]

MATVEC, GEMM, EXPAND = Plan("matvec"), Plan("gemm"), Plan("expand")
WIDE = Plan("matvec16", unroll=1)
GAUSS = np.random.default_rng(0).standard_normal(200_000)


def reference(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x · Wᵀ + bias in float64."""
    y = x.cpu().double() @ packed.dense().double().t()
    return y if bias is None else y + bias.cpu().double()


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """‖y − expected‖ / ‖expected‖; NaN if anything in y is."""
    difference = (y.cpu().double() - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-300))


def own_error(depth: int) -> float:
    """D_B: mean squared error of a unit Gaussian quantized to the nearest level."""
    levels = CODEBOOK.levels[depth - 1].astype(np.float64)
    edges = (levels[1:] + levels[:-1]) / 2
    return float(np.mean((GAUSS - levels[np.searchsorted(edges, GAUSS)]) ** 2))


def inputs(batch: int, width: int, kind: str = "plain", seed: int = 5) -> torch.Tensor:
    """(batch, width) float32; "outlier" makes one input in 40 a hundred times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, width, generator=generator)
    if kind == "outlier":
        x[:, 7::40] *= 100
    return x


@pytest.mark.parametrize(
    ("depth", "kind"),
    [(depth, "plain") for depth in range(1, 9)] + [(depth, "outlier") for depth in (1, 4, 8)],
)
def test_error_is_a_fraction_of_the_depths_own(
    make: Make, device: torch.device, nans: Nans, depth: int, kind: str
) -> None:
    """Of 16 bits, a thousandth is allowed instead; depths 5–8 are the same code there."""
    packed = make((64, 30), depth, seed=depth, group_size=64, gaussian=True)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(1, 30, kind)
    scale = packed.scales[packed.scale_codes[0, 0].long()].double()
    own = own_error(depth) * float(((x[0].double() * scale) ** 2).sum()) * 64
    shares = {MATVEC: 0.05, WIDE: 0.001} if depth <= 4 else {MATVEC: 0.05}
    for plan, share in shares.items() if kind == "outlier" else [*shares.items(), (GEMM, 0.05)]:
        y = weight.matmul(x.to(device), out=nans(1, 64), plan=plan)
        error = float(((y.cpu().double() - reference(x, packed)) ** 2).sum())
        assert error <= share * own, f"{plan.kind}: {error / own:.2g} of the depth's own"


def test_all_depths_means_bias_and_permutation(
    make: Make, device: torch.device, nans: Nans
) -> None:
    depths = np.tile([[1, 2, 3, 4], [5, 6, 7, 8]], 10)  # of two clusters
    depths[:, 7] = 0
    packed = make((16, 40), depths, seed=3, means=True, group_size=10)
    weight = GpuWeight.from_packed(packed, device)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1))
    x = inputs(2, 40)
    expected = reference(x, packed, bias)
    for plan, tolerance in ((MATVEC, 1e-2), (WIDE, 1e-3), (GEMM, 1e-3), (EXPAND, 1e-6)):
        y = weight.matmul(x.to(device), bias.to(device), nans(2, 16), plan)
        assert relative_error(y, expected) < tolerance, plan.kind


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_half_precision(
    make: Make, device: torch.device, nans: Nans, dtype: torch.dtype, tolerance: float
) -> None:
    """Results have the input's type: 2^−11 of float16, 2^−8 (interpreted: truncated) of bfloat16.

    At depths 1–4 the matvec adds the rounding of its integers, under 1 % of the output.
    """
    packed = make((16, 20), np.resize([3, 4, 6], 20), seed=4)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(2, 20).to(dtype)
    expected = reference(x, packed)
    for plan, more in ((MATVEC, 1e-2), (GEMM, 0.0), (EXPAND, 0.0)):
        y = weight.matmul(x.to(device), out=nans(2, 16, dtype=dtype), plan=plan)
        assert y.dtype == dtype
        assert relative_error(y, expected) < tolerance + more, plan.kind


@pytest.mark.parametrize("kind", ["matvec", "gemm"])
def test_split_sums_are_the_same_every_time(
    make: Make, device: torch.device, nans: Nans, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(shares, "LEAST_COST", 1)
    packed = make((16, 100), np.repeat([1, 8], 50), seed=6)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(1, 100)
    whole = weight.matmul(x.to(device), plan=Plan(kind)).cpu()
    plan = Plan(kind, 3)
    assert weight.matrix.shares(kind, 3).is_split
    found = [weight.matmul(x.to(device), out=nans(1, 16), plan=plan).cpu() for _ in range(2)]
    assert torch.equal(found[0], found[1])
    # Only the order of float32 additions differs.
    assert torch.allclose(found[0], whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert not weight.workspace.take("arrived", 1, torch.int32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_matrices_are_expanded_in_blocks(
    make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Two tiles of 16 rows at a time, so the scratch has room for those alone."""
    for module in (matrix, launch):
        monkeypatch.setattr(module, "BLOCK_WEIGHTS", 2 * 16 * 24)
    packed = [make((35, 24), seed=1, means=True, group_size=12), make((6, 24), 3)]
    work = Workspace(device)
    weight = GpuWeight(arrange(packed, device), work)
    assert len(weight.matrix.blocks) == 2
    x, bias = inputs(3, 24).to(device, dtype), torch.randn(41).to(device, dtype)
    expected = torch.cat([reference(x, part) for part in packed], 1) + bias.cpu().double()
    y = weight.matmul(x, bias, plan=EXPAND)
    assert relative_error(y, expected) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert [len(buffer) for buffer in work.buffers.values()] == [2 * 16 * 24]


def test_means_are_added_once_by_programs_that_share_a_tile(
    make: Make, device: torch.device, nans: Nans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned columns have means, too; one program has nothing but those."""
    monkeypatch.setattr(shares, "LEAST_COST", 1)
    packed = make((16, 300), np.repeat([0, 2, 6], 100), seed=13, means=True)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(2, 300)
    y = weight.matmul(x.to(device), out=nans(2, 16), plan=Plan("matvec", 7))
    assert len(weight.matrix.shares("matvec", 7).items) > 3
    assert relative_error(y, reference(x, packed)) < 1e-2


@pytest.mark.parametrize("plan", [Plan("matvec"), Plan("gemm")])
def test_rows_that_the_batch_lacks_are_not_read(
    make: Make, device: torch.device, plan: Plan
) -> None:
    """Three rows, where the kernel is compiled for four, and means that end with the third."""
    weight = GpuWeight(arrange([make((16, 20), 2, means=True)], device), Workspace(device))
    weight.matmul(inputs(3, 20).to(device), plan=plan)


def test_many_rows_are_cut_into_batches(make: Make, device: torch.device, nans: Nans) -> None:
    packed = make((16, 12), 3, seed=7)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(11, 12)
    for plan in (MATVEC, GEMM, Plan("gemm", 1, 1, 32)):
        y = weight.matmul(x.to(device), out=nans(11, 16), plan=plan)
        assert relative_error(y, reference(x, packed)) < 1e-2, plan.kind


@pytest.mark.parametrize(
    ("width", "plan"), [(576, MATVEC), (640, MATVEC), (896, MATVEC), (640, GEMM)]
)
def test_widths_of_models(
    make: Make, device: torch.device, nans: Nans, width: int, plan: Plan
) -> None:
    """SmolLM2's, Gemma 3's and Qwen 2.5's, half of them pruned, with an odd number of outputs."""
    packed = make((19, width), np.resize([0, 2, 0, 3], width), seed=width, group_size=19)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(1, width)
    y = weight.matmul(x.to(device), out=nans(1, 19), plan=plan)
    tolerance = 0.02 if plan.kind == "matvec" else 1e-3
    assert relative_error(y, reference(x, packed)) < tolerance


def test_fused_outputs_stand_side_by_side(make: Make, device: torch.device, nans: Nans) -> None:
    parts = [make((16, 20), 2, seed=1, scale=3.0), make((5, 20), 6, seed=2, means=True)]
    weight = GpuWeight.fused(parts, device)
    x = inputs(1, 20)
    expected = torch.cat([reference(x, part) for part in parts], dim=1)
    for plan in (MATVEC, GEMM, EXPAND):
        y = weight.matmul(x.to(device), out=nans(1, 21), plan=plan)
        for part in (slice(0, 16), slice(16, 21)):
            assert relative_error(y[:, part], expected[:, part]) < 1e-2, plan.kind


@pytest.mark.parametrize("exponent", [-30, 30])
def test_extreme_scales(make: Make, device: torch.device, nans: Nans, exponent: int) -> None:
    packed = make((16, 20), np.resize([0, 4, 5], 20), seed=8, scale=2.0 ** (2 * exponent))
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(1, 20) * 2.0**exponent
    for plan in (MATVEC, GEMM):
        y = weight.matmul(x.to(device), out=nans(1, 16), plan=plan)
        assert relative_error(y, reference(x, packed)) < 1e-2, plan.kind


def test_scales_of_a_cluster_far_apart(make: Make, device: torch.device, nans: Nans) -> None:
    """Small groups beside a large one are rounded against it in GEMM, against their own in matvec.

    Both are right to 2^−11 of the output, which the large ones make.
    """
    scales = np.array([0, *np.logspace(-12, 0, 63, base=10)], np.float32)
    packed = make((16, 33), 8, seed=9, scale=1.0, codebook=replace(CODEBOOK, scale_table=scales))
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(1, 33)
    for plan in (MATVEC, GEMM):
        y = weight.matmul(x.to(device), out=nans(1, 16), plan=plan)
        assert relative_error(y, reference(x, packed)) < 2**-11, plan.kind


@pytest.mark.parametrize("means", [False, True])
def test_a_pruned_matrix(make: Make, device: torch.device, nans: Nans, means: bool) -> None:
    packed = make((9, 20), 0, means=means)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(1, 20)
    for plan in (MATVEC, GEMM, EXPAND):
        y = weight.matmul(x.to(device), out=nans(1, 9), plan=plan)
        assert relative_error(y, reference(x, packed)) < 1e-5, plan.kind


def test_input_of_zeros(make: Make, device: torch.device, nans: Nans) -> None:
    weight = GpuWeight.from_packed(make((9, 20), 3), device)
    for plan in (MATVEC, GEMM):
        y = weight.matmul(torch.zeros(1, 20, device=device), out=nans(1, 9), plan=plan)
        assert not y.cpu().any()


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 19), r"input \(2, 19\) torch.float32: \(M, 20\) in float16"),
        (torch.zeros(2, 20, dtype=torch.float64), "torch.float64"),
        (torch.zeros(20), r"input \(20,\)"),
    ],
)
def test_other_inputs_are_refused(
    make: Make, device: torch.device, x: torch.Tensor, said: str
) -> None:
    weight = GpuWeight.from_packed(make((4, 20), 0), device)
    with pytest.raises(ValueError, match=said):
        weight.matmul(x.to(device))


@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 40),
    depths=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    means=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_shape_and_depths(
    make: Make, device: torch.device, nans: Nans,
    rows: int, width: int, depths: list[int], means: bool, seed: int,
) -> None:  # fmt: skip
    """Against the power of the terms, not of their sum, which may cancel."""
    columns = np.resize(depths, width)
    packed = make((rows, width), columns, seed=seed, means=means, group_size=7)
    weight = GpuWeight.from_packed(packed, device)
    x = inputs(1, width, seed=seed)
    terms = ((x.double() * packed.dense().double()) ** 2).sum(1).sqrt().max()
    for plan, tolerance in ((MATVEC, 0.02), (GEMM, 2e-3), (EXPAND, 1e-5)):
        y = weight.matmul(x.to(device), out=nans(1, rows), plan=plan).cpu().double()
        assert float((y - reference(x, packed)).abs().max()) <= tolerance * float(terms) + 1e-30


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 8, 16])
def test_ptx_and_twins_agree_to_the_bit(
    make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    weight = GpuWeight.from_packed(make((96, 200), seed=11, group_size=48), device)
    x = inputs(batch, 200).to(device)
    for plan in (Plan("matvec", 2), Plan("matvec16", 2), Plan("gemm", 2)):
        fast = weight.matmul(x, plan=plan)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "uses_ptx", lambda _: False)
            plain = weight.matmul(x, plan=plan)
        assert torch.equal(fast, plain), plan.kind


@pytest.mark.gpu
def test_a_cuda_graph_repeats_the_multiplication(make: Make, device: torch.device) -> None:
    packed = make((96, 200), seed=12, group_size=48, means=True)
    weight = GpuWeight.from_packed(packed, device)
    for batch in (1, 16, 100):
        x = inputs(batch, 200).to(device).half()
        weight.matmul(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = weight.matmul(x)
        other = inputs(batch, 200, seed=9).half()
        x.copy_(other)
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, reference(other.float(), packed)) < 1e-2
