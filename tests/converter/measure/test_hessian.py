"""Error feedback: Hessians as defined, columns pushed as derived, outputs nearer than without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.allocate.clustering import cluster_rows, group_moments, row_weights
from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.forward import InputHessians
from cvxq_converter.measure.hessian import (
    DAMPING,
    Feedback,
    InverseFactor,
    _shrink_to_diagonal,
    effective_tokens,
)
from cvxq_converter.measure.statistics import Measuring, measure_statistics
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.columns import Task, quantize_matrix
from cvxq_converter.quantize.companding import default_levels, make_codebook
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import LoadedModel, load_model
from hypothesis import given, settings
from hypothesis import strategies as st

CODEBOOK = make_codebook(default_levels(), 6)
OPTIONS = ConversionOptions.of(bits=4, group_size=8)


def random_hessian(seed: int, K: int, rank: int) -> torch.Tensor:
    """Second moments of inputs that are correlated, and of a few only if the rank is small."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * K, rank, generator=generator, dtype=torch.float64)
    mixed = inputs @ torch.randn(rank, K, generator=generator, dtype=torch.float64)
    return (mixed.T @ mixed / len(mixed)).float()


def quantized(
    weight: torch.Tensor, depths: np.ndarray, hessian: torch.Tensor | None, with_means: bool = False
) -> tuple[Any, np.ndarray]:
    """The quantized matrix (groups of 8 rows), and its float64 values in source order."""
    rows = len(weight)
    clustering = cluster_rows(np.ones(rows), np.ones(rows), 8, 1)
    shares = row_weights(np.ones(rows), clustering)
    moments = group_moments(weight, clustering, shares)
    feedback = None if hessian is None else InverseFactor.of(hessian)
    task = Task(weight, clustering, depths, moments, shares, with_means, feedback)
    found = quantize_matrix(task, CODEBOOK)
    levels = np.zeros((9, 256))
    for depth, table in enumerate(CODEBOOK.levels, start=1):
        levels[depth, : len(table)] = table
    cluster = np.repeat(np.arange(clustering.clusters), clustering.cluster_rows)
    value = levels[found.depths[cluster], found.codes]
    if found.mean_codes is not None:
        value = value + found.mean_codes[cluster] * float(found.mean_step)
    scales = CODEBOOK.scale_table.astype(np.float64) * float(found.scale_unit)
    out = np.empty_like(value)
    out[clustering.permutation] = scales[found.scale_codes[cluster]] * value
    return found, out


def output_error(weight: torch.Tensor, values: np.ndarray, hessian: torch.Tensor) -> float:
    """Σ over rows of δᵀ H δ."""
    delta = values - weight.double().numpy()
    return float(np.einsum("nk,kl,nl->", delta, hessian.double().numpy(), delta))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 12), st.integers(1, 12))
def test_the_factor_is_that_of_the_damped_inverse(seed: int, K: int, rank: int) -> None:
    hessian = random_hessian(seed, K, rank)
    found = InverseFactor.of(hessian)
    diagonal = hessian.diagonal()[found.order]
    assert (diagonal.diff() <= 0).all()
    damped = hessian[found.order][:, found.order].double()
    damped += DAMPING * float(hessian.diagonal().double().mean()) * torch.eye(K)
    factor = found.factor.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(K).double(), atol=2e-3, rtol=0)


def test_errors_are_pushed_as_optimal_brain_surgeon_has_it() -> None:
    """Each column in turn, the rest updated with the inverse of what remains, in float64."""
    weight = torch.randn(8, 7, generator=torch.Generator().manual_seed(0))
    hessian = random_hessian(1, 7, 7)
    depths = np.full((1, 7), 2, np.uint8)
    found, values = quantized(weight, depths, hessian)
    order = torch.argsort(hessian.diagonal(), descending=True).numpy()
    damped = hessian.double().numpy() + DAMPING * float(hessian.diagonal().mean()) * np.eye(7)
    moved = weight.double().numpy().copy()
    remaining = list(order)
    for column in order:
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        scale = float(found.scale_unit) * CODEBOOK.scale_table[found.scale_codes[0, column]]
        nearest = np.abs(moved[:, column, None] / scale - CODEBOOK.levels[1]).argmin(1)
        stored = found.codes[:, column][np.argsort(found.clustering.permutation)]
        assert (nearest == stored).all()
        error = (moved[:, column] - values[:, column]) / inverse[0, 0]
        moved[:, remaining] -= np.outer(error, inverse[0])
        remaining.remove(column)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("with_means", [False, True])
