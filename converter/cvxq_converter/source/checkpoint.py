"""A Hugging Face checkpoint: where its files are, the network they make, the matrices inside.

Three steps, each usable alone: `open_source` looks at files and configuration only and reads no
weights; `load_network` builds the network with transformers' own class (never with code from the
checkpoint); `find_matrices` lists what can be quantized, in the network's order.

Names are those of the checkpoint. transformers may name parameters differently (GPT-2 checkpoints
lack the leading "transformer.", newer versions rename GPT-NeoX's head), so `source_names` pairs
both: by name where prefixes explain the difference, else by equal shape and content.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from cvxq_format.model_config import attention_options
from torch import Tensor
from transformers import GenerationConfig

from cvxq_converter.errors import ConversionError, one_line
from cvxq_converter.source.blocks import Values, hollow
from cvxq_converter.source.experts import (
    expert_names,
    expert_parameters,
    expert_values,
    experts_of,
    hollow_stacks,
    unstack,
)
from cvxq_converter.source.folder import (
    TensorInfo,
    adapter_notice,
    drop_quantization,
    find_folder,
    find_weight_files,
    quiet_transformers,
    read_config,
    read_index,
    refuse_pointer,
    without_quantization,
)
from cvxq_converter.source.gguf import open_gguf, read_gguf, skeleton
from cvxq_converter.source.matrices import Matrix, find_matrices
from cvxq_converter.source.mxfp4 import take_mxfp4
from cvxq_converter.source.scales import find_scales, quantization_notice
from cvxq_converter.source.source import Source
from cvxq_converter.source.text_part import (
    WRAPPERS,
    load_text_part,
    text_config_json,
    text_config_of,
)
from cvxq_converter.source.tokenizer import has_tokenizer, load_tokenizer, made_tokenizer

__all__ = [
    "Matrix",
    "Source",
    "TensorInfo",
    "check_finite",
    "find_matrices",
    "load_hollow",
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
_OF_IMAGES = re.compile(r"(^|\.)(vision\w*|visual|multi_modal_projector)\.")
_PIECE = 1 << 22  # weights looked at together
CARRIED_FOLDER = "additional_chat_templates"  # further templates, one .jinja file each


def open_source(model: str, revision: str | None = None) -> Source:
    """Find `model` (a folder or a GGUF file, else a hub id); read configuration and tensor index.

    revision: branch, tag or commit of a hub id; refused for a folder or a file.
    Raises ConversionError for anything that is not a complete, supported causal LM.
    """
    if Path(model).is_file():
        if revision is not None:
            raise ConversionError(f"{model}: a file has no revisions; drop --revision")
        return open_gguf(Path(model))
    folder, name = find_folder(model, revision)
    notices = [adapter_notice(folder, name)]
    config = read_config(folder, name)
    weight_files = find_weight_files(folder, name)
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files:
        tensors.update(read_index(path))
    files, made, unread = _carried_files(folder, name)
    if unread and not has_tokenizer([*files, *made]):
        notices.append(f"the result has no tokenizer; transformers cannot read it: {unread}")
    quantization = drop_quantization(config)
    mxfp4 = take_mxfp4(tensors)
    scales = find_scales(tensors, quantization, name)
    notices.append(quantization_notice(quantization, scales, len(mxfp4)))
    for scale in scales.values():
        del tensors[scale.name]
    whole: Any = None
    if config.model_type in WRAPPERS:
        whole, config = config, text_config_of(config, name)
        made["config.json"] = text_config_json(config).encode()
        tensors = {key: info for key, info in tensors.items() if not _OF_IMAGES.search(key)}
        notices.append("only its text part is used; images are left out")
    elif quantization is not None:
        made["config.json"] = without_quantization(folder / "config.json")
    for file in made:
        files.pop(file, None)
    said = tuple(f"{name}: {notice}" for notice in notices if notice)
    return Source(name, config, weight_files, tensors, files, made, whole, scales, mxfp4, said)


def _carried_files(folder: Path, name: str) -> tuple[dict[str, Path], dict[str, bytes], str | None]:
    """The files that a container carries, those made for it, and why the tokenizer's are not."""
    files = {file: folder / file for file in CARRIED_FILES if (folder / file).is_file()}
    for path in sorted((folder / CARRIED_FOLDER).glob("*.jinja")):
        files[f"{CARRIED_FOLDER}/{path.name}"] = path
    for path in files.values():
        refuse_pointer(path, name)
    made, unread = ({}, None) if "tokenizer.json" in files else made_tokenizer(folder)
    if "tokenizer_config.json" in files:  # it says the rest, the template included
        made = {file: data for file, data in made.items() if file == "tokenizer.json"}
    return files, made, unread


