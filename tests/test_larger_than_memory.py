"""The file that the benchmark of files larger than memory makes: a model of more layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvxq.lean import open_native, record_of
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_format import Reader, verify
from cvxq_kernels import cpu

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import larger_than_memory


@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
def test_layers_are_repeated_until_the_file_is_large_enough(
    build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    build_mixture("Qwen3Moe").save_pretrained(tmp_path / "model")
    source, target = tmp_path / "a.cvxq", tmp_path / "b.cvxq"
    options = ConversionOptions.of(bits=8, calibration="none", group_size=16)
    convert(str(tmp_path / "model"), source, options)
    least = 3 * source.stat().st_size
    layers = larger_than_memory.repeat_layers(source, target, least)
    assert target.stat().st_size >= least
    assert not verify(target)
    with Reader(source) as few, Reader(target) as many:
        assert len(record_of(many).layers) == layers
        first, last = (
            few.read("model.layers.1.mlp.experts.0.up_proj.weight"),
            many.read(f"model.layers.{layers - 1}.mlp.experts.0.up_proj.weight"),
        )
        assert np.array_equal(first.packed_codes, last.packed_codes)
        decoder = open_native(record_of(many), many, 1)
        assert np.isfinite(decoder.feed([1, 2, 3])).all()
