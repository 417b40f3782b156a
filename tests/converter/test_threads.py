"""The same bytes from any number of threads, once the amount of calibration is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_format import Reader

OPTIONS = ConversionOptions.of(bits=3.0, group_size=16, sequences=4, length=24)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_tensors_and_figures_do_not_depend_on_threads(
    save_network: Callable[[str], Path], tmp_path: Path
) -> None:
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        path = tmp_path / f"{threads}.cvxq"
        convert(str(save_network("llama")), path, OPTIONS)
        with Reader(path) as reader:
            sums = [(entry.name, entry.crc32) for entry in reader.header.tensors]
            found.append((sums, reader.file("report.json")))
    assert found[0] == found[1] == found[2]
