"""What `pip install cvxq` leaves out, and the extra that brings it.

Packages that every use needs are dependencies. The others are imported inside the functions that
use them, and whoever sets out on such a way asks `need` first, so that what is missing is said in
one line, before any work is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from cvxq.errors import MissingExtraError

# Extra → what of it is looked for, by the names of imports; pyproject.toml lists distributions.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "convert": ("torch", "transformers", "gguf", "sentencepiece"),
    "cuda": ("torch",),  # there are platforms without Triton, and expanded matrices do without
    "eval": ("lm_eval",),
    "plot": ("matplotlib",),
    "serve": (
        "starlette",
        "pydantic",
        "uvicorn",
        "sse_starlette",
        "prometheus_client",
        "llguidance",
    ),
}


def need(extra: str, purpose: str) -> None:
    """Raise MissingExtraError, which says what `purpose` needs, unless an extra is installed."""
    missing = [name for name in PACKAGES[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs {_listed(missing)}, not installed here: pip install 'cvxq[{extra}]'"
        )


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
