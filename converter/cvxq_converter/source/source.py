"""An opened checkpoint: its configuration, its tensors by name, the files to carry along."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cvxq_format.entries import FileEntry
from cvxq_format.files import planned_entry
from safetensors import safe_open
from torch import Tensor

from cvxq_converter.source.folder import TensorInfo, load_pickle
from cvxq_converter.source.mxfp4 import BLOCKS, SCALES, Mxfp4, from_mxfp4
from cvxq_converter.source.scales import Scale, dequantize


@dataclass(frozen=True)
class Source:
    """A checkpoint whose configuration and tensor index have been read and checked."""

    name: str  # hub id or the folder's own name, never a path
    config: Any  # transformers.PretrainedConfig
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]  # name → path of what the container carries
    made: Mapping[str, bytes] = field(default_factory=dict)  # carried in place of such files
    whole: Any = None  # configuration of the model that this is the text part of, if it is one
    scales: Mapping[str, Scale] = field(default_factory=dict)  # by the float8 tensor they are of
    mxfp4: Mapping[str, Mxfp4] = field(default_factory=dict)  # by the tensor that is made of it
    notices: tuple[str, ...] = ()  # what is not as one may think, a line each
    is_gguf: bool = False

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over names and bytes of the weight files, in name order."""
        total = hashlib.sha256()
        for path in self.weight_files:
            total.update(path.name.encode() + b"\0")
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    total.update(block)
        return total.hexdigest()

    def carried(self) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of every file that the container carries."""
        for name, path in self.files.items():
            yield name, path.read_bytes()
        yield from self.made.items()

    def carried_file(self, name: str) -> bytes | None:
        """Content of one of them, None where there is no such file."""
        if name in self.files:
            return self.files[name].read_bytes()
        return self.made.get(name)

    @cached_property
    def planned_files(self) -> tuple[FileEntry, ...]:
        """The entries that the carried files will have in a container."""
        return tuple(planned_entry(name, data) for name, data in self.carried())

    @property
    def parameters(self) -> int:
        """Number of stored weights of all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def has_names_of_network(self) -> bool:
        """Whether tensors are called what the network calls them, not what the files do."""
        return self.is_gguf or self.whole is not None

    def read(self, name: str) -> Tensor:
        """Return one tensor as the checkpoint stores it, but for scales, which are applied."""
        if name in self.mxfp4:
            packed = self.mxfp4[name]
            return from_mxfp4(
                _read(packed.blocks, name + BLOCKS), _read(packed.scales, name + SCALES)
            )
        stored = _read(self.tensors[name].file, name)
        if name not in self.scales:
            return stored
        scale = self.scales[name]
        return dequantize(stored, _read(scale.file, scale.name), scale.block)

    def read_all(self) -> dict[str, Tensor]:
        """Return what the weight files hold, scales applied; pages not looked at cost no memory."""
        stored: dict[str, Tensor] = {}
        for path in self.weight_files:
            stored |= _read_file(path)
        for name, scale in self.scales.items():
            stored[name] = dequantize(stored[name], stored.pop(scale.name), scale.block)
        for name in self.mxfp4:
            stored[name] = from_mxfp4(stored.pop(name + BLOCKS), stored.pop(name + SCALES))
        return stored


def _read(path: Path, name: str) -> Tensor:
    if path.suffix != ".safetensors":
        return load_pickle(path)[name]
    with safe_open(path, framework="pt") as reader:
        return reader.get_tensor(name)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return load_pickle(path)
    with safe_open(path, framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