def test_the_output_is_nearer_with_feedback(depth: int, with_means: bool) -> None:
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(2)) + 0.3
    hessian = random_hessian(3, 40, 40)
    depths = np.full((3, 40), depth, np.uint8)
    _, apart = quantized(weight, depths, None, with_means)
    _, fed = quantized(weight, depths, hessian, with_means)
    ratio = output_error(weight, fed, hessian) / output_error(weight, apart, hessian)
    assert ratio < 0.8


def test_pruned_columns_push_what_they_lose() -> None:
    """Two equal inputs, one pruned: the other takes over its weight."""
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))
    hessian = torch.tensor([[1.01, 1.0], [1.0, 1.0]])
    _, values = quantized(weight, np.array([[0, 8]], np.uint8), hessian)
    assert np.abs(values[:, 0]).max() == 0
    wanted = weight.double().numpy().sum(1)
    assert values[:, 1] == pytest.approx(wanted, abs=0.05 * float(weight.abs().max()))


def test_inputs_that_never_come_and_zero_weights_do_no_harm() -> None:
    weight = torch.zeros(8, 5)
    weight[:, 1] = 1.0
    _, values = quantized(weight, np.full((1, 5), 3, np.uint8), torch.zeros(5, 5))
    assert np.isfinite(values).all()
    assert np.abs(values[:, [0, 2, 3, 4]]).max() == 0


