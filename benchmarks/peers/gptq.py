"""GPTQ by LLM Compressor, run inside its own environment.

Only this file imports the peer. It quantizes the linear layers of the transformer blocks
(embeddings and head stay), and then does not take the peer's word for it: every matrix is taken
apart into integer codes, float16 scales and integer zero points (`grid.py`), and the weights
written are the ones that those numbers give back.

The peer works in float32 on the CPU, with activation order (its `static` kind, which fixes the
groups before it orders the columns and so needs no index per column) and a clipping search by
mean squared error, whose depth is an option because its default is meant for 4 bits. It refuses
groups that do not divide the rows; such matrices get the nearest group size that does.
"""

from typing import Any

import torch
from compressed_tensors.quantization import (  # type: ignore[import-not-found]
    QuantizationArgs,
    QuantizationScheme,
)
from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, PreTrainedModel

from peers.grid import Parts, group_size, take_apart
from peers.worker import Inputs, Result, work


def schemes(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, QuantizationScheme]:
    """One scheme per row length, for the linear layers that have it."""
    targets: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            targets.setdefault(module.in_features, []).append(name)
    return {
        f"rows of {inputs}": QuantizationScheme(
            targets=names,
            weights=QuantizationArgs(
                num_bits=settings["bits"],
                symmetric=settings["symmetric"],
                strategy="group",
                group_size=group_size(inputs, settings["group"]),
                scale_dtype=torch.float16,
                observer="memoryless_mse",
                # patience = all steps: the search must not stop at the first local minimum
                observer_kwargs={"maxshrink": settings["shrink"], "patience": 100},
            ),
        )
        for inputs, names in targets.items()
    }


def quantize(inputs: Inputs, settings: dict[str, Any]) -> Result:
    """Quantize with `settings`: bits, group, symmetric, shrink (deepest clip tried, 0 to 1)."""
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": inputs.sequences.tolist()}),
        recipe=GPTQModifier(
            config_groups=schemes(model, settings), ignore=["lm_head"], actorder="static"
        ),
        num_calibration_samples=len(inputs.sequences),
        max_seq_length=inputs.sequences.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    matrices: dict[str, torch.Tensor] = {}
    parts = Parts()
    for name, module in model.named_modules():
        scale = getattr(module, "weight_scale", None)
        if scale is None:
            continue
        symmetric = module.quantization_scheme.weights.symmetric
        zero = None if symmetric else module.weight_zero_point.detach()
        weight = module.weight.detach()
        rebuilt, bits = take_apart(name, weight, scale.detach(), zero, settings["bits"])
        matrices[f"{name}.weight"] = rebuilt
        parts += bits
    return Result(matrices, parts)


if __name__ == "__main__":
    work(quantize, ("llmcompressor", "compressed-tensors", "torch", "transformers"))
