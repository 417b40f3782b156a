"""The network during a conversion: its matrices in memory while they are needed, and no longer.

The checkpoint's values stay where they are, in mapped files. The network that runs is hollow: a
block's matrices are filled when its turn comes, with the originals or with what replaces them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cvxq_format.decoder_record import DecoderRecord
from torch import Tensor, nn

from cvxq_converter.errors import ConversionError, NotDescribedError
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.blocks import Streamed, empty, is_hollow
from cvxq_converter.source.checkpoint import (
    Source,
    check_finite,
    load_hollow,
    load_network,
    other_tensors,
    source_names,
)
from cvxq_converter.source.decoding import describe
from cvxq_converter.source.exactness import stream
from cvxq_converter.source.experts import expert_parameters, expert_values
from cvxq_converter.source.leftovers import leftover_notice
from cvxq_converter.source.matrices import Matrix, find_matrices
from cvxq_converter.source.scratch import Scratch

WeightOf = Callable[[Matrix], Tensor]  # (N, K)


class Weights(Mapping[str, Tensor]):
    """The original matrices (N, K) by name, read when asked for; and what replaces them."""

    def __init__(self, stored: Any, matrices: list[Matrix]) -> None:
        self._stored = {
            name: parameter.data
            for name, parameter in stored.named_parameters(remove_duplicate=False)
        }
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._of_parameter = {id(matrix.parameter): matrix for matrix in matrices}
        self.replaced: WeightOf | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The original in the checkpoint's type, on the device of the network."""
        matrix = self._matrices[name]
        value = self._stored[f"{matrix.module_name}.weight"].to(matrix.parameter.device)
        return value.T if matrix.kind == "conv1d" else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def value(self, name: str, parameter: nn.Parameter) -> Tensor:
        """What a parameter of the network holds now."""
        matrix = self._of_parameter.get(id(parameter))
        if matrix is None or self.replaced is None:
            return self._stored[name]
        weight = self.replaced(matrix)
        return weight.T.contiguous() if matrix.kind == "conv1d" else weight


@dataclass(frozen=True)
class LoadedModel:
    """A network, the matrices to quantize and what they were before.

    streamed: the network by blocks, its matrices hollow. names: network parameter → checkpoint
    tensor. originals: matrix name → (N, K).
    original_biases: matrix name → (N,). original_vectors: parameter name → norms and the like,
    biases of matrices excepted. aliases: other name → tensor name. leftovers: a notice that names
    what the checkpoint holds and the network does not use.
    """

    source: Source
    streamed: Streamed
    names: dict[str, str]
    matrices: list[Matrix]
    originals: Weights
    original_biases: dict[str, Tensor]
    original_vectors: dict[str, Tensor]
    aliases: dict[str, str]
    leftovers: str | None = None

    @property
    def hollow(self) -> Any:
        """The network as it is between passes: shapes, vectors and buffers, but no matrices."""
        return self.streamed.network

    @property
    def network(self) -> Any:
        """The network as it is now with all its matrices, which stay in memory until `release`."""
        self.streamed.fill(self.hollow.named_parameters())
        return self.hollow

    def release(self) -> None:
        """Take the memory of all matrices away."""
        empty(parameter for parameter in self.hollow.parameters() if parameter.ndim > 1)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The network with all its matrices, for a while."""
        try:
            yield self.network
        finally:
            self.release()

    @property
    def notices(self) -> tuple[str, ...]:
        """What is not as one may think of the checkpoint, a line each."""
        return self.source.notices + ((self.leftovers,) if self.leftovers else ())

    @property
    def parameters(self) -> int:
        """Parameters of the model, shared ones once."""
        gained = {id(m.bias) for m in self._modules_with_gained_bias()}
        return sum(p.numel() for p in self.hollow.parameters() if id(p) not in gained)

    @property
    def quantized_weights(self) -> int:
        """Weights in the matrices to quantize."""
        return sum(m.weight.numel() for m in self.matrices)

    def replace(self, weight_of: WeightOf | None) -> None:
        """Let the matrices be what `weight_of` says whenever they are needed; None: originals."""
        self.originals.replaced = weight_of
        self.release()

    def set_bias(self, matrix: Matrix, value: Tensor | None) -> None:
        """Set, create or remove (None) the bias added after a matrix."""
        assert matrix.input_module_name is not None
        module = self.hollow.get_submodule(matrix.input_module_name)
        if value is not None:
            value = torch.nn.Parameter(value.to(matrix.weight), requires_grad=False)
        module.bias = value

    def restore(self) -> None:
        """Put the original weights, biases and other vectors back."""
        self.replace(None)
        for name, value in self.original_vectors.items():
            self.hollow.get_parameter(name).data.copy_(value)
        self.restore_biases()

    def restore_biases(self) -> None:
        """Put the original biases back; layers that gained one lose it."""
        for matrix in self.matrices:
            if matrix.input_module_name is not None:
                self.set_bias(matrix, self.original_biases.get(matrix.name))

    def unquantized(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, value) of everything outside the matrices, gained biases excepted."""
        gained = {f"{m.input_module_name}.bias" for m in self.matrices if not m.has_bias}
        for name, value in other_tensors(self.hollow, self.matrices, self.names, self._value):
            if name not in gained:
                yield name, value

    def _value(self, name: str, parameter: nn.Parameter) -> Tensor:
        if is_hollow(parameter):
            return self.originals.value(name, parameter).to(parameter.device, parameter.dtype)
        return parameter.data

    def describe(self, added_biases: Collection[str]) -> DecoderRecord:
        """Return the record of the network's decoder, with these gained biases.

        Raises NotDescribedError, also where a matrix that is left unquantized is stored as inputs
        × outputs, which a record cannot say.
        """
        quantized = {id(matrix.parameter) for matrix in self.matrices}
        for matrix in find_matrices(self.hollow, self.names):
            if matrix.kind == "conv1d" and id(matrix.parameter) not in quantized:
                raise NotDescribedError(f"--keep leaves {matrix.name} as inputs × outputs")
        return describe(self.hollow, self.names, added_biases)

    def _modules_with_gained_bias(self) -> Iterator[Any]:
        for matrix in self.matrices:
            if matrix.input_module_name is not None and not matrix.has_bias:
                module = self.hollow.get_submodule(matrix.input_module_name)
                if module.bias is not None:
                    yield module


