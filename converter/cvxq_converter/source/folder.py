"""A model folder as found on disk or on the hub: its configuration, its weight files, their index.

Everything here is a border: each function either returns something checked or raises a
ConversionError that says in one line what is wrong with the folder.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cvxq_converter.errors import ConversionError, NoSuchFileError, one_line
from cvxq_converter.source.hub import download
from cvxq_converter.source.text_part import WRAPPERS

_POINTER = b"version https://git-lfs.github.com/spec/"
_WEIGHT_FILES = tuple(
    f"{stem}{end}"
    for stem in ("model.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the checkpoint: the file that holds it, its shape and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_folder(model: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder of `model` and the name to call it by: the hub id, or the folder's own."""
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"{model}: a folder has no revisions; drop --revision")
        return path, path.resolve().name
    if not _HUB_ID.fullmatch(model):
        raise NoSuchFileError(
            f"{model}: no such folder, and not a hub id; give a folder or owner/name"
        )
    return download(model, revision), model


def read_config(folder: Path, name: str) -> Any:
    """Return the configuration of a causal LM whose architecture transformers knows."""
    path = folder / "config.json"
    if not path.is_file():
        found = next(iter(sorted(folder.glob("*.gguf"))), "")
        raise ConversionError(
            f"{name}: no config.json; expected a Hugging Face model folder, or the path of a GGUF "
            f"file itself{found and f', such as {found}'}"
        )
    raw = _read_json(path, name)
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
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            config.get_text_config().to_dict()  # which every later step looks into
            return config
    except Exception as error:  # each architecture validates its own fields in its own way
        refused = one_line(error.__cause__ or error)  # the outer one may not say what was found
        raise ConversionError(f"{name}: config.json is refused: {refused}") from error


def drop_quantization(config: Any) -> Any:
    """Take `quantization_config` out of a configuration and return it; None if there is none.

    transformers would act on it, whatever the weights are.
    """
    found = None
    for part in (config, config.get_text_config()):
        found = part.__dict__.pop("quantization_config", found)
    return found


def without_quantization(path: Path) -> bytes:
    """The config.json at `path` without what `drop_quantization` takes out."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw.pop("quantization_config", None)
    return (json.dumps(raw, indent=2) + "\n").encode()


def _check_is_causal_lm(raw: dict[str, Any], model_type: str, name: str) -> None:
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    allowed = causal.get(model_type, ())
    allowed = (allowed,) if isinstance(allowed, str) else tuple(allowed)
    if model_type in WRAPPERS:
        allowed = (*allowed, WRAPPERS[model_type])
    found = raw.get("architectures") or list(allowed)
    if not isinstance(found, list):
        raise ConversionError(f"{name}: config.json: architectures is {found!r}, allowed: a list")
    known = {item.lower() for item in allowed}  # older writers said LLaMAForCausalLM
    is_causal = any(str(item).lower() in known for item in found)
    is_causal = is_causal and not raw.get("is_encoder_decoder")
    if not is_causal:
        one = " or ".join(allowed) or "a class of transformers' AutoModelForCausalLM"
        raise ConversionError(
            f"{name}: {', '.join(map(str, found)) or model_type} is not a causal language model; "
            f"expected {one}"
        )
    if model_type in ("bert", "roberta") and not raw.get("is_decoder"):
        raise ConversionError(
            f"{name}: without is_decoder in config.json {model_type} is not a causal language model"
            "; expected true"
        )


def _read_json(path: Path, name: str) -> Any:
    refuse_pointer(path, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{name}: {path.name} is not JSON: {one_line(error)}") from error


def refuse_pointer(path: Path, name: str) -> None:
    """Raise ConversionError if a file is what Git leaves in its place without Git LFS."""
    with path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise ConversionError(
                f"{name}: {path.name} is only a Git LFS pointer to the file; run `git lfs pull` in "
                "the folder, or download the model with `hf download`"
            )


def adapter_notice(folder: Path, name: str) -> str | None:
    """Say that an adapter beside the weights plays no part; ConversionError for one alone."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    if any((folder / file).is_file() for file in _WEIGHT_FILES):
        return f"{path.name} is not applied: the weights beside it are taken as they are"
    raw = _read_json(path, name)
    base = raw.get("base_model_name_or_path") if isinstance(raw, dict) else None
    raise ConversionError(
        f"{name}: adapter_config.json: an adapter without the weights of its base model, "
        f"{base or 'which it does not name'}; merge it into them first (merge_and_unload of peft), "
        "then convert the merged model"
    )


def find_weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    """Return the weight files in name order; safetensors before .bin, like transformers."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single = folder / f"{stem}{suffix}"
        index = folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            refuse_pointer(single, name)
            return (single,)
        if index.is_file():
            refuse_pointer(index, name)
            try:
                shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConversionError(
                    f"{name}: {index.name} is not a weight index; copy it again"
                ) from error
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise ConversionError(
                        f"{name}: {index.name} names {shard}, which is missing; copy it, too"
                    )
                refuse_pointer(folder / shard, name)
            return tuple(folder / shard for shard in shards)
    raise ConversionError(
        f"{name}: no weights; expected model.safetensors or pytorch_model.bin, or shards of one"
    )


def read_index(path: Path) -> dict[str, TensorInfo]:
    """Return name → TensorInfo of one weight file, without reading its weights."""
    if path.suffix == ".bin":
        return {
            key: TensorInfo(path, tuple(tensor.shape), tensor.dtype)
            for key, tensor in load_pickle(path).items()
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
    """Return the torch dtype of a safetensors dtype name."""
    table = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    table |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
    table |= {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"}
    table |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    found = getattr(torch, table.get(name, ""), None)  # older PyTorch lacks the last
    if found is None:
        raise SafetensorError(f"dtype {name} is not supported")
    return found


def load_pickle(path: Path) -> dict[str, Tensor]:
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
        raise ConversionError(
            f"{path.name}: holds something else than a table of tensors; only these are read"
        )
    return state


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
