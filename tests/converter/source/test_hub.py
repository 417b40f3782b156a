"""Hub ids that cannot be had: one line each, which says what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from cvxq_converter.errors import ConversionError
from cvxq_converter.source.checkpoint import open_source
from huggingface_hub import errors


def answer(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """What the hub client raises for an answer of the hub."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    text = f"{status} Client Error. (Request ID: x)\n\nsee https://huggingface.co/…"
    return kind(text, response=response)


def not_cached(cause: Exception) -> Exception:
    """What a snapshot raises that is not in the cache either."""
    error = errors.LocalEntryNotFoundError("An error happened\nwhile trying")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answer(errors.GatedRepoError, 401), "accept its license on its page"),
        (answer(errors.GatedRepoError, 403), "accept its license on its page"),
        (answer(errors.RepositoryNotFoundError, 401), "it is private; check the spelling"),
        (answer(errors.RepositoryNotFoundError, 404), "the hub has no such model"),
        (answer(errors.RevisionNotFoundError, 404), "no such revision; check its spelling"),
        (answer(errors.HfHubHTTPError, 401), r"refuses access \(HTTP 401\); log in with `hf auth"),
        (not_cached(answer(errors.HfHubHTTPError, 403)), "with a token that may read this model"),
        (not_cached(answer(errors.HfHubHTTPError, 503)), "HTTP 503; try again later"),
        (not_cached(errors.OfflineModeIsEnabled("offline")), "HF_HUB_OFFLINE forbids"),
        (not_cached(ConnectionError("no route")), "out of reach and has left no copy here: no r"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ConversionError, match=f"^someone/tiny: no such folder, and .*{expected}"
    ) as e:
        open_source("someone/tiny")
    assert "\n" not in str(e.value)
