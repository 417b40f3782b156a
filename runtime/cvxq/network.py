"""The transformers network of a `.cvxq` file: built empty from its config, then filled.

One tensor at a time; packed matrices stay in the file's mapping, and the pages that are read are
the memory they take, or each is expanded once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import transformers
from cvxq_format import Codebook, CompandedTensor, Reader
from cvxq_format.model_config import routed_share
from cvxq_kernels import PackedWeight, cpu
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cvxq import cuda
from cvxq.architecture import build_network
from cvxq.claims import check_claims
from cvxq.config import reason
from cvxq.errors import ArgumentError, InconsistentFileError
from cvxq.experts import SourceNames, experts_of, unstack
from cvxq.modules import can_pack, has_kernel, pack_module
from cvxq.names import match_names, resolve_alias, tied_groups
from cvxq.parts import json_part, needed_part
from cvxq.tensors import raw_to_torch
from cvxq.threads import set_torch_threads


def load_network(
    reader: Reader,
    keep_packed: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
) -> PreTrainedModel:
    """Build the network of the open file, every parameter from the file.

    keep_packed: keep matrices packed instead of expanding all of them now.  dtype: floating type
    to compute in, float32 if None.  threads: torch's from now on, as they are if None, but
    no more than there are processors.
    Raises UnsupportedModelError when transformers lacks the architecture, InconsistentFileError
    when tensors and architecture do not fit each other.
    """
    dtype = dtype or torch.float32
    if not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {dtype}, allowed: a floating type such as torch.float32")
    device = cuda.resolve(device)
    cuda.use(device)
    set_torch_threads(threads)
    needed_part(reader, "config.json")
    settings = json_part(reader, "config.json")
    file = f"{reader.path}: config.json of the file"
    check_claims(settings, reader, file)
    network = build_network(settings, file, dtype, len(reader.names) + len(reader.aliases))
    unstack(network)
    fill_network(network, reader, keep_packed, device, dtype)
    network.generation_config = _generation_config(reader, network.config)
    return network


def weight_bytes_per_token(network: PreTrainedModel) -> int:
    """Bytes of weights that one decoded token reads.

    Everything, but one row of embeddings, and of experts as many as a token is routed to.
    """
    total, routed = 0.0, dict.fromkeys(network.modules(), 1.0)
    chosen = routed_share(network.config.get_text_config().to_dict())
    for experts in experts_of(network).values():
        routed.update(dict.fromkeys(experts.modules(), chosen))
    counted: set[int] = set()
    for module, share in routed.items():
        rows = module.num_embeddings if isinstance(module, nn.Embedding) else 1
        total += share * (getattr(module, "weight_bytes", 0) // rows)  # of packed modules
        for parameter in module.parameters(recurse=False):
            if rows > 1:
                total += parameter.nbytes // rows
            elif id(parameter) not in counted:
                counted.add(id(parameter))
                total += share * parameter.nbytes
    return round(total)


def fill_network(
    network: PreTrainedModel,
    reader: Reader,
    keep_packed: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give every parameter of the empty network its tensor of the file."""
    named = list(network.named_parameters(remove_duplicate=False))
    parameters = [name for name, _ in named]
    aliases = reader.aliases
    spelled = _spelled(network, [*reader.names, *aliases])
    supplied = match_names(
        spelled,
        parameters,
        tied_groups(named),
        prefix=network.base_model_prefix,
        added_biases={place for place, name in spelled.items() if name in reader.added_biases},
        optional=_persistent_buffers(network),
        network=f"{type(network).__name__} of transformers {transformers.__version__}",
    )
    places: dict[str, list[str]] = {}
    for place, spelling in supplied.items():
        places.setdefault(resolve_alias(spelled[spelling], aliases), []).append(place)
    for tensor, names in places.items():
        value = reader.read(tensor)
        if isinstance(value, CompandedTensor):
            codebook = reader.codebook(value.codebook)
            packed = PackedWeight.from_tensor(value, codebook)
            native = None
            if keep_packed and device.type == "cpu" and dtype == torch.float32:
                native = _native(value, codebook)
            _place_packed(network, tensor, packed, native, names, keep_packed, device, dtype)
        else:
            raw = raw_to_torch(value)
            raw = raw.to(device, dtype if raw.is_floating_point() else raw.dtype)
            _place_dense(network, tensor, raw, names)
    for buffer_name, buffer in network.named_buffers():
        _set(network, buffer_name, buffer.to(device))
    network.requires_grad_(False)
    _keep_ties(network)


