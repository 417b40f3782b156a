"""A model of the Hugging Face hub: its files in the cache, downloaded where they are missing."""

from __future__ import annotations

from pathlib import Path

from cvxq_converter.errors import ConversionError

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that there is


def download(model: str, revision: str | None) -> Path:
    """Return the cache folder of the hub id `model`; ConversionError if it cannot be had."""
    from cvxq.hub import reason
    from huggingface_hub import snapshot_download

    try:
        for weights in _WEIGHTS:
            patterns = [*_SMALL_FILES, weights]
            found = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
            if any(found.glob(weights)):
                break
    except Exception as error:  # the hub client raises many types, all meaning "not to be had"
        at = f" at revision {revision}" if revision else ""
        raise ConversionError(f"{model}{at}: no such folder, and {reason(error)}") from error
    return found
