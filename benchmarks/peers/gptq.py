"""GPTQ by LLM Compressor, run inside its own environment: one model, one setting, one result.

    python -m peers.gptq MODEL --sequences ids.safetensors --bits 3 --group 64 --out FOLDER

Only this file imports the peer. It quantizes the linear layers of the transformer blocks
(embeddings and head stay), and then does not take the peer's word for it: every matrix is taken
apart into integer codes, float16 scales and integer zero points (`grid.py`), and the weights
written are the ones that those numbers give back. Written to FOLDER:

    matrices.safetensors   checkpoint name -> dequantized weights, float32 (outputs, inputs)
    summary.json           bits of the packed matrices by part, settings, versions

The peer works in float32 on the CPU, with activation order (its `static` kind, which fixes the
groups before it orders the columns and so needs no index per column) and a clipping search by
mean squared error, whose depth is an option because its default is meant for 4 bits.
"""

import argparse
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import (  # type: ignore[import-not-found]
    QuantizationArgs,
    QuantizationScheme,
)
from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peers.grid import Parts, take_apart

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def quantize(model: PreTrainedModel, sequences: torch.Tensor, options: argparse.Namespace) -> None:
    """Let the peer quantize the blocks of `model` in place; `sequences` is (S, L) token ids."""
    weights = QuantizationArgs(
        num_bits=options.bits,
        symmetric=options.symmetric,
        strategy="group",
        group_size=options.group,
        scale_dtype=torch.float16,
        observer="memoryless_mse",
        # patience = all steps: the search must not stop at the first local minimum
        observer_kwargs={"maxshrink": options.shrink, "patience": 100},
    )
    recipe = GPTQModifier(
        config_groups={"blocks": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        actorder=None if options.order == "none" else options.order,
    )
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": sequences.tolist()}),
        recipe=recipe,
        num_calibration_samples=len(sequences),
        max_seq_length=sequences.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )


def collect(model: PreTrainedModel, bits: int) -> tuple[dict[str, torch.Tensor], Parts]:
    """Dequantized weights by checkpoint name, and the bits that all of them take."""
    matrices: dict[str, torch.Tensor] = {}
    total = Parts()
    for name, module in model.named_modules():
        scale = getattr(module, "weight_scale", None)
        if scale is None:
            continue
        symmetric = module.quantization_scheme.weights.symmetric
        zero = None if symmetric else module.weight_zero_point.detach()
        weight = module.weight.detach()
        rebuilt, parts = take_apart(name, weight, scale.detach(), zero, bits)
        matrices[f"{name}.weight"] = rebuilt
        total += parts
    return matrices, total


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--sequences", type=Path, required=True, help="safetensors with `ids`")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--order", choices=["static", "none"], default="static")
    parser.add_argument("--shrink", type=float, default=0.2, help="deepest clip tried, 0 to 1")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    sequences = load_file(options.sequences)["ids"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    quantize(model, sequences, options)
    matrices, parts = collect(model, options.bits)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(matrices, options.out / "matrices.safetensors")
    summary = {
        "bits": asdict(parts),
        "settings": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "versions": {package: version(package) for package in PACKAGES},
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