def _keep_ties(network: PreTrainedModel) -> None:
    """Let `tie_weights` find nothing to do: what is tied shares its weight already."""
    network.all_tied_weights_keys = {}
    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            module._tied_weights_keys = None


def _spelled(network: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Names as the network's table spells them, where it renames tensors → names in the file."""
    if not experts_of(network):
        return {name: name for name in names}
    table = SourceNames(network)
    return {table.place(name) or name: name for name in names}


def _native(tensor: CompandedTensor, codebook: Codebook) -> cpu.Matrix | None:
    """The matrix for the CPU's kernels, on as many threads as torch has; None without them."""
    if not cpu.is_available() or len(tensor.shape) != 2:
        return None
    return cpu.Matrix.from_tensor(tensor, codebook, pool=_pool(torch.get_num_threads()))


@cache
def _pool(threads: int) -> cpu.Pool:
    return cpu.Pool(threads)


def _place_packed(
    network: PreTrainedModel,
    tensor: str,
    packed: PackedWeight,
    native: cpu.Matrix | None,
    names: list[str],
    keep_packed: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put a packed matrix where it belongs: as it is in modules that can, else expanded."""
    if keep_packed and not has_kernel(packed, device):
        keep_packed = False  # expanding it for every token would cost far more than holding it
    flipped: list[str] = []
    expanded: list[str] = []
    for name in names:
        module, attribute = _owner(network, name)
        flips = isinstance(module, Conv1D)
        found = packed.shape[::-1] if flips else packed.shape
        _check_shape(tensor, found, getattr(module, attribute), name)
        if keep_packed and attribute == "weight" and can_pack(module):
            pack_module(module, packed, dtype, native, device)
        else:
            (flipped if flips else expanded).append(name)
    if flipped or expanded:
        dense = packed.to(device).dense(dtype)
        if expanded:
            _place_dense(network, tensor, dense, expanded)
        if flipped:
            _place_dense(network, tensor, dense.t().contiguous(), flipped)


def _place_dense(
    network: PreTrainedModel, tensor: str, value: torch.Tensor, names: Iterable[str]
) -> None:
    """Make one parameter of `value` and put it at all of `names` (tied weights share it)."""
    parameter = nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value
    for name in names:
        module, attribute = _owner(network, name)
        expected = getattr(module, attribute)
        if expected is None:  # a bias that the source did not have
            expected = torch.empty(module.weight.shape[1 if isinstance(module, Conv1D) else 0])
        _check_shape(tensor, tuple(value.shape), expected, name)
        _set(network, name, parameter)


def _check_shape(tensor: str, found: tuple[int, ...], expected: torch.Tensor, name: str) -> None:
    if found != tuple(expected.shape):
        raise InconsistentFileError(
            f"tensor {tensor!r} has shape {found}, but {name!r} of the config's architecture "
            f"needs {tuple(expected.shape)}"
        )


def _owner(network: nn.Module, name: str) -> tuple[Any, str]:
    """Return the module that holds parameter `name`, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return network.get_submodule(path), attribute


def _set(network: nn.Module, name: str, value: torch.Tensor) -> None:
    module, attribute = _owner(network, name)
    setattr(module, attribute, value)


def _persistent_buffers(network: nn.Module) -> list[str]:
    """Names of buffers that a checkpoint may carry, and that have a computed value otherwise."""
    saved = network.state_dict().keys()
    return [name for name, _ in network.named_buffers() if name in saved]


def _generation_config(reader: Reader, config: Any) -> GenerationConfig:
    """Return the file's generation config, or the one that follows from the model's config."""
    if "generation_config.json" not in reader.files:
        return GenerationConfig.from_model_config(config)
    settings = json_part(reader, "generation_config.json")
    try:
        with warnings.catch_warnings():  # about the author's choices, which nobody here can change
            warnings.simplefilter("ignore", UserWarning)
            return GenerationConfig.from_dict(settings)
    except Exception as error:  # some values are checked, others only used
        raise InconsistentFileError(
            f"{reader.path}: generation_config.json of the file: {reason(error)}"
        ) from error
