"""What is freed is given back, where the C library has to be told so."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
from cvxq_converter.source import allocator

GIVEN_BACK = [(-1, 1 << 17), (-3, 1 << 20), (0,)]
Calls = list[tuple[int, ...]]


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What a C library, of a platform, that has the functions or not, is told."""
    platform, has_it = request.param
    called: Calls = []
    functions = dict.fromkeys(("mallopt", "malloc_trim"), lambda *a: called.append(a))
    library = SimpleNamespace(**(functions if has_it else {}))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(allocator.sys, "platform", platform)
    return called


@pytest.mark.parametrize("calls", [("linux", True)], indirect=True)
def test_large_blocks_become_mappings_of_their_own(calls: Calls) -> None:
    allocator.give_freed_memory_back()
    assert calls == GIVEN_BACK


@pytest.mark.parametrize("calls", [("linux", True)], indirect=True)
def test_freed_memory_is_kept_for_a_while(calls: Calls) -> None:
    def fail() -> None:
        with allocator.freed_memory_kept():
            calls.append((0, 0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert calls == [(-1, (1 << 31) - 1), (-3, 1 << 25), (0, 0), *GIVEN_BACK]


@pytest.mark.parametrize("calls", [("linux", False), ("darwin", True)], indirect=True)
def test_other_libraries_are_told_nothing(calls: Calls) -> None:
    with allocator.freed_memory_kept():
        allocator.give_freed_memory_back()
    assert calls == []


def test_this_library_takes_what_it_is_told() -> None:
    library = allocator._glibc()
    if library is None:
        pytest.skip("not glibc")
    with allocator.freed_memory_kept():
        assert library.mallopt(-3, allocator._MOST_MAPPED_FROM) == 1
        assert library.mallopt(-1, allocator._NEVER) == 1
