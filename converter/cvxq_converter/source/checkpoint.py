"""A Hugging Face checkpoint: where its files are, the network they make, the matrices inside.

Three steps, each usable alone: `open_source` looks at files and configuration only and reads no
weights; `load_network` builds the network with transformers' own class (never with code from the
checkpoint); `find_matrices` lists what can be quantized, in the network's order.

Names are those of the checkpoint. transformers may name parameters differently (GPT-2 checkpoints
lack the leading "transformer.", newer versions rename GPT-NeoX's head), so `source_names` pairs
both: by name where prefixes explain the difference, else by equal shape and content.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from cvxq_format.entries import FileEntry
from cvxq_format.files import planned_entry
from cvxq_format.model_config import attention_options
from safetensors import safe_open
from torch import Tensor

from cvxq_converter.errors import ConversionError, one_line
from cvxq_converter.source.folder import (
    TensorInfo,
    find_folder,
    find_weight_files,
    load_pickle,
    quiet_transformers,
    read_config,
    read_index,
)
from cvxq_converter.source.matrices import Matrix, find_matrices
from cvxq_converter.source.text_part import (
    WRAPPERS,
    load_text_part,
    text_config_json,
    text_config_of,
)

__all__ = [
    "Matrix",
    "Source",
    "TensorInfo",
    "find_matrices",
    "load_network",
    "load_tokenizer",
    "open_source",
    "other_tensors",
    "source_names",
]

CARRIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZERS = ("tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_OF_IMAGES = re.compile(r"(^|\.)(vision\w*|visual|multi_modal_projector)\.")
CARRIED_FOLDER = "additional_chat_templates"  # further templates, one .jinja file each


@dataclass(frozen=True)
class Source:
    """A checkpoint whose configuration and tensor index have been read and checked."""

    name: str  # hub id or the folder's own name, never a path
    folder: Path
    config: Any  # transformers.PretrainedConfig
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]  # name → path of what the container carries
    whole: Any = None  # configuration of the model that this is the text part of, if it is one
    made: Mapping[str, bytes] = field(default_factory=dict)  # carried in place of such files

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

    @cached_property
    def planned_files(self) -> tuple[FileEntry, ...]:
        """The entries that the carried files will have in a container."""
        return tuple(planned_entry(name, data) for name, data in self.carried())

    @property
    def left_out(self) -> str | None:
        """What of the checkpoint is not converted, in one line."""
        if self.whole is None:
            return None
        return f"{self.name}: only its text part is converted; images are left out"

    @property
    def parameters(self) -> int:
        """Number of stored weights of all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return one tensor as the checkpoint stores it (shape and dtype unchanged)."""
        info = self.tensors[name]
        if info.file.suffix == ".safetensors":
            with safe_open(info.file, framework="pt") as reader:
                return reader.get_tensor(name)
        return load_pickle(info.file)[name]


def open_source(model: str, revision: str | None = None) -> Source:
    """Find `model` (a folder, else a hub id) and read its configuration and tensor index.

    revision: branch, tag or commit of a hub id; refused for a folder.
    Raises ConversionError for anything that is not a complete, supported causal LM.
    """
    folder, name = find_folder(model, revision)
    config = read_config(folder, name)
    weight_files = find_weight_files(folder, name)
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files:
        tensors.update(read_index(path))
    files = {file: folder / file for file in CARRIED_FILES if (folder / file).is_file()}
    for path in sorted((folder / CARRIED_FOLDER).glob("*.jinja")):
        files[f"{CARRIED_FOLDER}/{path.name}"] = path
    whole: Any = None
    made: dict[str, bytes] = {}
    if config.model_type in WRAPPERS:
        whole, config = config, text_config_of(config, name)
        del files["config.json"]
        made["config.json"] = text_config_json(config).encode()
        tensors = {key: info for key, info in tensors.items() if not _OF_IMAGES.search(key)}
    if "tokenizer.json" not in files:
        tokenizer = _fast_tokenizer(folder)
        if tokenizer is not None:
            made["tokenizer.json"] = tokenizer.encode()
    return Source(name, folder, config, weight_files, tensors, files, whole, made)


def _fast_tokenizer(folder: Path) -> str | None:
    """The tokenizer.json that transformers makes of a tokenizer of another kind, if it can."""
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        return None
    with quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return str(tokenizer.backend_tokenizer.to_str())
        except Exception:  # whatever it is, the tokenizer is used, and judged, elsewhere
            return None


def load_network(source: Source, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """Build the network in evaluation mode, with every weight taken from the checkpoint.

    Raises ConversionError if a weight is missing, misshapen, NaN or infinite in `dtype`.
    """
    options: dict[str, Any] = {
        "config": source.config,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": source.weight_files[0].suffix == ".safetensors",
        "output_loading_info": True,
        "dtype": dtype,
        **attention_options(source.config.get_text_config().to_dict()),
    }
    with quiet_transformers():
        try:
            if source.whole is not None:
                network, info = load_text_part(source.folder, source.whole, source.config, options)
            else:
                network, info = transformers.AutoModelForCausalLM.from_pretrained(
                    source.folder, **options
                )
        except (MemoryError, ConversionError):
            raise
        except Exception as error:  # whatever the architecture's code makes of the files
            raise ConversionError(
                f"{source.name}: transformers {transformers.__version__} cannot load it: "
                f"{one_line(error)}"
            ) from error
    for key in sorted(info["missing_keys"]):
        raise ConversionError(f"{source.name}: weight {key} is missing from the checkpoint")
    for key in sorted(str(item) for item in info.get("mismatched_keys", ())):
        raise ConversionError(f"{source.name}: weight {key} does not have the configured shape")
    network = network.to(device).eval()
    _check_finite(source, network, dtype)
    return network


def load_tokenizer(source: Source) -> Any | None:
    """Return the checkpoint's tokenizer, or None if it has no tokenizer files."""
    if not any(file.startswith(("tokenizer", "vocab", "spiece")) for file in source.files):
        return None
    with quiet_transformers():
        try:
            return transformers.AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
            raise ConversionError(
                f"{source.name}: its tokenizer cannot be loaded: {one_line(error)}"
            ) from error


