"""What a file says about how it was made."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
from cvxq_converter.write import assembling


def test_versions_of_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where sources are put on the path and run."""

    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    assert assembling._version("torch") != "not installed"
    monkeypatch.setattr(assembling, "version", version)
    assert assembling._version("cvxq") == "not installed"
