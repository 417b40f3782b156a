"""What converting models takes in memory and on disk: by the preflight's formulas, and found.

    python benchmarks/scale.py
    python benchmarks/scale.py --found MODEL … --text text.txt --sequences 16 --length 512

The first prints the table of docs/scale.md for models of given shapes. No weights are needed: a
network of each shape is built without. The second converts models that are there to 4.25 bits, all
stages, and prints what memory that took beside what the formulas say. Scales are not refined, and
one gain is taken without a trial of several: both take most of the time and no memory.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cvxq_converter.costs import Speed
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import Preflight, preflight, size_text
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.gguf import skeleton
from peak import peaks_of
from random_model import SHAPES as RANDOM_SHAPES
from transformers import LlamaConfig, Qwen3MoeConfig

SHAPES: dict[str, dict[str, Any]] = {  # hidden, inner, layers, heads, key-value heads, vocabulary
    "135 M (SmolLM2)": {"sizes": (576, 1536, 30, 9, 3, 49152), "tied": True},
    "494 M (Qwen2.5)": {"sizes": (896, 4864, 24, 14, 2, 151936), "tied": True},
    "1.2 B (Llama 3.2)": {"sizes": (2048, 8192, 16, 32, 8, 128256), "tied": True},
    "6.7 B (Llama 2)": {"sizes": (4096, 11008, 32, 32, 32, 32000), "tied": False},
    "69 B (Llama 2)": {"sizes": (8192, 28672, 80, 64, 8, 32000), "tied": False},
}
MIXTURE = "30 B (Qwen3-30B-A3B)"
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


def mixture_source() -> Any:
    """A checkpoint of a mixture of experts, whose matrices are stored one by one."""
    sizes = RANDOM_SHAPES["30b-a3b"]
    tensors = {
        f"model.layers.{layer}.{module}.weight": SimpleNamespace(shape=shape)
        for layer in range(sizes.layers)
        for module, shape in sizes.matrices().items()
        if module != "mlp.gate"
    }
    ends = SimpleNamespace(shape=(sizes.vocabulary, sizes.hidden))
    tensors |= {"model.embed_tokens.weight": ends, "lm_head.weight": ends}
    source = source_of((64, 64, 1, 1, 1, 64), tied=True)
    source.config = Qwen3MoeConfig(**sizes.config(torch.bfloat16))
    source.tensors = tensors
    source.parameters = sum(math.prod(info.shape) for info in tensors.values())
    return source


def plan(source: Any, count: int, length: int, calibration: str, disk: int = 1 << 50) -> Preflight:
    """The preflight on a machine with room for everything, or a small disk."""
    options = ConversionOptions.of(
        bits=4.0, calibration=calibration, sequences=count, length=length, disk=disk
    )
    return preflight(source, options, speed=SPEED)


def cheap_options(arguments: argparse.Namespace) -> ConversionOptions:
    """A conversion of which only the memory is of interest."""
    return ConversionOptions.of(
        bits=4.25,
        calibration=arguments.text or "none",
        sequences=arguments.sequences,
        length=arguments.length,
        dtype=getattr(torch, arguments.dtype),
        refine_scales=False,
        gain=0.5,
    )


def convert_once(arguments: argparse.Namespace) -> None:
    """Convert one model, in this process, with progress on stderr."""

    def progress(stage: str, done: int, total: int) -> None:
        print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.cvxq"
        report = convert(arguments.once, target, cheap_options(arguments), progress, say)
    say(report.decoder.line())


def say(line: str) -> None:
    """Tell it on stderr."""
    print(line, file=sys.stderr, flush=True)


def print_found(arguments: argparse.Namespace) -> None:
    """Convert each model in a process of its own, and print a row for it."""
    print("| model | memory by the formulas | found, at the most | in which stage | time |")
    print("|---|---:|---:|---|---:|")
    for model in arguments.found:
        plan = preflight(open_source(model), cheap_options(arguments), speed=SPEED)
        stated = max(plan.peak_memory_bytes, plan.proving_memory_bytes)
        given = ["--sequences", str(arguments.sequences), "--length", str(arguments.length)]
        given += [
            "--dtype",
            arguments.dtype,
            *(["--text", arguments.text] if arguments.text else []),
        ]
        peaks = peaks_of([sys.executable, __file__, "--once", model, *given])
        size, stage = peaks.most
        say(peaks.line())
        name = f"{Path(model).name}, {plan.sequences} × {plan.length}"
        print(
            f"| {name} | {size_text(stated)} | {size / 1e9:.2f} GB | {stage} "
            f"| {peaks.seconds:.0f} s |",
            flush=True,
        )


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--found", nargs="+", metavar="MODEL", help="folders to convert")
    parser.add_argument("--once", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--text", help="a .txt file to calibrate on; none without")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    if arguments.once:
        convert_once(arguments)
    elif arguments.found:
        print_found(arguments)
    else:
        print_shapes()


def print_shapes() -> None:
    """Print the table of shapes."""
    print("| parameters | in float32 | memory | whole, to sample | temporary files | at least |")
    print("|---|---:|---:|---:|---:|---:|")
    sources = {name: source_of(**shape) for name, shape in SHAPES.items()}
    for name, source in {**sources, MIXTURE: mixture_source()}.items():
        for count, length in AMOUNTS:
            text, own = (plan(source, count, length, kind) for kind in ("a.txt", "self"))
            least = plan(source, count, length, "a.txt", disk=1)
            print(
                f"| {name}, {count} × {length} | {size_text(4 * source.parameters)} "
                f"| {size_text(text.peak_memory_bytes)} | {size_text(own.peak_memory_bytes)} "
                f"| {size_text(text.scratch_bytes)} | {size_text(least.scratch_bytes)} |"
            )


if __name__ == "__main__":
    main()
