"""The network in memory during a conversion: original weights beside what replaces them."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cvxq_format.decoder_record import DecoderRecord

from cvxq_converter.errors import ConversionError, NotDescribedError
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import (
    Source,
    load_network,
    other_tensors,
    source_names,
)
from cvxq_converter.source.decoding import describe
from cvxq_converter.source.leftovers import leftover_notice
from cvxq_converter.source.matrices import Matrix, find_matrices


@dataclass(frozen=True)
class LoadedModel:
    """A network, the matrices to quantize and what they were before.

    names: network parameter → checkpoint tensor. originals: matrix name → (N, K).
    original_biases: matrix name → (N,). original_vectors: parameter name → norms and the like,
    biases of matrices excepted. aliases: other name → tensor name. leftovers: a notice that names
    what the checkpoint holds and the network does not use.
    """

    source: Source
    network: Any
    names: dict[str, str]
    matrices: list[Matrix]
    originals: dict[str, torch.Tensor]
    original_biases: dict[str, torch.Tensor]
    original_vectors: dict[str, torch.Tensor]
    aliases: dict[str, str]
    leftovers: str | None = None

    @property
    def notices(self) -> tuple[str, ...]:
        """What is not as one may think of the checkpoint, a line each."""
        return self.source.notices + ((self.leftovers,) if self.leftovers else ())

    @property
    def parameters(self) -> int:
        """Parameters of the model, shared ones once."""
        gained = {id(m.bias) for m in self._modules_with_gained_bias()}
        return sum(p.numel() for p in self.network.parameters() if id(p) not in gained)

    @property
    def quantized_weights(self) -> int:
        """Weights in the matrices to quantize."""
        return sum(m.weight.numel() for m in self.matrices)

    def install(self, matrix: Matrix, weight: torch.Tensor) -> None:
        """Replace a matrix (N, K) in the network."""
        matrix.weight.copy_(weight)

    def set_bias(self, matrix: Matrix, value: torch.Tensor | None) -> None:
        """Set, create or remove (None) the bias added after a matrix."""
        assert matrix.input_module_name is not None
        module = self.network.get_submodule(matrix.input_module_name)
        if value is not None:
            value = torch.nn.Parameter(value.to(matrix.weight), requires_grad=False)
        module.bias = value

    def restore(self) -> None:
        """Put the original weights, biases and other vectors back."""
        for matrix in self.matrices:
            self.install(matrix, self.originals[matrix.name])
        for name, value in self.original_vectors.items():
            self.network.get_parameter(name).data.copy_(value)
        self.restore_biases()

    def restore_biases(self) -> None:
        """Put the original biases back; layers that gained one lose it."""
        for matrix in self.matrices:
            if matrix.input_module_name is not None:
                self.set_bias(matrix, self.original_biases.get(matrix.name))

    def unquantized(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, value) of everything outside the matrices, gained biases excepted."""
        gained = {f"{m.input_module_name}.bias" for m in self.matrices if not m.has_bias}
        for name, value in other_tensors(self.network, self.matrices, self.names):
            if name not in gained:
                yield name, value

    def describe(self, added_biases: Collection[str]) -> DecoderRecord:
        """Return the record of the network's decoder, with these gained biases.

        Raises NotDescribedError, also where a matrix that is left unquantized is stored as inputs
        × outputs, which a record cannot say.
        """
        quantized = {id(matrix.parameter) for matrix in self.matrices}
        for matrix in find_matrices(self.network, self.names):
            if matrix.kind == "conv1d" and id(matrix.parameter) not in quantized:
                raise NotDescribedError(f"--keep leaves {matrix.name} as inputs × outputs")
        return describe(self.network, self.names, added_biases)

    def _modules_with_gained_bias(self) -> Iterator[Any]:
        for matrix in self.matrices:
            if matrix.input_module_name is not None and not matrix.has_bias:
                module = self.network.get_submodule(matrix.input_module_name)
                if module.bias is not None:
                    yield module


def load_model(source: Source, options: ConversionOptions) -> LoadedModel:
    """Load the network of a checkpoint and choose the matrices to quantize.

    Raises ConversionError for an unsupported model, or a `keep` pattern that matches nothing.
    """
    network = load_network(source, options.place.dtype, options.place.device)
    names = source_names(source, network)
    found = find_matrices(network, names)
    for pattern in options.method.keep:
        if not any(is_kept(m, (pattern,)) for m in found):
            raise ConversionError(
                f"--keep {pattern!r} matches no matrix; their names are like {found[0].name}"
            )
    matrices = [m for m in found if not is_kept(m, options.method.keep)]
    if not matrices:
        raise ConversionError(f"{source.name}: --keep leaves no matrix to quantize")
    biases = {
        m.name: network.get_submodule(m.input_module_name).bias.data.clone()
        for m in matrices
        if m.input_module_name is not None and m.has_bias
    }
    return LoadedModel(
        source=source,
        network=network,
        names=names,
        matrices=matrices,
        originals={
            m.name: m.weight.clone() if options.replaces_weights else m.weight for m in matrices
        },
        original_biases=biases,
        original_vectors=_vectors(network, matrices),
        aliases={alias: m.name for m in found for alias in m.aliases},
        leftovers=leftover_notice(source, network, names),
    )


def _vectors(network: Any, matrices: list[Matrix]) -> dict[str, torch.Tensor]:
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