def source_names(source: Source, network: Any) -> dict[str, str]:
    """Pair each parameter of the network with the checkpoint tensor that it was loaded from.

    Tied parameters keep all their names; one that the checkpoint lacks gets the name it would have.
    A text part has the names of its own network.
    """
    if source.whole is not None:
        return {name: name for name, _ in network.named_parameters(remove_duplicate=False)}
    prefix = f"{network.base_model_prefix}."
    names: dict[str, str] = {}
    unmatched: dict[str, Tensor] = {}
    stripped = not any(key.startswith(prefix) for key in source.tensors)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        short = name.removeprefix(prefix)
        found = [key for key in (name, short, prefix + name) if key in source.tensors]
        if found:
            names[name] = found[0]
        else:
            unmatched[name] = parameter.data
            names[name] = short if stripped else name
    free = [key for key in source.tensors if key not in set(names.values())]
    for name, tensor in unmatched.items():
        equal = _same_content(source, free, name, tensor)
        if equal is not None:
            names[name] = equal
            free.remove(equal)
    return names


def other_tensors(
    network: Any, matrices: list[Matrix], names: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) of every parameter that is not a matrix, each once.

    Buffers that the checkpoint stores for the network (they are not recomputed on load) come too.
    """
    seen = {id(matrix.parameter) for matrix in matrices}
    names = names or {}
    for name, parameter in network.named_parameters():
        if id(parameter) not in seen:
            yield names.get(name, name), parameter.data
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name, tensor in network.state_dict().items():
        if name not in parameters:
            yield names.get(name, name), tensor


def _check_finite(source: Source, network: Any, dtype: torch.dtype) -> None:
    names = source_names(source, network)
    for name, parameter in network.named_parameters():
        low, high = torch.aminmax(parameter.data.flatten())  # NaN propagates; no mask in memory
        if not (torch.isfinite(low) and torch.isfinite(high)):
            found = "NaN" if torch.isnan(low) else "infinite values"
            raise ConversionError(
                f"{source.name}: tensor {names[name]} has {found} in {str(dtype)[6:]}; "
                "the checkpoint is damaged, or needs a dtype of wider range"
            )


def _same_content(source: Source, free: list[str], name: str, tensor: Tensor) -> str | None:
    """Return the free checkpoint tensor that equals `tensor`, the most alike in name first."""
    likeness = {key: difflib.SequenceMatcher(None, key, name).ratio() for key in free}
    for key in sorted(free, key=lambda key: -likeness[key]):
        if source.tensors[key].shape == tuple(tensor.shape):
            stored = source.read(key).to(device=tensor.device, dtype=tensor.dtype)
            if torch.equal(stored, tensor):
                return key
    return None
