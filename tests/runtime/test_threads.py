"""The number of threads where the user does not say."""

from collections.abc import Iterator

import pytest
import torch
from cvxq import threads


@pytest.fixture(autouse=True)
def unchanged_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_small_files_and_small_quotas_take_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_processors", lambda: 4)
    assert [threads.useful_threads(size << 10) for size in (100, 900, 9000)] == [1, 2, 4]
    monkeypatch.setattr(threads, "available_processors", lambda: 1)
    assert threads.useful_threads(1 << 30) == 1


def test_torch_has_no_more_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setattr(threads, "available_processors", lambda: 4)
    threads.set_torch_threads(None)
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(threads, "available_processors", lambda: 1)
    threads.set_torch_threads(None)
    assert torch.get_num_threads() == 1
    threads.set_torch_threads(2)
    assert torch.get_num_threads() == 2
