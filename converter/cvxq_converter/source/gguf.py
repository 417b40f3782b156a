"""A GGUF file as a checkpoint: read by transformers, its weights turned back into floats.

transformers maps names and undoes what llama.cpp's writer did to the weights, but leaves out
settings that some architectures state, rotary scaling among them. What it leaves out is put into
the configuration here, or refused: nothing that the file says about the computation is dropped.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cvxq_converter.errors import ConversionError, one_line
from cvxq_converter.source.folder import TensorInfo, quiet_transformers, refuse_pointer
from cvxq_converter.source.gguf_settings import apply_settings
from cvxq_converter.source.source import Source
from cvxq_converter.source.text_part import text_config_json
from cvxq_converter.source.tokenizer import made_tokenizer

_MAGIC = b"GGUF"
_UNQUANTIZED = ("F32", "F16", "BF16", "F64")
_LONG = 1000  # entries of an array, which then is of the vocabulary
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message


def open_gguf(path: Path) -> Source:
    """Read configuration, tokenizer and tensor index of the GGUF file at `path`.

    Tensors are called what transformers' network calls them.
    Raises ConversionError for a file that is damaged, one part of several, or of an architecture
    or with a setting that is not supported.
    """
    name = path.name
    reader = _open(path)
    fields = reader.fields.items()
    settings = {key: field.contents() for key, field in fields if len(field.data) < _LONG}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    parts = settings.get("split.count", 1)
    if parts > 1:
        raise ConversionError(
            f"{name}: one of {parts} parts; join them first (llama-gguf-split --merge)"
        )
    config = _read_config(path)
    apply_settings(config, settings, lambda key: _dequantize(stored[key]), stored, name)
    empty = skeleton(config)
    config.architectures = [type(empty).__name__]
    types = sorted({tensor.tensor_type.name for tensor in reader.tensors} - set(_UNQUANTIZED))
    notices = []
    if types:
        notices.append(
            f"{name}: the source was quantized already ({', '.join(types)}); "
            "its values are taken as they are"
        )
    _refuse_unused(stored, empty, settings["general.architecture"], name)
    tokenizer, unread = made_tokenizer(path.parent, gguf_file=path.name)
    made = {
        "config.json": text_config_json(config).encode(),
        "generation_config.json": _generation_config(settings),
        **tokenizer,
    }
    if unread:
        notices.append(
            f"{name}: the result has no tokenizer; transformers cannot read it: {unread}"
        )
    tensors = {
        key: TensorInfo(path, tuple(parameter.shape), torch.float32)
        for key, parameter in empty.named_parameters()
    }
    return Source(name, config, (path,), tensors, {}, made, notices=tuple(notices), is_gguf=True)


def skeleton(config: Any) -> Any:
    """Build the network of a configuration without memory for its weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def read_gguf(source: Source, empty: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of a GGUF file as floats, by the names they have in the network `empty`.

    transformers' `gguf_file=` does the same, but asks for a package that it makes no use of here.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    (path,) = source.weight_files
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        read = load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=empty, torch_dtype=dtype
        )
    return dict(read["tensors"])


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    refuse_pointer(path, path.name)
    with path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ConversionError(
                f"{path}: not a GGUF file; expected a model folder, a hub id or a .gguf file"
            )
    try:
        return GGUFReader(path)
    except Exception as error:  # damage shows itself in many ways
        raise ConversionError(f"{path.name}: damaged: {one_line(error)}") from error


def _read_config(path: Path) -> Any:
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
        except Exception as error:  # each architecture validates its own fields in its own way
            raise ConversionError(
                f"{path.name}: transformers {transformers.__version__} cannot read it: "
                f"{one_line(error)}"
            ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConversionError(
            f"{path.name}: {config.model_type} is no causal language model; "
            "only those can be converted"
        )
    config.__dict__.pop("_model_name_or_path", None)
    return config


def _refuse_unused(stored: Mapping[str, Any], empty: Any, architecture: str, name: str) -> None:
    """Raise ConversionError for tensors that transformers would pass over in silence."""
    from transformers import modeling_gguf_pytorch_utils as utils

    make = utils.TENSOR_PROCESSORS.get(architecture, utils.TensorProcessor)
    used = utils.get_gguf_hf_weights_map(empty, make(config=empty.config.to_dict()))
    unused = sorted(stored.keys() - used.keys() - {"rope_freqs.weight"})
    if unused:
        raise ConversionError(
            f"{name}: transformers' {empty.config.model_type} has no place for {len(unused)} of "
            f"its tensors ({', '.join(unused[:3])}{', …' if len(unused) > 3 else ''}); "
            "convert the original checkpoint"
        )


def _dequantize(tensor: Any) -> np.ndarray:
    from gguf import dequantize

    return dequantize(tensor.data, tensor.tensor_type)


def _generation_config(settings: Mapping[str, Any]) -> bytes:
    """The generation_config.json of the tokens that end a text, a turn or a message."""
    tokens = {
        key: settings[f"tokenizer.ggml.{key}"]
        for key in ("bos_token_id", *_ENDS)
        if f"tokenizer.ggml.{key}" in settings
    }
    ends = list(dict.fromkeys(tokens[key] for key in _ENDS if key in tokens))
    values = {"bos_token_id": tokens.get("bos_token_id"), "eos_token_id": ends or None}
    return (json.dumps(values, indent=2) + "\n").encode()
