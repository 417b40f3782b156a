"""Scratch memory that all matrices of a device share.

Operations on one stream run one after the other, so one set of buffers serves them all; streams
that run packed matrices at the same time need a `Workspace` each.  A buffer that turns out too
small is replaced, but kept: a captured CUDA graph may hold its address.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch


class Workspace:
    """Named one-dimensional buffers on `device` that grow and never move while in use."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []

    def take(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the buffer `name` with at least `size` elements; zeros when it is new."""
        found = self.buffers.get(name)
        if found is None or len(found) < size:
            if found is not None:
                self._outgrown.append(found)
            found = torch.zeros(size, dtype=dtype, device=self.device)
            self.buffers[name] = found
        return found


_shared: WeakValueDictionary[torch.device, Workspace] = WeakValueDictionary()


def default_workspace(device: torch.device) -> Workspace:
    """Return the workspace that matrices on `device` share, for as long as there are any."""
    return _shared.setdefault(device, Workspace(device))
