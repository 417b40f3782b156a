"""Everything of a converted model → one .cvxq file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from cvxq_format import Codebook, CompandedTensor, Writer

from cvxq_converter.source.checkpoint import Source


def store_raw(writer: Writer, name: str, value: torch.Tensor, *, added_bias: bool = False) -> None:
    """Write one unquantized tensor in the narrowest float type that does it justice.

    16 bits where that is exact, or for any matrix (bfloat16 if float16 would overflow); a vector
    that needs 32 bits keeps them. Integers and booleans stay what they are.
    """
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        writer.add_raw(name, value.numpy())
        return
    dtype = narrowest_dtype(value)
    stored = value.to(dtype)
    if dtype is torch.bfloat16:
        writer.add_raw(name, stored.view(torch.uint16).numpy(), dtype="bf16", added_bias=added_bias)
    else:
        writer.add_raw(name, stored.numpy(), added_bias=added_bias)


def narrowest_dtype(value: torch.Tensor) -> torch.dtype:
    """float16 or bfloat16 where exact, or for matrices; else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(value.to(dtype).to(value.dtype), value):
            return dtype
    if value.ndim < 2:
        return torch.float32
    fits = bool(value.abs().max() < torch.finfo(torch.float16).max)
    return torch.float16 if fits else torch.bfloat16


def write_container(
    path: Path,
    source: Source,
    codebook: Codebook,
    quantized: Mapping[str, CompandedTensor],
    raw: Iterable[tuple[str, torch.Tensor]],
    added_biases: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    documents: Mapping[str, Any],
) -> None:
    """Write the container atomically.

    quantized: by tensor name. raw: everything else of the model. aliases: other name → name.
    documents: JSON-serialisable values stored as files (provenance, quality report).
    """
    with Writer(path, codebooks=[codebook] if quantized else []) as writer:
        for name, file in source.files.items():
            writer.add_file(name, file.read_bytes())
        for name, value in documents.items():
            text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
            writer.add_file(name, (text + "\n").encode())
        for name, tensor in quantized.items():
            writer.add_companded(name, tensor)
        for name, value in raw:
            store_raw(writer, name, value)
        for name, value in added_biases.items():
            store_raw(writer, name, value, added_bias=True)
        for alias, target in aliases.items():
            writer.add_alias(alias, target)
