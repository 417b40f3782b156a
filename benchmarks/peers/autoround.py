"""AutoRound, run inside its own environment: rounding learnt by signed gradient descent.

The default recipe (200 steps per block, 8 sequences each) on the linear layers of the blocks, in
float32 without torch.compile, which takes longer than it saves on small models. Rows that groups
do not divide are the peer's own business: it pads the last group. The result is taken apart into
codes, float16 scales and integer zero points (`grid.py`).
"""

from typing import Any

import torch
from auto_round import AutoRound  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

from peers.grid import Parts, take_apart
from peers.worker import Inputs, Result, work


def quantize(inputs: Inputs, settings: dict[str, Any]) -> Result:
    """Quantize with `settings`: bits, group, symmetric, steps."""
    compressor = AutoRound(
        AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(inputs.model),
        bits=settings["bits"],
        group_size=settings["group"],
        sym=settings["symmetric"],
        iters=settings["steps"],
        dataset=[row[None] for row in inputs.sequences],
        seqlen=inputs.sequences.shape[1],
        nsamples=len(inputs.sequences),
        batch_size=8,
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = compressor.quantize()
    bits = settings["bits"]
    matrices: dict[str, torch.Tensor] = {}
    parts = Parts()
    for name, module in model.named_modules():
        scale, zero = getattr(module, "scale", None), getattr(module, "zp", None)
        if not isinstance(module, torch.nn.Linear) or not isinstance(scale, torch.Tensor):
            continue
        weight = module.weight.detach()
        scale = scale.detach().float().reshape(len(weight), -1)
        if settings["symmetric"]:
            zero = None
        elif zero is not None:
            # codes and zero points of 0 … 2^bits − 1 become those of `grid.py`
            zero = zero.detach().float().reshape(len(weight), -1) - 2 ** (bits - 1)
        groups = torch.arange(weight.shape[1]) // settings["group"]
        rebuilt, found = take_apart(
            name, weight, scale, zero, bits, groups.clamp(max=scale.shape[1] - 1)
        )
        matrices[f"{name}.weight"] = rebuilt
        parts += found
    return Result(matrices, parts)


if __name__ == "__main__":
    work(quantize, ("auto-round", "torch", "transformers"))
