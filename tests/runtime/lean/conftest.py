"""The architectures and variants that the lean decoders implement."""

from __future__ import annotations

import pytest

# Kinds of the parent conftest's `make_file`; between them every field of a record takes every
# kind of value.
LEAN_KINDS = (
    "llama",
    "llama-tied",
    "llama-biases",
    "llama-linear",
    "llama-dynamic",
    "llama-llama3",
    "llama-yarn",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "smollm3",
    "granite",
    "stablelm",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi-normed",
    "phi3",
    "phi3-longrope",
    "olmo2",
    "olmo3",
    "gpt2",
    "gpt-neox",
    "starcoder2",
    "opt",
    "opt-post-norm",
    "opt-gelu",
    "mixtral",
    "qwen3-moe",
    "olmoe",
    "gpt-oss",
    "granite-moe",
)


@pytest.fixture(params=LEAN_KINDS)
def lean_kind(request: pytest.FixtureRequest) -> str:
    """Run once for each kind."""
    return str(request.param)
