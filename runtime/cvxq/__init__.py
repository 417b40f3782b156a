"""Run `.cvxq` models: `cvxq.load(path)` gives a `Model` that generates and can be evaluated.

    import cvxq
    model = cvxq.load("model.cvxq")
    print(model.generate("Once upon a time").text)

Names are imported when first used, because torch and transformers take seconds to import and
the command line's help needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvxq.errors import CvxqError
    from cvxq.generate import Generation
    from cvxq.loading import load
    from cvxq.model import Model
    from cvxq.sample import SamplingSettings

__all__ = ["CvxqError", "Generation", "Model", "SamplingSettings", "load"]

_HOME = {
    "CvxqError": "cvxq.errors",
    "Generation": "cvxq.generate",
    "Model": "cvxq.model",
    "SamplingSettings": "cvxq.sample",
    "load": "cvxq.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cvxq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
