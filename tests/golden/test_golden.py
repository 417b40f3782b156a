"""Conversions of one seeded network against figures kept from the day they were accepted."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cvxq
import numpy as np
import pytest
import torch
from cvxq_format import CompandedTensor, Reader, dequantize, verify

HERE = Path(__file__).parent
GOLDEN = HERE / "llama-3-bits.cvxq"
CASES = (
    "llama-3-bits",
    "llama-compander-free-depths",
    "llama-self-calibrated",
    "llama-rtn-4-bits",
)


@pytest.fixture(scope="module")
def script() -> Any:
    """The script that made the golden files, as a module."""
    found = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The figures kept."""
    record: dict[str, Any] = json.loads((HERE / "expected.json").read_text("utf-8"))
    return record


@pytest.fixture(scope="module")
def made(
    script: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Today's conversions: their folder, and the figures of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("golden")
    script.build_network().save_pretrained(folder / "model")
    yield folder, {case: script.convert_case(case, folder) for case in script.CASES}
    torch.set_num_threads(threads)


def test_the_network_is_the_one_that_was_converted_then(script: Any, expected: Any) -> None:
    assert script.digest_of_network() == expected["network_sha256"]
    assert set(expected) == {"network_sha256", *CASES} == {"network_sha256", *script.CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_has_the_figures_kept(case: str, made: Any, expected: Any) -> None:
    found, kept = made[1][case], expected[case]
    for exact in ("parameters", "quantized_weights", "matrices", "method", "calibration_tokens"):
        assert found[exact] == kept[exact]
    sampled = case == "llama-self-calibrated"  # a token drawn differently changes the statistics
    assert found["rate_bits_per_weight"] == pytest.approx(
        kept["rate_bits_per_weight"], rel=0.01 if sampled else 1e-3
    )
    assert found["relative_error"] == pytest.approx(
        kept["relative_error"], rel=0.25 if sampled else 0.01
    )
    assert found["depth_histogram"] == pytest.approx(
        kept["depth_histogram"], abs=0.1 if sampled else 0.005
    )
    assert found["levels_of_depth_3"] == pytest.approx(
        kept["levels_of_depth_3"], rel=0.2 if sampled else 0.01
    )
    assert found["mean_depths"] == pytest.approx(kept["mean_depths"], abs=1.0 if sampled else 0.05)


def test_the_golden_file_is_untouched_and_sound(expected: Any) -> None:
    assert (
        hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == expected["llama-3-bits"]["file_sha256"]
    )
    assert not verify(GOLDEN)


def test_todays_reader_finds_in_the_golden_file_what_was_put_there(
    script: Any, expected: Any
) -> None:
    found = script.figures_of(GOLDEN)
    for name, value in found.items():
        assert value == pytest.approx(expected["llama-3-bits"][name], rel=1e-9)


def test_todays_converter_chooses_nearly_the_same_weights(made: Any) -> None:
    with Reader(GOLDEN) as then, Reader(made[0] / GOLDEN.name) as now:
        assert then.names == now.names
        for name in then.names:
            tensors = [reader.read(name) for reader in (then, now)]
            if not isinstance(tensors[0], CompandedTensor):
                continue
            old, new = (
                dequantize(t, r.codebook(0)) for t, r in zip(tensors, (then, now), strict=True)
            )
            assert np.abs(old - new).mean() < 0.02 * np.abs(old).mean()


def test_the_golden_file_runs() -> None:
    with cvxq.load(GOLDEN) as model, torch.no_grad():
        logits = model.network(torch.arange(3, 40)[None], use_cache=False).logits
    assert logits.shape == (1, 37, 64)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
