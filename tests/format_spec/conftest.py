"""What the container's tests share: vectors, second decoder, the script that makes vectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FORMAT_SPEC = Path(__file__).parents[2] / "format_spec"


def load(path: Path) -> ModuleType:
    """Import a script that belongs to no package."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def format_spec() -> Path:
    return FORMAT_SPEC


@pytest.fixture(scope="session")
def valid() -> Path:
    return FORMAT_SPEC / "vectors" / "valid"


@pytest.fixture(scope="session")
def faulty() -> Path:
    return FORMAT_SPEC / "vectors" / "faulty"


@pytest.fixture(scope="session")
def second_decoder() -> ModuleType:
    return load(Path(__file__).parent / "second_decoder.py")


# Test modules import `strategies` by name; importlib mode leaves this folder off the path.
sys.modules["format_strategies"] = load(Path(__file__).parent / "strategies.py")


@pytest.fixture(scope="session")
def make_vectors() -> Iterator[ModuleType]:
    """The script that writes the vectors, with the module beside it in reach."""
    sys.path.insert(0, str(FORMAT_SPEC))
    yield load(FORMAT_SPEC / "make_vectors.py")
    sys.path.remove(str(FORMAT_SPEC))


def names(folder: str) -> list[str]:
    return sorted(path.name for path in (FORMAT_SPEC / "vectors" / folder).glob("*.cvxq"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `valid_name` or `faulty_name` once per vector."""
    for folder in ("valid", "faulty"):
        if f"{folder}_name" in metafunc.fixturenames:
            metafunc.parametrize(f"{folder}_name", names(folder))


@pytest.fixture(scope="session")
def expected(valid: Path, faulty: Path) -> dict[str, Any]:
    """What expected.json says about every vector."""
    return {
        **json.loads((valid / "expected.json").read_text()),
        **json.loads((faulty / "expected.json").read_text()),
    }
