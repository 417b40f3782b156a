"""GPTQ by GPTQModel, run inside its own environment.

Linear layers of the blocks, in float32 on the CPU. The weights written are those of the packed
layers that the peer would save, taken apart once more into codes, float16 scales and integer zero
points (`grid.py`). With `desc_act` columns are visited in the order of their activations and the
groups follow that order, so that every column is charged the index of its group; without it the
peer's group-aware order keeps groups of neighbours and is free. The file format is the peer's
second one, because the first cannot hold all zero points. Matrices with a side that is not a
multiple of 32 cannot be packed and are left out.
"""

from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM

from peers.grid import Parts, take_apart
from peers.worker import Inputs, Result, work

MULTIPLE = 32


@torch.inference_mode()
def unpack(layer: Any, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dequantized weights (N, K), scales and zero points (N, groups), group of each column (K,).

    The peer's own dequantization does the unpacking: with scales of 1 and codes of 0 it returns
    the zero points. Those of a symmetric grid are the middle code, 2^(bits − 1).
    """
    groups = layer.g_idx.long()
    weight = layer.dequantize_weight().float().T
    scale = layer.scales.clone().float().T
    layer.scales = torch.ones_like(layer.scales)
    layer.qweight = torch.zeros_like(layer.qweight)
    zeros = -layer.dequantize_weight().float().T  # (N, K)
    first = torch.stack([(groups == group).nonzero()[0, 0] for group in range(scale.shape[1])])
    return weight, scale, zeros[:, first] - 2 ** (bits - 1), groups


def quantize(inputs: Inputs, settings: dict[str, Any]) -> Result:
    """Quantize with `settings`: bits, group, symmetric, desc_act, mse (0 or the norm's power)."""
    shapes = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    odd: dict[str, dict[str, Any]] = {
        f"-:^{name}$": {}
        for name, module in shapes.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    }
    config = QuantizeConfig(
        bits=settings["bits"],
        group_size=settings["group"],
        sym=settings["symmetric"],
        desc_act=settings["desc_act"],
        act_group_aware=not settings["desc_act"],
        mse=settings["mse"],
        format="gptq_v2",
        dynamic=odd or None,
        offload_to_disk=False,
        device="cpu",
    )
    network = GPTQModel.load(str(inputs.model), config, dtype=torch.float32)
    rows = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in inputs.sequences
    ]
    network.quantize(rows, batch_size=8)
    matrices: dict[str, torch.Tensor] = {}
    parts = Parts()
    for name, module in network.model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        weight, scale, zero, groups = unpack(module, settings["bits"])
        rebuilt, bits = take_apart(
            name, weight, scale, None if settings["symmetric"] else zero, settings["bits"], groups
        )
        matrices[f"{name}.weight"] = rebuilt
        parts += bits
    return Result(matrices, parts)


if __name__ == "__main__":
    work(quantize, ("gptqmodel", "torch", "transformers"))