class Case:
    """A small network with its statistics."""

    def __init__(self, folder: Path) -> None:
        self.loaded: LoadedModel = load_model(open_source(str(folder), None), OPTIONS)
        self.sequences = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
        self.statistics = measure_statistics(
            self.loaded.network, self.loaded.matrices, self.sequences
        )


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2"])
def case(
    request: pytest.FixtureRequest, build_network: Any, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    build_network(request.param).save_pretrained(folder)
    return Case(folder)


def gathered(case: Case, statistics: dict[str, MatrixStatistics]) -> dict[str, torch.Tensor]:
    """The Hessians by a pass of their own."""
    hessians = InputHessians(case.loaded, case.sequences, statistics)
    found = {matrix.name: hessians.hessian(matrix.name) for matrix in case.loaded.matrices}
    return {name: hessian for name, hessian in found.items() if hessian is not None}


def feedback_of(case: Case, statistics: dict[str, MatrixStatistics]) -> Feedback:
    return Feedback(case.loaded, statistics, InputHessians(case.loaded, case.sequences, statistics))


def test_hessians_are_the_weighted_moments_of_what_the_modules_saw(case: Case) -> None:
    loaded, statistics = case.loaded, case.statistics
    found = gathered(case, statistics)
    assert set(found) == {m.name for m in loaded.matrices}
    matrix = next(m for m in loaded.matrices if "mlp" in m.name)
    seen: list[torch.Tensor] = []
    module = loaded.network.get_submodule(matrix.input_module_name)
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    with torch.no_grad():
        for row in case.sequences:
            loaded.network(input_ids=row[None])
    hook.remove()
    weights = statistics[matrix.name].token_weights
    assert weights is not None
    wanted = sum(
        torch.einsum("t,tk,tl->kl", torch.from_numpy(w).double(), x, x)
        for w, x in zip(weights, seen, strict=True)
    )
    torch.testing.assert_close(
        found[matrix.name].double(), wanted / case.sequences.numel(), rtol=1e-4, atol=1e-7
    )


def test_the_traces_agree_with_the_squared_gradients(case: Case) -> None:
    """tr H and the squared gradients of all weights estimate nearly the same number.

    tr H leaves out what several tokens do to one target together, as in the values of attention.
    """
    loaded, statistics = case.loaded, case.statistics
    found = gathered(case, statistics)
    for matrix in loaded.matrices:
        total = statistics[matrix.name].row_sensitivity.sum()
        assert 0.2 * total < float(found[matrix.name].diagonal().sum()) < 1.5 * total


def test_measuring_gathers_the_same_on_the_way(case: Case) -> None:
    loaded = case.loaded
    measuring = Measuring(loaded.streamed, loaded.matrices, case.sequences, hessians=True)
    apart = gathered(case, measuring.statistics())
    assert set(apart) == {matrix.name for matrix in loaded.matrices}
    for name, hessian in apart.items():
        assert torch.equal(measuring.hessian(name), hessian)


def test_columns_that_others_make_up_for_count_for_less(case: Case) -> None:
    feedback = feedback_of(case, case.statistics)
    foreseen, least = feedback.foresee(case.statistics), []
    for matrix in case.loaded.matrices:
        factor = feedback.factor(matrix.name)
        assert factor is not None
        before, after = case.statistics[matrix.name], foreseen[matrix.name]
        assert np.array_equal(after.row_sensitivity, before.row_sensitivity)
        share = after.column_sensitivity / before.column_sensitivity
        assert (share <= 1).all()
        last = factor.order[-1]  # nothing follows it
        assert share[last] == pytest.approx(1, rel=1e-5)
        least.append(share.min())
    assert min(least) < 0.99  # of 32 inputs, 96 tokens tell little more


def test_the_unexplained_share_is_the_residual_of_a_regression() -> None:
    hessian = random_hessian(5, 6, 6)
    found = InverseFactor.of(hessian)
    damped = hessian.double() + DAMPING * float(hessian.diagonal().double().mean()) * torch.eye(6)
    first, rest = found.order[0], found.order[1:]
    cross = damped[first, rest]
    explained = cross @ torch.linalg.solve(damped[rest][:, rest], cross)
    residual = 1 - explained / damped[first, first]
    assert float(found.unexplained[first]) == pytest.approx(float(residual), rel=1e-4)


def test_few_tokens_tell_little_of_what_goes_together() -> None:
    """Off-diagonals shrink by the share that brings them, on average, nearest to the truth."""
    K, n = 12, 20
    generator = torch.Generator().manual_seed(6)
    mix = torch.eye(K) + 0.3 * torch.randn(K, K, generator=generator)
    truth = (mix.T @ mix).double()
    shares = torch.linspace(0, 1, 21, dtype=torch.float64)
    errors, chosen = torch.zeros(21, dtype=torch.float64), []
    for _ in range(200):
        inputs = torch.randn(n, K, generator=generator) @ mix
        sample = (inputs.T @ inputs / n).double()
        shrunk = sample.clone()
        _shrink_to_diagonal(shrunk, n)
        assert torch.equal(shrunk.diagonal(), sample.diagonal())
        chosen.append(1 - float(shrunk[0, 1] / sample[0, 1]))
        root = truth.diagonal().rsqrt()
        r, known = sample * root * root[:, None], truth * root * root[:, None]
        off = ~torch.eye(K, dtype=torch.bool)
        errors += torch.stack([((1 - s) * r - known)[off].square().sum() for s in shares])
    assert np.mean(chosen) == pytest.approx(float(shares[errors.argmin()]), abs=0.1)


def test_many_tokens_shrink_nothing_and_a_single_one_everything() -> None:
    hessian = random_hessian(7, 9, 9)
    hessian[4] = hessian[:, 4] = 0  # an input that never comes
    plain, exact = InverseFactor.of(hessian), InverseFactor.of(hessian, 1e12)
    torch.testing.assert_close(exact.factor, plain.factor)
    alone = InverseFactor.of(hessian, 1.0).factor
    torch.testing.assert_close(alone, torch.diag(alone.diagonal()))


def test_effective_tokens() -> None:
    assert effective_tokens(np.array([[2.0, 2.0], [2.0, 0.0]], np.float32)) == pytest.approx(3)
    assert effective_tokens(np.array([1e4, 1.0, 1.0], np.float32)) == pytest.approx(1, rel=1e-3)
    assert effective_tokens(np.zeros(3, np.float32)) == 0


def test_what_was_never_measured_has_no_factor(case: Case) -> None:
    name = case.loaded.matrices[0].name
    bare = replace(case.statistics[name], token_weights=None, lookup_moment=None)
    feedback = feedback_of(case, {name: bare})
    assert feedback.factor(name) is None


def test_inputs_that_overflow_are_named(case: Case) -> None:
    name = next(m.name for m in case.loaded.matrices if "mlp" in m.name)
    stats = case.statistics[name]
    assert stats.token_weights is not None
    weights = stats.token_weights.copy()
    weights[0, 0] = np.inf
    statistics = {**case.statistics, name: replace(stats, token_weights=weights)}
    feedback = feedback_of(case, statistics)
    with pytest.raises(ConversionError, match=rf"{name}.*not finite.*float32"):
        feedback.factor(name)
