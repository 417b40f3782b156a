"""Everything of a converted model → one .cvxq file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from cvxq_format import Codebook, CompandedTensor, Writer

from cvxq_converter.allocate.sizes import stored_dtype
from cvxq_converter.source.checkpoint import Source


def as_stored(value: torch.Tensor) -> torch.Tensor:
    """An unquantized tensor in the type that `stored_dtype` chooses, on the CPU."""
    value = value.detach().cpu().contiguous()
    return value.to(stored_dtype(value))


def store_raw(writer: Writer, name: str, value: torch.Tensor, *, added_bias: bool = False) -> None:
    """Write one unquantized tensor in the type that `stored_dtype` chooses."""
    stored = as_stored(value)
    if stored.dtype is torch.bfloat16:
        writer.add_raw(name, stored.view(torch.uint16).numpy(), dtype="bf16", added_bias=added_bias)
    else:
        writer.add_raw(name, stored.numpy(), added_bias=added_bias)


def write_container(
    path: Path,
    source: Source,
    codebook: Codebook,
    quantized: Mapping[str, CompandedTensor],
    raw: Iterable[tuple[str, torch.Tensor]],
    added_biases: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    documents: Mapping[str, bytes],
) -> None:
    """Write the container atomically.

    quantized: by tensor name. raw: everything else of the model. aliases: other name → name.
    documents: further files (provenance, quality report, the decoder's record).
    """
    with Writer(path, codebooks=[codebook] if quantized else []) as writer:
        for name, data in source.carried():
            writer.add_file(name, data)
        for name, data in documents.items():
            writer.add_file(name, data)
        for name, tensor in quantized.items():
            writer.add_companded(name, tensor)
        for name, value in raw:
            store_raw(writer, name, value)
        for name, value in added_biases.items():
            store_raw(writer, name, value, added_bias=True)
        for alias, target in aliases.items():
            writer.add_alias(alias, target)


def document_bytes(value: Any) -> bytes:
    """A JSON document as the file carries it, the same bytes for the same values."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
