"""What is pinned is pinned by its hash, and a release is refused before it is half made."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
UNHASHED = ("torch", "triton")  # their builds are many


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = spec_from_file_location("cvxq_release", ROOT / "tools" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(text: str) -> dict[str, int]:
    """Each pin of a requirements file without spaces, and how many hashes it has."""
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        pin, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
        found[normal(pin)] = len(hashes)
    return found


def normal(pin: str) -> str:
    pin = pin.replace(" ", "").replace("'", '"')
    return pin.replace("python_full_version", "python_version")


def test_every_pin_but_two_has_hashes() -> None:
    pinned = pins((ROOT / "constraints.txt").read_text())
    hashed = pins((ROOT / "hashes.txt").read_text())
    assert all(hashed.values())
    wanted = {pin for pin in pinned if pin.partition("==")[0] not in UNHASHED}
    assert wanted == hashed.keys()


def test_the_bill_of_materials_has_every_pin(release: ModuleType) -> None:
    texts = [(ROOT / name).read_text() for name in ("hashes.txt", "constraints.txt")]
    assert pins(release.all_pins(*texts)).keys() == pins(texts[1]).keys()


def test_a_version_needs_a_dated_section(release: ModuleType) -> None:
    release.check_changes("# Changelog\n\n## 1.2.0 (2030-01-31)\n", "1.2.0")
    for text in ("## 1.2.0 (unreleased)\n", "## 1.2.0\n", "## 1.20 (2030-01-31)\n"):
        with pytest.raises(release.ReleaseError, match="date the one of this release"):
            release.check_changes(text, "1.2.0")


def test_the_version_is_that_of_the_project(release: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", release.version_of(text))
    with pytest.raises(release.ReleaseError, match="states no version"):
        release.version_of("[project]\n")


def test_builds_are_compared_by_their_wheels(release: ModuleType) -> None:
    first = {"a.whl": b"1", "b.whl": b"2", "c.tar.gz": b"3"}
    assert release.differing(first, dict(first)) == []
    assert release.differing(first, {**first, "c.tar.gz": b"4"}) == []
    assert release.differing(first, {"a.whl": b"9"}) == ["a.whl", "b.whl"]


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"status": " M x"}, "not committed"),
        ({"status": "", "tag": "v"}, "exists; state another version"),
    ],
)
def test_a_release_is_refused_first(
    release: ModuleType,
    answers: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*command: str, **_: object) -> str:
        return answers[command[1]]

    monkeypatch.setattr(release, "run", run)
    with pytest.raises(release.ReleaseError, match=told):
        release.release(is_dry=True)


def test_a_command_that_fails_is_one_line(release: ModuleType) -> None:
    with pytest.raises(release.ReleaseError, match=r"^git no-such-command failed: .*$"):
        release.run("git", "no-such-command")
