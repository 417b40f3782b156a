"""HQQ, run inside its own environment: half-quadratic fitting of zero points, no calibration.

Linear layers of the blocks, one call of the peer's quantizer each, its default solver. Scales and
zero points are stored as float16 (the peer's own kind of file does the same), groups run along
either axis; a group may cross from one row into the next where rows do not divide evenly, as the
peer reshapes the whole matrix.
"""

from typing import Any

import torch
from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM

from peers.grid import SCALE_BITS, Parts
from peers.worker import Inputs, Result, work


def quantize(inputs: Inputs, settings: dict[str, Any]) -> Result:
    """Quantize with `settings`: bits, group, axis."""
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    matrices: dict[str, torch.Tensor] = {}
    parts = Parts()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is model.get_output_embeddings():
            continue
        weight = module.weight.detach()
        codes, meta = Quantizer.quantize(
            weight,
            nbits=settings["bits"],
            group_size=settings["group"],
            axis=settings["axis"],
            round_zero=settings["bits"] == 4,  # as the peer's own configuration sets it
            bitpack=False,
            device="cpu",
        )
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        matrices[f"{name}.weight"] = ((codes.float() - zero) * scale).reshape(weight.shape)
        parts += Parts(
            codes=codes.numel() * settings["bits"],
            scales=scale.numel() * SCALE_BITS,
            zero_points=zero.numel() * SCALE_BITS,
        )
    return Result(matrices, parts)


if __name__ == "__main__":
    work(quantize, ("hqq", "torch", "transformers"))
