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
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError, one_line
from .matrices import Matrix, find_matrices

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
CARRIED_FOLDER = "additional_chat_templates"  # further templates, one .jinja file each
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the checkpoint: the file that holds it, its shape and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Source:
    """A checkpoint whose configuration and tensor index have been read and checked."""

    name: str  # hub id or the folder's own name, never a path
    folder: Path
    config: Any  # transformers.PretrainedConfig
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]  # name → path of what the container carries verbatim

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

    @property
    def parameters(self) -> int:
        """Number of stored weights of all tensors."""
        return sum(_count(info.shape) for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return one tensor as the checkpoint stores it (shape and dtype unchanged)."""
        info = self.tensors[name]
        if info.file.suffix == ".safetensors":
            with safe_open(info.file, framework="pt") as reader:
                return reader.get_tensor(name)
        return _load_pickle(info.file)[name]


def open_source(model: str, revision: str | None = None) -> Source:
    """Find `model` (a folder, else a hub id) and read its configuration and tensor index.

    revision: branch, tag or commit of a hub id; refused for a folder.
    Raises ConversionError for anything that is not a complete, supported causal LM.
    """
    folder, name = _find_folder(model, revision)
    config = _read_config(folder, name)
    weight_files = _find_weight_files(folder, name)
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files:
        tensors.update(_index(path))
    files = {file: folder / file for file in CARRIED_FILES if (folder / file).is_file()}
    for path in sorted((folder / CARRIED_FOLDER).glob("*.jinja")):
        files[f"{CARRIED_FOLDER}/{path.name}"] = path
    return Source(name, folder, config, weight_files, tensors, files)


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
        "dtype" if _takes_dtype() else "torch_dtype": dtype,
    }
    with _quiet_transformers():
        try:
            network, info = transformers.AutoModelForCausalLM.from_pretrained(
                source.folder, **options
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
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
    with _quiet_transformers():
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
    """
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


# --- files --------------------------------------------------------------------------------------


def _find_folder(model: str, revision: str | None) -> tuple[Path, str]:
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"{model}: a folder has no revisions; drop --revision")
        return path, path.resolve().name
    if path.exists():
        raise ConversionError(f"{model}: a file; expected a model folder or a hub id")
    if not _HUB_ID.fullmatch(model):
        raise ConversionError(f"{model}: no such folder, and not a hub id (owner/name)")
    return _download(model, revision), model


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            found = Path(
                snapshot_download(model, revision=revision, allow_patterns=[*small, weights])
            )
            if any(found.glob(weights)):
                return found
    except Exception as error:  # the hub client raises many types, all meaning "not to be had"
        at = f" at revision {revision}" if revision else ""
        raise ConversionError(
            f"{model}{at}: no such folder, and the hub has no copy within reach: {one_line(error)}"
        ) from error
    return found


def _read_config(folder: Path, name: str) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{name}: no config.json; expected a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{name}: config.json is not JSON: {one_line(error)}") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise ConversionError(f"{name}: config.json has no model_type; not a transformers model")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if model_type not in known:
        reason = (
            "needs code from the checkpoint, which is never run"
            if "auto_map" in raw
            else ("a newer version may know it")
        )
        raise ConversionError(
            f"{name}: architecture {model_type!r} is unknown to transformers "
            f"{transformers.__version__} ({reason})"
        )
    _check_is_causal_lm(raw, model_type, name)
    try:
        with _quiet_transformers():
            return transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # each architecture validates its own fields in its own way
        raise ConversionError(f"{name}: config.json is refused: {one_line(error)}") from error


def _check_is_causal_lm(raw: dict[str, Any], model_type: str, name: str) -> None:
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    allowed = causal.get(model_type, ())
    allowed = (allowed,) if isinstance(allowed, str) else tuple(allowed)
    found = raw.get("architectures") or list(allowed)
    is_causal = any(item in allowed for item in found) and not raw.get("is_encoder_decoder")
    if not is_causal or (model_type in ("bert", "roberta") and not raw.get("is_decoder")):
        raise ConversionError(
            f"{name}: {', '.join(map(str, found)) or model_type} is not a causal language model"
            + (f"; expected {' or '.join(allowed)}" if allowed else "")
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ConversionError(
            f"{name}: already quantized ({method}); convert the original 16- or 32-bit checkpoint"
        )


def _find_weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single = folder / f"{stem}{suffix}"
        index = folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return (single,)
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConversionError(f"{name}: {index.name} is not a weight index") from error
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise ConversionError(f"{name}: {index.name} names {shard}, which is missing")
            return tuple(folder / shard for shard in shards)
    raise ConversionError(
        f"{name}: no weights; expected model.safetensors or pytorch_model.bin, or shards of one"
    )


def _index(path: Path) -> dict[str, TensorInfo]:
    if path.suffix == ".bin":
        return {
            key: TensorInfo(path, tuple(tensor.shape), tensor.dtype)
            for key, tensor in _load_pickle(path).items()
        }
    try:
        with safe_open(path, framework="pt") as reader:
            slices = {key: reader.get_slice(key) for key in reader.keys()}  # noqa: SIM118
            return {
                key: TensorInfo(path, tuple(item.get_shape()), _dtype(item.get_dtype()))
                for key, item in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path.name}: not a safetensors file: {one_line(error)}") from error


def _dtype(name: str) -> torch.dtype:
    table = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    table |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
    table |= {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    if name not in table:
        raise SafetensorError(f"dtype {name} is not supported")
    return getattr(torch, table[name])


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Map a .bin file; weights-only, so that nothing in the pickle can run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # files from before torch 1.6 cannot be mapped
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle errors come in many types
            raise ConversionError(
                f"{path.name}: not a file of plain weights: {one_line(error)}"
            ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConversionError(f"{path.name}: holds something else than a table of tensors")
    return state


# --- network ------------------------------------------------------------------------------------


def _takes_dtype() -> bool:
    """Say whether from_pretrained knows `dtype` (transformers 4.56) or only `torch_dtype`."""
    major, minor = transformers.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (4, 56)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars, notices and warnings off stderr for a while."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


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


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
