"""What is freed is given back, where the C library has to be told so."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
from cvxq_converter.source import allocator


@pytest.mark.parametrize(
    ("platform", "has_it", "expected"),
    [("linux", True, [(-3, 1 << 20), (0,)]), ("linux", False, []), ("darwin", True, [])],
)
def test_large_blocks_become_mappings_of_their_own(
    platform: str,
    has_it: bool,
    expected: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[int, ...]] = []
    functions = dict.fromkeys(("mallopt", "malloc_trim"), lambda *a: called.append(a))
    library = SimpleNamespace(**(functions if has_it else {}))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(allocator.sys, "platform", platform)
    allocator.give_freed_memory_back()
    assert called == expected
