"""The small operations of a decoder between its matrices: norms, rotation, attention, gating.

Each is one kernel on a GPU, because at one token per step their number, not their work, is what
costs; `reference` is their definition in plain torch operations, used on other devices.
"""

from cvxq_kernels.decode.norm import Norm

__all__ = ["Norm"]
