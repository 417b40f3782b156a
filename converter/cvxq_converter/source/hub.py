"""A model of the Hugging Face hub: its files in the local cache, downloaded where they are missing.

The hub client fails in many ways; each becomes one line that says what to do about it.
"""

from __future__ import annotations

from pathlib import Path

from cvxq_converter.errors import ConversionError, one_line

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that there is


def download(model: str, revision: str | None) -> Path:
    """Return the cache folder of the hub id `model`; ConversionError if it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        for weights in _WEIGHTS:
            patterns = [*_SMALL_FILES, weights]
            found = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
            if any(found.glob(weights)):
                break
    except Exception as error:  # the hub client raises many types, all meaning "not to be had"
        at = f" at revision {revision}" if revision else ""
        raise ConversionError(f"{model}{at}: no such folder, and {_reason(error)}") from error
    return found


def _reason(error: Exception) -> str:
    """Say why the hub gives nothing, and what to do."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                "not in the hub's local cache, while HF_HUB_OFFLINE forbids to download it; "
                "unset that, or check the spelling"
            )
        error = cause  # a snapshot that is not cached hides what the hub answered
    if isinstance(error, errors.GatedRepoError):
        return (
            "the model is gated on the hub; accept its license on its page there, "
            "then log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has the model, but no such revision; check --revision"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "the hub has no such model, or it is private; check the spelling, "
            "or log in with `hf auth login`"
        )
    if status in (401, 403):
        return (
            f"the hub refuses access (HTTP {status}); log in with `hf auth login`, "
            "with a token that may read this model"
        )
    if status is not None:
        return f"the hub answers with HTTP {status}; try again later"
    return f"the hub is out of reach and has left no copy here: {one_line(error)}"
