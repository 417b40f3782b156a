"""What converting models of given shapes takes in memory and on disk, by the preflight's formulas.

    python benchmarks/scale.py

prints the table of docs/scale.md. No weights are needed: a network of each shape is built without.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import Preflight, Speed, preflight, size_text
from cvxq_converter.source.gguf import skeleton
from transformers import LlamaConfig

SHAPES: dict[str, dict[str, Any]] = {  # hidden, inner, layers, heads, key-value heads, vocabulary
    "135 M (SmolLM2)": {"sizes": (576, 1536, 30, 9, 3, 49152), "tied": True},
    "494 M (Qwen2.5)": {"sizes": (896, 4864, 24, 14, 2, 151936), "tied": True},
    "1.2 B (Llama 3.2)": {"sizes": (2048, 8192, 16, 32, 8, 128256), "tied": True},
    "6.7 B (Llama 2)": {"sizes": (4096, 11008, 32, 32, 32, 32000), "tied": False},
    "69 B (Llama 2)": {"sizes": (8192, 28672, 80, 64, 8, 32000), "tied": False},
}
AMOUNTS = ((16, 512), (128, 2048))
SPEED = Speed(flops=1e11, elements=1e9, call_seconds=5e-6)  # not shown


def source_of(sizes: tuple[int, ...], tied: bool) -> Any:
    """A checkpoint of that shape, as far as the formulas look at one."""
    hidden, inner, layers, heads, key_value_heads, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    tensors = {
        name: SimpleNamespace(shape=tuple(parameter.shape))
        for name, parameter in skeleton(config).named_parameters()
    }
    return SimpleNamespace(
        config=config,
        tensors=tensors,
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        weight_files=(),
        carried=dict,
        has_names_of_network=False,
        scales={},
        mxfp4={},
    )


def plan(source: Any, count: int, length: int, calibration: str) -> Preflight:
    """The preflight on a machine with room for everything."""
    options = ConversionOptions.of(
        bits=4.0, calibration=calibration, sequences=count, length=length, disk=1 << 50
    )
    return preflight(source, options, speed=SPEED)


def main() -> None:
    """Print the table."""
    print("| parameters | in float32 | memory | whole, to sample | temporary files |")
    print("|---|---:|---:|---:|---:|")
    for name, shape in SHAPES.items():
        source = source_of(**shape)
        for count, length in AMOUNTS:
            text, own = (plan(source, count, length, kind) for kind in ("a.txt", "self"))
            print(
                f"| {name}, {count} × {length} | {size_text(4 * source.parameters)} "
                f"| {size_text(text.peak_memory_bytes)} | {size_text(own.peak_memory_bytes)} "
                f"| {size_text(text.scratch_bytes)} |"
            )


if __name__ == "__main__":
    main()
