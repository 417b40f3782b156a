"""Operations on weights that stay packed in memory.

`PackedWeight` holds one quantized matrix as its file stores it, in PyTorch, and expands it; `gpu`
computes with it in Triton, `decode` does what a decoder needs between its matrices.  `cpu` is a
world of its own, native code that needs numpy but not PyTorch.  Nothing heavy is imported before it
is used: neither PyTorch, for `cpu` alone, nor Triton, for a machine without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvxq_kernels.packed import PackedWeight, UnsupportedWeightError

__all__ = ["PackedWeight", "UnsupportedWeightError"]


def __getattr__(name: str) -> Any:
    """Import what is in `packed`, and PyTorch with it, when it is first asked for."""
    if name in __all__:
        from cvxq_kernels import packed

        return getattr(packed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
