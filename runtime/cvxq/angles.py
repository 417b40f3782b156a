"""Rotary angles that depend on the length of the text, in a network of transformers.

Longrope turns a long text by other factors than a short one; dynamic scaling changes the angles
with every token past the model's original length.  The modules of transformers go by the last place
of a forward pass and by what they saw before, so keys that are cached, or were read in an earlier
piece of a prompt, would stay turned by other angles than those that follow.  Here the length of the
whole text decides, and whoever keeps keys is told when the angles are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


class Angles:
    """The modules of a network whose angles depend on the length; most networks have none."""

    def __init__(self, network: PreTrainedModel) -> None:
        """Find the modules."""
        modules = [module for module in network.modules() if hasattr(module, "rope_type")]
        self._modules = [m for m in modules if any(_depends(k) for k in _kinds(m).values())]

    @contextmanager
    def of(self, length: int) -> Iterator[bytes]:
        """Turn every place by the angles of a text of `length` tokens, while in this context.

        Yields bytes that are equal for equal angles.
        """
        kinds = [module.rope_type for module in self._modules]
        for module in self._modules:
            _turn(module, length)
        try:
            for module, kind in zip(self._modules, kinds, strict=True):
                fixed = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
                module.rope_type = fixed  # so that no forward pass changes the angles
            yield b"".join(map(_frequencies, self._modules))
        finally:
            for module, kind in zip(self._modules, kinds, strict=True):
                module.rope_type = kind


def _kinds(module: Any) -> dict[str | None, str]:
    """Type of layer → kind of scaling; the type is None where all layers are turned alike."""
    kind = module.rope_type
    return dict(kind) if isinstance(kind, dict) else {None: str(kind)}


def _depends(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _turn(module: Any, length: int) -> None:
    """Let a module take the angles of a text of `length` tokens, whatever it saw before."""
    for name in vars(module):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, 0)  # else dynamic scaling never shrinks again
    device = next(module.buffers()).device
    places = torch.tensor([[length - 1]], device=device)
    for layer_type in _kinds(module):
        module(torch.zeros(1, device=device), places, *([] if layer_type is None else [layer_type]))


def _frequencies(module: Any) -> bytes:
    buffers = [b for name, b in module.named_buffers() if name.endswith("inv_freq")]
    return b"".join(buffer.float().cpu().numpy().tobytes() for buffer in buffers)
