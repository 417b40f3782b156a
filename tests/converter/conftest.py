"""Tiny random models of every supported architecture, built on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import transformers

VOCABULARY = 96
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama-gqa": ("LlamaConfig", {**_LLAMA_LIKE, "num_key_value_heads": 2}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**_LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": True}),
    "phi": ("PhiConfig", _LLAMA_LIKE),
    "gpt-neox": ("GPTNeoXConfig", {**_LLAMA_LIKE, "rotary_pct": 0.5}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
}

Build = Callable[..., Any]


@pytest.fixture(params=_OPTIONS)
def architecture(request: pytest.FixtureRequest) -> str:
    """Return each architecture without experts in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def build_network() -> Build:
    """Return build(architecture, seed=0, **options): a random network in evaluation mode.

    Weights are large enough, and biases nonzero, for the output to depend on everything.
    """

    def build(architecture: str, seed: int = 0, **options: Any) -> Any:
        config_class, defaults = _OPTIONS[architecture]
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        settings = {"vocab_size": VOCABULARY, **special, **defaults, **options}
        config = getattr(transformers, config_class)(**settings)
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.15 if parameter.ndim > 1 else 0.05))
        return network

    return build


@pytest.fixture(scope="session")
def save_network(build_network: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return save(architecture, **options): the folder of a saved tiny model, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def save(architecture: str, **options: Any) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("models") / architecture
            build_network(architecture, **options).save_pretrained(made[key])
        return made[key]

    return save


@pytest.fixture(scope="session")
def read_until() -> Callable[[BinaryIO, bytes], None]:
    """A function that reads lines of a process until some word has come; it has to come."""

    def read(stream: BinaryIO, word: bytes) -> None:
        seen = b""
        while word not in seen:
            line = stream.readline()
            assert line, seen
            seen += line

    return read