def load_model(source: Source, options: ConversionOptions) -> LoadedModel:
    """Load the network of a checkpoint and choose the matrices to quantize.

    Raises ConversionError for an unsupported model, or a `keep` pattern that matches nothing.
    """
    place = options.place
    scratch = Scratch(place.scratch)
    stored = load_network(source, _stored_dtype(source))
    names = source_names(source, stored)
    _let_lie_in_files(stored, source, names, scratch)
    if place.dtype is torch.float16:  # whose range is narrower than that of the others
        check_finite(source, stored, place.dtype)
    network = load_hollow(stored, place.dtype, place.device)
    found = find_matrices(network, names)
    for pattern in options.method.keep:
        if not any(is_kept(m, (pattern,)) for m in found):
            raise ConversionError(
                f"--keep {pattern!r} matches no matrix; their names are like {found[0].name}"
            )
    matrices = [m for m in found if not is_kept(m, options.method.keep)]
    if not matrices:
        raise ConversionError(f"{source.name}: --keep leaves no matrix to quantize; keep fewer")
    biases = {
        m.name: network.get_submodule(m.input_module_name).bias.data.clone()
        for m in matrices
        if m.input_module_name is not None and m.has_bias
    }
    originals = Weights(stored, matrices)
    return LoadedModel(
        source=source,
        streamed=stream(network, originals.value, scratch),
        names=names,
        matrices=matrices,
        originals=originals,
        original_biases=biases,
        original_vectors=_vectors(network, matrices),
        aliases={alias: m.name for m in found for alias in m.aliases},
        leftovers=leftover_notice(source, network, names),
    )


def _stored_dtype(source: Source) -> torch.dtype:
    """The type to read weights in: that of the files' matrices, so that they stay in the files.

    What is computed from the files, or compared by what it computes, is read in float32.
    """
    floats = [i for i in source.tensors.values() if i.dtype.is_floating_point]
    types = {i.dtype for i in floats if len(i.shape) > 1}
    is_plain = len(types) == 1 and not source.has_names_of_network and not source.scales
    return types.pop() if is_plain else torch.float32


def _let_lie_in_files(
    stored: nn.Module, source: Source, names: Mapping[str, str], scratch: Scratch
) -> None:
    """Have every parameter as the checkpoint has it, in its file or else in scratch."""
    of_experts = expert_parameters(stored)
    experts: dict[str, Tensor] = {}
    is_plain = not (source.has_names_of_network or source.scales or source.mxfp4)
    if of_experts and is_plain:
        for views in expert_values(source.read_all(), stored).values():
            experts |= views
    for name, parameter in stored.named_parameters():
        info = source.tensors.get(names[name])
        is_same = info is not None and info.shape == tuple(parameter.shape)
        if name in experts:
            parameter.data = experts[name]
        elif name in of_experts or not is_same or info is None or source.has_names_of_network:
            parameter.data = scratch.copy(parameter.data)
        elif info.dtype is not parameter.dtype:  # vectors may be wider than matrices
            value = source.read(names[name])
            parameter.data = scratch.copy(value) if names[name] in source.scales else value


def _vectors(network: Any, matrices: list[Matrix]) -> dict[str, Tensor]:
    """Copies of the one-dimensional parameters that are not the bias of a matrix."""
    biases = {f"{m.input_module_name}.bias" for m in matrices}
    return {
        name: parameter.data.clone()
        for name, parameter in network.named_parameters()
        if parameter.ndim == 1 and name not in biases
    }


def is_kept(matrix: Matrix, patterns: tuple[str, ...]) -> bool:
    """Whether one of the shell patterns matches a name of the matrix."""
    return any(matches(name, patterns) for name in (matrix.name, *matrix.aliases))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the shell patterns matches a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