def load_network(source: Source, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """Build the network for evaluation, without gradients, every weight from the checkpoint.

    transformers is handed the weights, and so cannot put an adapter on them that lies beside.
    Raises ConversionError if a weight is missing, misshapen, NaN or infinite in `dtype`.
    """
    options: dict[str, Any] = {
        "output_loading_info": True,
        "dtype": dtype,
        **attention_options(source.config.get_text_config().to_dict()),
    }
    experts: dict[str, Tensor] = {}
    with quiet_transformers():
        try:
            if source.whole is not None:
                weights = source.read_all()
                network, info = load_text_part(weights, source.whole, source.config, options)
            else:
                empty = skeleton(source.config)
                weights = read_gguf(source, empty, dtype) if source.is_gguf else source.read_all()
                experts = {} if source.is_gguf else _take_experts(weights, empty, dtype)
                network, info = type(empty).from_pretrained(
                    None, config=empty.config, state_dict=weights, **options
                )
            settings = source.carried_file("generation_config.json")
            if settings is not None:
                network.generation_config = GenerationConfig.from_dict(json.loads(settings))
        except (MemoryError, ConversionError):
            raise
        except Exception as error:  # whatever the architecture's code makes of the files
            raise ConversionError(
                f"{source.name}: transformers {transformers.__version__} cannot load it: "
                f"{one_line(error)}"
            ) from error
    for key in sorted(info["missing_keys"]):
        raise ConversionError(
            f"{source.name}: weight {key} is missing from the checkpoint; copy it again"
        )
    for key in sorted(str(item) for item in info.get("mismatched_keys", ())):
        raise ConversionError(
            f"{source.name}: weight {key} does not have the configured shape; "
            "give its own config.json"
        )
    unstack(network)
    for name, value in experts.items():
        network.get_parameter(name).data = value.to(dtype)
    network = network.to(device).eval().requires_grad_(False)
    check_finite(source, network, dtype)
    return network


def _take_experts(weights: dict[str, Tensor], empty: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Put hollow stacks in the places of experts' matrices, and return these by parameter.

    transformers would make stacks of them in memory, all layers' at once. empty: the network's
    skeleton, which stays as it is.
    """
    stacks = hollow_stacks(empty, dtype)
    if not stacks:
        return {}
    network = skeleton(copy.deepcopy(empty.config))
    unstack(network)
    taken: dict[str, Tensor] = {}
    for tensor, found in expert_values(weights, network).items():
        del weights[tensor]
        taken |= found
    if taken:
        weights |= stacks
    return taken


def load_hollow(stored: Any, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """Build a network again in another dtype, without memory for its matrices.

    stored: the network as `load_network` built it; it keeps the weights. Vectors and buffers are
    there, in the types that transformers gives them beside weights of `dtype`.
    """
    persistent, of_experts = stored.state_dict(), expert_parameters(stored)
    values = {name: persistent[name] for name, _ in stored.named_buffers() if name in persistent}
    if of_experts:
        values |= hollow_stacks(skeleton(copy.deepcopy(stored.config)), dtype)
    for name, parameter in stored.named_parameters():  # each once: ties are made anew
        if name not in of_experts:
            values[name] = parameter.data if parameter.ndim < 2 else hollow(parameter, dtype)
    attention = attention_options(stored.config.get_text_config().to_dict())
    config = copy.deepcopy(stored.config)
    if hasattr(config, "output_router_logits"):  # for training; they are of all blocks at once
        config.output_router_logits = False
    with quiet_transformers():
        network = type(stored).from_pretrained(
            None, config=config, state_dict=values, dtype=dtype, **attention
        )
    network.generation_config = stored.generation_config
    unstack(network)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            value = stored.get_parameter(name).data
            parameter.data = value.to(device, parameter.dtype, copy=True)
        else:
            parameter.data = hollow(parameter, device=device)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device, copy=True)
    return network.eval().requires_grad_(False)


def source_names(source: Source, network: Any) -> dict[str, str]:
    """Pair each parameter of the network with the checkpoint tensor that it was loaded from.

    Tied parameters keep all their names; one that the checkpoint lacks gets the name it would have.
    A text part and a GGUF file have the names of their own network.
    """
    if experts_of(network):
        return expert_names(source, network)
    if source.has_names_of_network:
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
    network: Any,
    matrices: list[Matrix],
    names: Mapping[str, str] | None = None,
    value_of: Values = lambda _, parameter: parameter.data,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) of every parameter that is not a matrix, each once.

    value_of: what a parameter holds, if it is not in the network. Buffers that the checkpoint
    stores for the network (they are not recomputed on load) come too.
    """
    seen = {id(matrix.parameter) for matrix in matrices}
    names = names or {}
    for name, parameter in network.named_parameters():
        if id(parameter) not in seen:
            yield names.get(name, name), value_of(name, parameter)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name, tensor in network.state_dict().items():
        if name not in parameters:
            yield names.get(name, name), tensor


def check_finite(source: Source, network: Any, dtype: torch.dtype) -> None:
    """Raise ConversionError if a parameter, read in `dtype`, is not finite; its rows in pieces."""
    for name, parameter in network.named_parameters():
        for piece in parameter.data.flatten().split(_PIECE):
            low, high = torch.aminmax(piece.to(dtype))  # NaN propagates; no mask in memory
            if not (torch.isfinite(low) and torch.isfinite(high)):
                found = "NaN" if torch.isnan(low) else "infinite values"
                raise ConversionError(
                    f"{source.name}: tensor {source_names(source, network)[name]} has {found} "
                    f"in {str(dtype)[6:]}; "
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
