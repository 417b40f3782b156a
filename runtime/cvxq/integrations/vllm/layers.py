"""How vLLM's linear layers, its embedding and its head get their matrices, and multiply by them.

vLLM renames, fuses and shares out what it loads, model by model. So it is given, in place of each
packed matrix, the matrix's number in the file (`cvxq export` writes these numbers); where a number
arrives says which layer, and which of its parts, the matrix is.  Once all have arrived, each layer
takes its share of its matrices from the file.

Biases that conversion added are found by the names of their matrices: vLLM drops a bias that its
own layer does not have without a word.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from cvxq_format import Codebook, CompandedTensor, RawTensor, Reader
from cvxq_kernels import cpu
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from cvxq.errors import InconsistentFileError, UnsupportedModelError
from cvxq.export import NUMBER
from cvxq.integrations.vllm.places import places_of
from cvxq.integrations.vllm.products import CpuProduct, GpuProduct, Part, Product
from cvxq.integrations.vllm.shares import Along, share
from cvxq.integrations.vllm.threads import pool
from cvxq.tensors import raw_to_torch

_PARTS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a fused layer
# Modules whose one matrix holds queries, keys and values in this order; others mix them by heads.
_IN_ORDER = ("qkv_proj", "c_attn", "Wqkv", "qkv")


class _Matrix(NamedTuple):
    """One that a layer was given: packed, or raw values as `Part` takes them."""

    weight: CompandedTensor | npt.NDArray[np.generic]
    codebook: Codebook | None = None
    added_bias: torch.Tensor | None = None


class PackedMethod(LinearMethodBase):
    """Loads and multiplies the packed matrices of one layer."""

    def __init__(self, path: Path, exact: bool) -> None:
        """Take matrices from the file at `path`; exact: see `CvxqConfig`."""
        self._path = path
        self._exact = exact

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give the layer a place for the numbers of its matrices, and for raw ones."""
        numbers = torch.full((len(output_partition_sizes),), -1)
        for name, start in ((NUMBER, numbers), ("weight", torch.empty(0, dtype=params_dtype))):
            parameter = Parameter(start, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": _arrive, "arrived": {}})
            layer.register_parameter(name, parameter)
        layer.cvxq_outputs_of_parts = list(output_partition_sizes)
        layer.cvxq_inputs = (input_size_per_partition, input_size)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the layer's share of its matrices from the file, once.

        Raises InconsistentFileError for a matrix that did not come or does not fit, and
        UnsupportedModelError for one that cannot be shared out.
        """
        if hasattr(layer, "cvxq_product"):
            return
        device = layer.weight.device
        parts, biases = [], []
        for matrix, along, place in _shares(layer, _matrices(layer, self._path)):
            outputs = len(place) if along == "rows" else matrix.weight.shape[0]
            parts.append(Part(_share(matrix.weight, along, place), matrix.codebook, outputs))
            biases.append(_bias(matrix, along, place, outputs, layer.tp_rank))
        outputs = sum(layer.cvxq_outputs_of_parts)
        product = _product(parts, outputs, device, layer.params_dtype, self._exact)
        layer.cvxq_product = product
        layer.cvxq_outputs = outputs
        added = torch.cat(biases) if any(bias.any() for bias in biases) else None
        if added is not None:
            added = torch.nn.functional.pad(added, (0, outputs - len(added)))
            added = added.to(device, layer.params_dtype)
        layer.register_buffer("cvxq_added_bias", added, persistent=False)
        handle = torch.tensor(product.handle, device="cpu")
        layer.register_buffer("cvxq_handle", handle, persistent=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (…, K) · Wᵀ, with all biases, (…, N)."""
        y: torch.Tensor = torch.ops.cvxq.product(x, layer.cvxq_handle, layer.cvxq_outputs)
        if layer.cvxq_added_bias is not None:
            y = y + layer.cvxq_added_bias
        return y if bias is None else y + bias

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return rows `ids` (…) of the layer's matrix, (…, K)."""
        found: torch.Tensor = torch.ops.cvxq.look_up(
            ids, layer.cvxq_handle, layer.embedding_dim, layer.params_dtype
        )
        return found

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the embedding be the head, too."""
        return embed_tokens


def _arrive(parameter: Any, value: torch.Tensor, part: str | int | None = None) -> None:
    """Keep what was loaded for a part of the layer, None: for all of it."""
    key = _PARTS.get(part, part) if isinstance(part, str) else part
    parameter.arrived[key] = value.clone()


@cache
def _reader(path: Path) -> Reader:
    return Reader(path, crc32=cpu.crc32)


def _matrices(layer: Any, path: Path) -> list[_Matrix]:
    """Return what the layer was given: a matrix for each part, or one for all."""
    numbers, raw = getattr(layer, NUMBER).arrived, layer.weight.arrived
    reader = _reader(path)
    keys = sorted({*numbers, *raw}, key=lambda key: -1 if key is None else key)
    if keys not in ([None], [*range(len(layer.cvxq_outputs_of_parts))]):
        raise InconsistentFileError(
            f"{path}: vLLM found matrices for parts {keys} of {layer.prefix!r}, expected "
            f"{len(layer.cvxq_outputs_of_parts)}, or one for all"
        )
    found = [
        _packed(reader, int(numbers[key])) if key in numbers else _Matrix(_as_array(raw[key]))
        for key in keys
    ]
    for matrix in found:
        if matrix.weight.shape[1] != layer.cvxq_inputs[1]:
            raise InconsistentFileError(
                f"{path}: a matrix {tuple(matrix.weight.shape)} for {layer.prefix!r}, expected "
                f"{layer.cvxq_inputs[1]} columns"
            )
    return found


def _packed(reader: Reader, number: int) -> _Matrix:
    name = reader.names[number]
    tensor = reader.read(name)
    assert isinstance(tensor, CompandedTensor)
    names = [name, *(alias for alias, target in reader.aliases.items() if target == name)]
    biases = [f"{own.removesuffix('weight')}bias" for own in names]
    bias = next((own for own in biases if own in reader.added_biases), None)
    added = None
    if bias is not None:
        value = reader.read(bias)
        assert isinstance(value, RawTensor)
        added = raw_to_torch(value).float()
    return _Matrix(tensor, reader.codebook(tensor.codebook), added)


def _as_array(value: torch.Tensor) -> npt.NDArray[np.generic]:
    if value.dtype == torch.bfloat16:
        return value.cpu().view(torch.int16).numpy().view(np.uint16)
    return value.cpu().numpy()


def _shares(layer: Any, matrices: list[_Matrix]) -> list[tuple[_Matrix, Along, range]]:
    """Say what of each matrix makes up the layer's outputs on this rank, in their order."""
    inputs, all_inputs = layer.cvxq_inputs
    if inputs != all_inputs:
        first = layer.tp_rank * inputs
        return [(matrices[0], "columns", range(first, first + inputs))]
    if isinstance(layer, VocabParallelEmbedding):
        indices = layer.shard_indices
        ids = range(indices.org_vocab_start_index, indices.org_vocab_end_index)
        return [(matrices[0], "rows", ids)]
    own = layer.cvxq_outputs_of_parts
    if len(matrices) < len(own) and isinstance(layer, QKVParallelLinear):
        if layer.prefix.rpartition(".")[2] not in _IN_ORDER:
            raise UnsupportedModelError(
                f"{layer.prefix}: a matrix of queries, keys and values mixed by heads, which vLLM "
                "cannot run from a .cvxq file; use cvxq serve"
            )
        whole = [heads * layer.head_size for heads in _heads(layer)]
    elif len(matrices) < len(own):
        whole = list(layer.output_sizes)
    else:
        whole = [matrix.weight.shape[0] for matrix in matrices]
    heights = [matrix.weight.shape[0] for matrix in matrices]
    places = places_of(heights, own, whole, layer.tp_rank, layer.tp_size)
    return [(matrices[p.matrix], "rows", range(p.start, p.stop)) for p in places]


def _heads(layer: Any) -> tuple[int, int, int]:
    return layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads


def _share(
    weight: CompandedTensor | npt.NDArray[np.generic], along: Along, place: range
) -> CompandedTensor | npt.NDArray[np.generic]:
    if isinstance(weight, CompandedTensor):
        return share(weight, along, place.start, place.stop)
    chosen = slice(place.start, place.stop)
    return np.ascontiguousarray(weight[chosen] if along == "rows" else weight[:, chosen])


def _bias(matrix: _Matrix, along: Along, place: range, outputs: int, rank: int) -> torch.Tensor:
    """Return the added bias of a share; ranks add up what they make of shares of the inputs."""
    if matrix.added_bias is None or (along == "columns" and rank > 0):
        return torch.zeros(outputs)
    return matrix.added_bias[place.start : place.stop] if along == "rows" else matrix.added_bias


def _product(
    parts: list[Part], outputs: int, device: torch.device, dtype: torch.dtype, exact: bool
) -> Product:
    if device.type != "cpu":
        return GpuProduct(parts, outputs, device, dtype)
    if not cpu.is_available():
        raise UnsupportedModelError(f"vLLM needs the native library here: {cpu.why_not()}")
    return CpuProduct(parts, outputs, pool(), exact)
