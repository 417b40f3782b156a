"""Quantized weights in the network: biases corrected, the gain chosen by its own divergence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.bias import gained_bias_pays, layers_to_gain_bias
from cvxq_converter.measure.quality import Reference, divergence, make_reference
from cvxq_converter.measure.statistics import measure_statistics
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.gain import EXPONENTS
from cvxq_converter.quantize.iteration import quantize_network
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from cvxq_converter.stages import Stages
from cvxq_format import dequantize

Save = Callable[..., Path]
OPTIONS = ConversionOptions.of(bits=3.0, group_size=16)


pytestmark = pytest.mark.usefixtures("one_thread")


class Case:
    """A loaded network, measured on random sequences."""

    def __init__(self, folder: Path) -> None:
        self.loaded: LoadedModel = load_model(open_source(str(folder), None), OPTIONS)
        sequences = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(0))
        network = self.loaded.network
        self.before = {k: v.clone() for k, v in network.state_dict().items()}
        self.reference: Reference = make_reference(network, sequences[4:])
        self.statistics: dict[str, MatrixStatistics] = measure_statistics(
            network, self.loaded.matrices, sequences[:4], "kl", 0
        )

    def quantize(self, **options: Any) -> Quantized:
        chosen = OPTIONS.having(**options)
        target, method = chosen.target, chosen.method
        statistics, reference = self.statistics, self.reference
        return quantize_network(
            self.loaded, statistics, None, reference, {}, target, method, Stages(None)
        )


@pytest.fixture(scope="module")
def llama(build_network: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Layers without biases; what the embeddings have in common makes it pay to gain some."""
    network = build_network("llama")
    with torch.no_grad():
        network.model.embed_tokens.weight.add_(0.6 * torch.randn(32).sign())
    folder = tmp_path_factory.mktemp("llama")
    network.save_pretrained(folder)
    return Case(folder)


@pytest.fixture(scope="module")
def opt(save_network: Save) -> Case:
    """Layers with biases, and a tied head without."""
    return Case(save_network("opt"))


def test_the_gain_of_least_divergence_is_chosen(llama: Case) -> None:
    chosen = llama.quantize()
    tried = {exponent: llama.quantize(gain=exponent) for exponent in EXPONENTS}
    losses = {exponent: found.quality.mean for exponent, found in tried.items() if found.quality}
    assert len(set(losses.values())) == len(EXPONENTS)
    assert chosen.gain_exponent == min(losses, key=lambda e: losses[e])
    assert chosen.quality is not None
    assert chosen.quality.mean == min(losses.values())
    for name, tensor in chosen.tensors.items():  # the codes do not depend on the gain
        for other in tried.values():
            assert (tensor.packed_codes == other.tensors[name].packed_codes).all()
    ratios = [
        np.abs(a).sum() / np.abs(b).sum()
        for a, b in zip(tried[1.0].codebook.levels, tried[0.0].codebook.levels, strict=True)
    ]
    assert max(ratios) > 1.01


def test_what_is_left_in_the_network_is_what_was_reported(llama: Case) -> None:
    result = llama.quantize()
    assert result.quality is not None
    assert divergence(llama.loaded.network, llama.reference) == result.quality
    assert result.quality.mean > 0
    assert result.quality.tokens == 2 * 24
    for matrix in llama.loaded.matrices:
        dense = dequantize(result.tensors[matrix.name], result.codebook)
        assert torch.equal(matrix.weight, torch.from_numpy(dense))


def test_the_original_comes_back(llama: Case) -> None:
    llama.quantize()
    llama.loaded.restore()
    after = llama.loaded.network.state_dict()
    assert after.keys() == llama.before.keys()
    assert all(torch.equal(after[name], value) for name, value in llama.before.items())
    assert divergence(llama.loaded.network, llama.reference).mean == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_corrected_biases_take_the_mean_error_back(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(architecture)
    result = case.quantize(gain=0.5)
    checked = 0
    for matrix in case.loaded.matrices:
        if matrix.input_module_name is None:
            continue
        bias = case.loaded.network.get_submodule(matrix.input_module_name).bias
        stats = case.statistics[matrix.name]
        if bias is None or stats.input_mean is None:
            assert not matrix.has_bias
            continue
        old = case.loaded.original_biases.get(matrix.name, torch.zeros(len(bias)))
        delta = matrix.weight.double() - case.loaded.originals[matrix.name].double()
        shift = (delta @ torch.from_numpy(stats.input_mean).double()).numpy()
        left = shift + (bias.double() - old.double()).numpy()
        assert np.abs(shift).max() > 1e-3
        assert (np.abs(left) <= 2.0**-11 * np.abs(bias.numpy()) + 1e-6).all()  # float16
        checked += 1
    with_bias = sum(m.has_bias for m in case.loaded.matrices)
    assert checked == with_bias + len(result.added_biases) > 0


def test_only_layers_for_which_it_pays_gain_a_bias(llama: Case, opt: Case) -> None:
    for case in (llama, opt):
        gained = {m.name for m in layers_to_gain_bias(case.loaded.matrices, case.statistics)}
        for matrix in case.loaded.matrices:
            multiplies = matrix.input_module_name is not None
            pays = gained_bias_pays(case.statistics[matrix.name])
            expected = multiplies and not matrix.has_bias and pays
            assert (matrix.name in gained) == expected
        added = case.quantize(gain=0.5).added_biases
        names = {m.bias_name for m in case.loaded.matrices if m.name in gained}
        assert set(added) == names
    assert not llama.quantize(gain=0.5, correct_biases=False).added_biases


def test_without_correction_biases_stay_what_they_were(opt: Case) -> None:
    result = opt.quantize(correct_biases=False, gain=0.5)
    assert not result.added_biases
    for matrix in opt.loaded.matrices:
        if matrix.has_bias and matrix.input_module_name is not None:
            bias = opt.loaded.network.get_submodule(matrix.input_module_name).bias
            assert torch.equal(bias, opt.loaded.original_biases[matrix.name])


def test_gained_biases_count_in_the_rate(llama: Case) -> None:
    """At the same rate, what biases take is missing from the codes."""
    with_biases, without = llama.quantize(gain=0.5), llama.quantize(gain=0.5, correct_biases=False)
    assert with_biases.allocation is not None
    assert without.allocation is not None
    biases = sum(2 * b.numel() for b in with_biases.added_biases.values())
    assert biases > 0
    missing = without.allocation.code_bytes - with_biases.allocation.code_bytes
    assert missing == pytest.approx(biases, abs=64)
