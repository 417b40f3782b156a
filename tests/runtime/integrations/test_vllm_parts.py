"""What vLLM's plugin is made of, without vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq.errors import UnsupportedModelError
from cvxq.export import UNQUANTIZED_FILE
from cvxq.hub import MODEL_FILE
from cvxq.integrations.vllm import products
from cvxq.integrations.vllm.folder import folder_of
from cvxq.integrations.vllm.places import Place, places_of
from cvxq.integrations.vllm.products import CpuProduct, GpuProduct, Part
from cvxq.integrations.vllm.threads import bound_processors, pool
from cvxq_format import Codebook, CompandedTensor, Reader, dequantize
from cvxq_kernels import PackedWeight, cpu
from safetensors.numpy import load_file

BOOK = Codebook.default()

Make = Callable[..., CompandedTensor]
native = pytest.mark.skipif(not cpu.is_available(), reason="needs the native library")


def parts_of(make: Make) -> tuple[list[Part], torch.Tensor]:
    """A packed matrix of which three rows are filler, one in bfloat16, and what they are."""
    tensor = make((12, 56), 1)
    raw = torch.randn(5, 56, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = raw.view(torch.int16).numpy().view(np.uint16)
    whole = torch.cat([torch.from_numpy(dequantize(tensor, BOOK))[:9], raw.float()])
    return [Part(tensor, BOOK, 9), Part(bits, None, 5)], whole


@native
def test_a_product_of_parts_in_a_compiled_model(random_companded: Make) -> None:
    parts, whole = parts_of(random_companded)
    product = CpuProduct(parts, 16, pool(), exact=True)
    layer = torch.nn.Module()
    layer.register_buffer("handle", torch.tensor(product.handle))

    def compute(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.cvxq.product(x * 2, layer.handle, 16)
        return y + 1

    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    for shape in ((3, 56), (2, 7, 56)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = torch.nn.functional.pad(2 * x @ whole.T, (0, 2)) + 1
        assert (compiled(x) - expected).abs().max() < 1e-4
    assert compiled(x.bfloat16()).dtype == torch.bfloat16


@native
def test_rows_and_inputs_beyond_those_asked_for(random_companded: Make) -> None:
    tensor = random_companded((12, 56), 1)
    dense = torch.from_numpy(dequantize(tensor, BOOK))
    product = CpuProduct([Part(tensor, BOOK, 12)], 12, pool(), exact=True)
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    assert (product.matmul(x) - x @ dense[:, :50].T).abs().max() < 1e-4
    ids = torch.tensor([[3, 1], [11, 3]])
    handle = torch.tensor(product.handle)
    found = torch.ops.cvxq.look_up(ids, handle, 56, torch.bfloat16)
    assert found.equal(dense[ids].bfloat16())


def test_a_gpu_gets_matrices_expanded_that_no_kernel_takes(
    random_companded: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products.cuda, "runs_kernels", lambda device: False)
    parts, whole = parts_of(random_companded)
    product = GpuProduct(parts, 16, torch.device("cpu"), torch.float32)
    x = torch.randn(3, 56, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.pad(x @ whole.T, (0, 2))
    assert (product.matmul(x) - expected).abs().max() < 1e-4
    assert product.rows(torch.tensor([8, 0]), torch.float32).equal(whole[[8, 0]])


def test_a_gpu_gets_all_matrices_in_one(
    random_companded: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels are tested for themselves; here something else multiplies in their place."""

    class Weight:
        def __init__(self, weights: list[PackedWeight]) -> None:
            self.whole = torch.cat([weight.dense() for weight in weights])
            self.shape = self.whole.shape

        @classmethod
        def fused(cls, weights: list[PackedWeight], device: torch.device) -> Weight:
            return cls(weights)

        def matmul(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.whole.T

        def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return self.whole[ids].to(dtype)

    monkeypatch.setattr(products.cuda, "runs_kernels", lambda device: True)
    monkeypatch.setattr("cvxq_kernels.gpu.GpuWeight", Weight)
    tensors = [random_companded((12, 56), seed) for seed in (1, 2)]
    dense = [torch.from_numpy(dequantize(tensor, BOOK)) for tensor in tensors]
    x = torch.randn(3, 56, generator=torch.Generator().manual_seed(1))
    for wanted, outputs in ((12, 24), (9, 18), (9, 20)):
        parts = [Part(tensor, BOOK, wanted) for tensor in tensors]
        product = GpuProduct(parts, outputs, torch.device("cpu"), torch.float32)
        whole = torch.cat([part[:wanted] for part in dense])
        expected = torch.nn.functional.pad(x @ whole.T, (0, outputs - len(whole)))
        assert (product.matmul(x) - expected).abs().max() < 1e-4
        assert product.rows(torch.tensor([8, 0]), torch.float32).equal(dense[0][[8, 0]])


@pytest.mark.parametrize(
    ("heights", "own", "whole", "rank", "size", "expected"),
    [
        ([8], [8], [8], 0, 1, [(0, 0, 8)]),
        ([8, 4, 4], [4, 2, 2], [8, 4, 4], 1, 2, [(0, 4, 8), (1, 2, 4), (2, 2, 4)]),
        ([16], [4, 2, 2], [8, 4, 4], 1, 2, [(0, 4, 8), (0, 10, 12), (0, 14, 16)]),
        # two heads of keys for four ranks: neighbours share one
        ([8, 4, 4], [2, 2, 2], [8, 4, 4], 2, 4, [(0, 4, 6), (1, 2, 4), (2, 2, 4)]),
        ([8, 4, 4], [2, 2, 2], [8, 4, 4], 1, 4, [(0, 2, 4), (1, 0, 2), (2, 0, 2)]),
        ([6, 6], [6, 6], [6, 6], 1, 2, [(0, 0, 6), (1, 0, 6)]),  # replicated
    ],
)
def test_places(
    heights: list[int],
    own: list[int],
    whole: list[int],
    rank: int,
    size: int,
    expected: list[tuple[int, int, int]],
) -> None:
    assert places_of(heights, own, whole, rank, size) == [Place(*place) for place in expected]


@pytest.mark.parametrize("heights", [[8, 4], [15], [9, 4, 4]])
def test_matrices_of_other_sizes_are_refused(heights: list[int]) -> None:
    whole = heights if len(heights) == 3 else [8, 4, 4]
    with pytest.raises(UnsupportedModelError, match="use another number of ranks"):
        places_of(heights, [4, 2, 2], whole, 1, 2)


def test_processors_that_a_rank_is_bound_to() -> None:
    iomp = "granularity=fine,explicit,proclist=[2,3]"
    assert bound_processors({"KMP_AFFINITY": iomp}) == {2, 3}
    assert bound_processors({"GOMP_CPU_AFFINITY": "0 1 12"}) == {0, 1, 12}
    assert bound_processors({"OMP_PLACES": "{4,5}"}) == {4, 5}
    for places in ("cores", "{0:4}", "{0},{1}", ""):
        assert bound_processors({"OMP_PLACES": places}) == set()


def test_a_bare_file_gets_a_folder_once(make_file: Callable[..., Any], tmp_path: Path) -> None:
    made = make_file("llama-tied", add_biases=True)
    cache = tmp_path / "cache"
    folder = folder_of(made.path, cache)
    assert folder_of(made.path, cache) == folder
    assert (folder / MODEL_FILE).samefile(made.path)
    assert [*cache.iterdir()] == [folder]
    with Reader(made.path) as reader:
        names, biases = reader.names, reader.added_biases
    tensors = load_file(folder / UNQUANTIZED_FILE)
    query = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{query}.cvxq"] == names.index(f"{query}.weight")
    assert f"{query}.bias" in biases
    assert not {*biases} & tensors.keys()
    os.utime(made.path, (0, 0))
    assert folder_of(made.path, cache) != folder


def test_tables_of_positions_are_expanded(make_file: Callable[..., Any], tmp_path: Path) -> None:
    made = make_file("gpt2")
    tensors = load_file(folder_of(made.path, tmp_path) / UNQUANTIZED_FILE)
    positions = made.network.transformer.wpe.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["transformer.wpe.weight"], positions)
    assert "transformer.wpe.cvxq" not in tensors
