"""Tuning: less loss, never more, whole scale codes, and what is in the network is what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.job import convert
from cvxq_converter.measure.quality import Reference, divergence, make_reference
from cvxq_converter.measure.statistics import measure_statistics
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.measure.teaching import Lesson, make_lessons
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.iteration import quantize_network
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.quantize.tuning import tune_network
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from cvxq_converter.stages import Stages
from cvxq_format import dequantize

OPTIONS = ConversionOptions.of(bits=2.0, group_size=8, gain=0.0)


@dataclass
class Case:
    """A quantized network, its original on lessons and on a held-back sequence."""

    loaded: LoadedModel
    result: Quantized
    statistics: dict[str, MatrixStatistics]
    lessons: list[Lesson]
    held_back: Reference


@pytest.fixture(params=["llama-tied", "opt"])
def case(request: pytest.FixtureRequest, build_network: Any, tmp_path: Path) -> Case:
    network = build_network(request.param)
    with torch.no_grad():  # predictions that are sure of something, so that there is much to lose
        network.get_output_embeddings().weight.mul_(4)
    network.save_pretrained(tmp_path)
    loaded = load_model(open_source(str(tmp_path), None), OPTIONS)
    network = loaded.network
    sequences = torch.randint(3, 96, (14, 24), generator=torch.Generator().manual_seed(0))
    lessons = make_lessons(network, sequences[:12])
    held_back = make_reference(network, sequences[12:])
    statistics = measure_statistics(network, loaded.matrices, sequences[:12])

    target, method = OPTIONS.target, OPTIONS.method
    result = quantize_network(loaded, statistics, None, held_back, {}, target, method, Stages(None))
    return Case(loaded, result, statistics, lessons, held_back)


def run(case: Case, steps: int, seed: int = 0) -> Quantized:
    done: list[int] = []
    found = tune_network(
        case.loaded,
        case.result,
        case.statistics,
        case.lessons,
        case.held_back,
        steps,
        seed,
        lambda step, total: done.append(step),
    )
    assert done == list(range(1, steps + 1))
    return found


def test_the_loss_falls_and_is_that_of_the_network_left_behind(case: Case) -> None:
    before = divergence(case.loaded.network, case.held_back).mean
    found = run(case, 24)
    assert found.quality is not None
    assert found.quality.mean < 0.95 * before
    assert divergence(case.loaded.network, case.held_back).mean == found.quality.mean
    for matrix in case.loaded.matrices:
        kept = dequantize(found.tensors[matrix.name], found.codebook)
        assert np.array_equal(matrix.weight.numpy(), kept)
    parameters = dict(case.loaded.network.named_parameters())
    for name in case.loaded.original_vectors:
        value = parameters[name].detach()
        assert torch.equal(value, value.half().float())
        assert not parameters[name].requires_grad


def test_codes_and_scale_codes_change_in_the_tensors_and_nothing_else(case: Case) -> None:
    found = run(case, 24)
    changed = moved = 0
    for name, tensor in found.tensors.items():
        before = case.result.tensors[name]
        moved += int((tensor.packed_codes != before.packed_codes).sum())
        assert np.array_equal(tensor.depths, before.depths)
        assert ((tensor.scale_codes > 0) == (before.scale_codes > 0)).all()
        assert tensor.payload_size == before.payload_size
        changed += int((tensor.scale_codes != before.scale_codes).sum())
    assert changed > 0
    assert moved > 0


def test_what_only_harms_is_not_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = Lesson.loss
    monkeypatch.setattr(Lesson, "loss", lambda self, logits: -learn(self, logits))
    before = divergence(case.loaded.network, case.held_back).mean
    found = run(case, 12)
    assert found.quality is not None
    assert found.quality.mean == pytest.approx(before, rel=0.01)  # vectors are rounded to 16 bits
    for name, tensor in found.tensors.items():
        assert np.array_equal(tensor.scale_codes, case.result.tensors[name].scale_codes)
        assert np.array_equal(tensor.packed_codes, case.result.tensors[name].packed_codes)


def test_the_same_seed_gives_the_same_codes(case: Case) -> None:
    before = {n: v.clone() for n, v in case.loaded.network.state_dict().items()}
    first = run(case, 6)
    case.loaded.restore()
    restored = case.loaded.network.state_dict()
    assert all(torch.equal(restored[n], v) for n, v in case.loaded.original_vectors.items())
    for name, value in before.items():
        case.loaded.network.get_parameter(name).data.copy_(value)
    second = run(case, 6)
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor.scale_codes, second.tensors[name].scale_codes)
        assert np.array_equal(tensor.packed_codes, second.tensors[name].packed_codes)


def test_lumped_divergence_is_exact_when_every_token_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator)
    other = logits + 0.3 * torch.randn(5, 40, generator=generator)

    class Network:
        device = torch.device("cpu")

        def __call__(self, **_: Any) -> Any:
            return type("Output", (), {"logits": logits[None]})

    (lesson,) = make_lessons(Network(), torch.zeros(1, 5, dtype=torch.int64))
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(other, -1)
    full = float((p.exp() * (p - q)).sum(-1).mean())
    assert float(lesson.loss(other)) == pytest.approx(full, rel=1e-3)
    assert float(lesson.loss(logits)) == pytest.approx(0, abs=1e-5)


def test_tuning_needs_calibration() -> None:
    with pytest.raises(ConversionError, match=r"^--tune needs calibration sequences"):
        ConversionOptions.of(bits=3, tune=10, calibration="none")


def converted(network: Any, folder: Path) -> str:
    """Convert a network, tuned, and return what the estimate said."""
    network.save_pretrained(folder / "model")
    lines: list[str] = []
    options = ConversionOptions.of(bits=3.0, group_size=8, sequences=16, length=16, tune=3, seed=1)
    convert(str(folder / "model"), folder / "a.cvxq", options, announce=lines.append)
    return lines[0]


def test_every_architecture_is_tuned(architecture: str, build_network: Any, tmp_path: Path) -> None:
    assert "3 steps of tuning" in converted(build_network(architecture), tmp_path)


@pytest.mark.parametrize("family", ["Mixtral", "GraniteMoe", "GptOss"])
def test_mixtures_of_experts_are_tuned(family: str, build_mixture: Any, tmp_path: Path) -> None:
    assert "3 steps of tuning" in converted(build_mixture(family), tmp_path)
