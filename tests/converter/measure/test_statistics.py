"""The one-pass estimator against sums taken one token and one component at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.head import output_gradient
from cvxq_converter.measure.measurement import FIELDS
from cvxq_converter.measure.seeds import generator_of
from cvxq_converter.measure.statistics import Measuring, measure_statistics
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import Matrix, find_matrices, open_source
from cvxq_converter.source.loaded import load_model
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, Gemma2ForCausalLM

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2},
    "gpt2": {"n_embd": 8, "n_head": 2},
}


def small_network(build_network: Any, architecture: str, **options: Any) -> Any:
    """A network of some hundred weights, so that exact sums take a moment."""
    sizes = SMALL["gpt2" if architecture == "gpt2" else "llama"]
    if architecture.startswith("llama"):
        sizes = sizes | {"num_key_value_heads": 2, "num_hidden_layers": 1}
    network = build_network(architecture, vocab_size=11, **(sizes | options))
    return network.double()


def gradients(network: Any, matrices: list[Matrix], scalar: torch.Tensor) -> Iterator[Any]:
    found = torch.autograd.grad(
        scalar, [m.parameter for m in matrices], retain_graph=True, allow_unused=True
    )
    for matrix, gradient in zip(matrices, found, strict=True):
        gradient = torch.zeros_like(matrix.parameter) if gradient is None else gradient
        yield matrix.name, gradient.T if matrix.kind == "conv1d" else gradient


class Watched:
    """What goes into matrices and comes out of them while a network runs."""

    def __init__(self, network: Any, matrices: list[Matrix]) -> None:
        self._names = [m.name for m in matrices]
        self._passed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for matrix in matrices:
            module = network.get_submodule(matrix.input_module_name)
            module.register_forward_hook(partial(self._note, matrix.name))

    def _note(self, name: str, _: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self._passed[name] = inputs[0].detach().flatten(0, -2), output.requires_grad_()

    def squares(self, scalar: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, K) of each matrix: Σ over the tokens of squared gradient × squared input."""
        outputs = [self._passed[name][1] for name in self._names]
        found = torch.autograd.grad(scalar, outputs, retain_graph=True, allow_unused=True)
        felt = [
            torch.zeros_like(y) if g is None else g.square()
            for g, y in zip(found, outputs, strict=True)
        ]
        return {
            name: f.flatten(0, -2).T @ self._passed[name][0].square()
            for name, f in zip(self._names, felt, strict=True)
        }


def exact_squares(
    network: Any, matrices: list[Matrix], ids: torch.Tensor, metric: str
) -> dict[str, np.ndarray]:
    """Mean over tokens of E[(∂ score / ∂w)²], one backward pass per token and component.

    Of every token that a matrix sees its own share: as if it had the weight for itself.
    """
    watched = Watched(network, matrices)
    logits = network(input_ids=ids[None]).logits[0]
    logs = torch.log_softmax(logits, -1)
    totals = {m.name: torch.zeros_like(m.weight) for m in matrices}
    for token in range(len(ids)):
        for component in range(logits.shape[-1]):
            if metric == "kl":  # Σ_y p(y) (∂ log p(y) / ∂w)²: the Fisher information
                scalar, weight = logs[token, component], logs[token, component].exp().item()
            else:
                scalar, weight = logits[token, component], 1.0
            for name, squares in watched.squares(scalar).items():
                totals[name] += weight * squares
    return {name: (total / len(ids)).detach().numpy() for name, total in totals.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "metric"),
    [("llama", "kl"), ("llama", "logits"), ("llama-tied", "kl"), ("gpt2", "kl")],
)
def test_the_estimator_is_unbiased(architecture: str, metric: str, build_network: Any) -> None:
    """The mean of 250 passes with different seeds agrees with the exact sums.

    Every row and column sum lies within 4.75 of its own standard errors: for some 250 sums an
    unbiased estimator stays inside with a chance above 99.9 %. Seeds are fixed, so the outcome is
    too. The sum over all weights is known best: it must agree within 25 %, and in 4 errors.
    """
    network = small_network(build_network, architecture)
    matrices = [m for m in find_matrices(network) if not m.rows_are_tokens]
    ids = torch.tensor([1, 4, 7, 4, 2])
    exact = exact_squares(network, matrices, ids, metric)
    expected = np.concatenate([np.r_[exact[m.name].sum(1), exact[m.name].sum(0)] for m in matrices])
    passes = [measure_statistics(network, matrices, ids[None], metric, seed) for seed in range(250)]
    drawn = np.array(
        [
            np.concatenate(
                [np.r_[p[m.name].row_sensitivity, p[m.name].column_sensitivity] for m in matrices]
            )
            for p in passes
        ]
    )
    drawn = np.column_stack([drawn, drawn.sum(1)])
    expected = np.append(expected, expected.sum())
    errors = drawn.std(0, ddof=1) / len(passes) ** 0.5
    scores = (drawn.mean(0) - expected) / errors
    assert np.abs(scores).max() < 4.75
    assert abs(scores[-1]) < 4
    assert drawn.mean(0)[-1] / expected[-1] == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("metric", ["kl", "logits"])
@pytest.mark.parametrize("is_capped", [False, True])
def test_the_rows_of_a_head_are_exact(metric: str, is_capped: bool, build_network: Any) -> None:
    """Whatever is drawn, and through a cap on the logits, which Gemma 2 has."""
    network = small_network(build_network, "llama")
    if is_capped:
        config = {**SMALL["llama"], "vocab_size": 11, "head_dim": 4, "num_hidden_layers": 1}
        config |= {"tie_word_embeddings": False, "final_logit_softcapping": 0.2}
        config |= {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
        network = Gemma2ForCausalLM(Gemma2Config(**config)).eval().double()
    head = [m for m in find_matrices(network) if m.name == "lm_head.weight"]
    ids = torch.tensor([1, 4, 7])
    expected = exact_squares(network, head, ids, metric)["lm_head.weight"]
    found = measure_statistics(network, head, ids[None], metric, 3)["lm_head.weight"]
    np.testing.assert_allclose(found.row_sensitivity, expected.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.column_sensitivity, expected.sum(0), rtol=1e-5)
    assert found.token_weights is not None
    assert found.input_second_moment is not None
    assert (found.row_evidence == 1).all()


def test_a_tied_matrix_feels_both_uses(build_network: Any) -> None:
    """Its sums are those of the head and those of the table, were they two."""
    tied = small_network(build_network, "llama-tied")
    untied = small_network(build_network, "llama", tie_word_embeddings=False)
    weights = tied.state_dict()
    untied.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = torch.tensor([[1, 4, 7, 4, 2]])
    both = measure_statistics(tied, find_matrices(tied), ids, "kl", 3)["model.embed_tokens.weight"]
    apart = measure_statistics(untied, find_matrices(untied), ids, "kl", 3)
    head, table = apart["lm_head.weight"], apart["model.embed_tokens.weight"]
    for field in ("row_sensitivity", "column_sensitivity"):
        parts = getattr(head, field) + getattr(table, field)
        np.testing.assert_allclose(getattr(both, field), parts, rtol=1e-5)
    np.testing.assert_allclose(both.lookup_moment, table.lookup_moment, rtol=1e-5)


def test_a_table_keeps_what_was_felt_in_all(build_network: Any) -> None:
    """And shares it among all rows, those of tokens that nothing looked up included."""
    network = small_network(build_network, "llama")
    matrices = [m for m in find_matrices(network) if m.kind == "embedding"]
    ids = torch.tensor([1, 4, 7, 4, 2])
    found = measure_statistics(network, matrices, ids[None], "kl", 3)[matrices[0].name]
    logits = network(input_ids=ids[None]).logits
    drawn = output_gradient(logits, "kl", generator_of(3, 0)).gradient
    _, gradient = next(gradients(network, matrices, (logits * drawn).sum()))
    squares = gradient.square().numpy() / 5
    np.testing.assert_allclose(found.row_sensitivity.sum(), squares.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.column_sensitivity, squares.sum(0), rtol=1e-5)
    assert (found.row_sensitivity > 0).all()
    assert (found.row_evidence == 1).all()


def test_input_means(build_network: Any) -> None:
    network = build_network("llama-tied")
    matrices = find_matrices(network)
    sequences = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
    found = measure_statistics(network, matrices, sequences)
    inputs: list[torch.Tensor] = []
    hook = network.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        network(input_ids=sequences)
    hook.remove()
    expected = inputs[0].mean((0, 1)).numpy()
    mean = found["model.embed_tokens.weight"].input_mean
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    untied = build_network("llama")
    found = measure_statistics(untied, find_matrices(untied), sequences)
    assert found["model.embed_tokens.weight"].input_mean is None


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "phi", "gemma"])
def test_the_network_is_left_as_it_was(architecture: str, build_network: Any) -> None:
    network = build_network(architecture)
    network.train()
    first = next(network.parameters())
    first.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in network.named_parameters()}
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    matrices = find_matrices(network)
    sequences = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))
    measure_statistics(network, matrices, sequences)
    assert {n: (id(p), p.requires_grad) for n, p in network.named_parameters()} == before
    assert all(p.grad is None for p in network.parameters())
    assert network.training
    assert network.get_input_embeddings().sparse is False
    assert not any(m._forward_pre_hooks for m in network.modules())
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert find_matrices(network)[0].aliases == matrices[0].aliases


@pytest.mark.parametrize("metric", ["kl", "logits"])
def test_a_seed_repeats_exactly(metric: str, build_network: Any) -> None:
    network = build_network("llama-tied")
    matrices = find_matrices(network)
    sequences = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
    steps: list[tuple[int, int]] = []
    first = measure_statistics(
        network, matrices, sequences, metric, 7, lambda done, total: steps.append((done, total))
    )
    again = measure_statistics(network, matrices, sequences, metric, 7)
    other = measure_statistics(network, matrices, sequences, metric, 8)
    for name, item in first.items():
        np.testing.assert_array_equal(item.row_sensitivity, again[name].row_sensitivity)
        assert (item.column_sensitivity != other[name].column_sensitivity).any()
    # Three sequences: forward and back through two blocks, and both ends.
    assert steps == [(i, 18) for i in range(1, 19)]


def test_gradients_that_overflow_and_unknown_metrics_are_refused(build_network: Any) -> None:
    network = build_network("llama")
    matrices = find_matrices(network)
    sequences = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ConversionError, match="metric 'mse': expected one of kl, logits"):
        measure_statistics(network, matrices, sequences, "mse")
    with torch.no_grad():
        network.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ConversionError, match="its gradient is not finite"):
        measure_statistics(network, matrices, sequences, "logits")
    with pytest.raises(ConversionError, match="logits are not finite"):
        measure_statistics(network, matrices, sequences, "kl")


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensors that `work` had at once, beyond those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    assert changes
    return int(np.cumsum([size for _, size in sorted(changes, key=lambda item: item[0])]).max())


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_peak_memory_is_the_model_activations_and_one_blocks_gradients(
    architecture: str, build_network: Any
) -> None:
    """Peak ≤ (model + forward pass with its activations + one block's gradients) × 1.1."""
    network = build_network(
        architecture,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=16,
    )
    matrices = find_matrices(network)
    sequences = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(1))
    network.requires_grad_(False)
    for matrix in matrices:
        matrix.parameter.requires_grad_(True)

    def forward() -> Any:
        return network(input_ids=sequences[:1], use_cache=False).logits

    model = 4 * sum(p.numel() for p in network.parameters())
    block = 4 * sum(p.numel() for p in network.model.layers[0].parameters())
    activations = peak_bytes(forward)
    lookups = 4 * 128**2  # one (K, K) moment for the embedding
    limit = (model + activations + block + lookups) * 1.1
    assert model + peak_bytes(lambda: forward().sum().backward()) > limit  # gradients kept: over
    for parameter in network.parameters():
        parameter.grad = None
    assert model + peak_bytes(lambda: measure_statistics(network, matrices, sequences)) <= limit


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "opt"])
def test_sums_by_blocks_are_those_of_whole_backward_passes(
    architecture: str, build_network: Any
) -> None:
    network = build_network(architecture).double()
    matrices = [m for m in find_matrices(network) if not m.rows_are_tokens]
    sequences = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    found = measure_statistics(network, matrices, sequences, "kl", 5)
    totals = {m.name: torch.zeros_like(m.weight) for m in matrices}
    watched = Watched(network, matrices)
    for s, ids in enumerate(sequences):
        logits = network(input_ids=ids[None], use_cache=False).logits
        drawn = output_gradient(logits, "kl", generator_of(5, s)).gradient
        for name, squares in watched.squares((logits * drawn).sum()).items():
            totals[name] += squares / sequences.numel()
    for name, total in totals.items():
        rows, columns = total.sum(1).numpy(), total.sum(0).numpy()
        np.testing.assert_allclose(found[name].row_sensitivity, rows, rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose(found[name].column_sensitivity, columns, rtol=1e-6, atol=1e-15)


def test_a_sequence_draws_the_same_whatever_comes_before_it(build_network: Any) -> None:
    first, second = (generator_of(0, s) for s in (0, 1))
    again = generator_of(0, 1)
    draws = [torch.rand(4, generator=g) for g in (first, second, again)]
    assert torch.equal(draws[1], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_measuring_by_blocks_needs_a_block_not_the_network(
    save_network: Any,
) -> None:
    folder = save_network("llama", num_hidden_layers=16, hidden_size=128, intermediate_size=256)
    loaded = load_model(
        open_source(str(folder)), ConversionOptions.of(bits=4.0, dtype=torch.float64)
    )
    sequences = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))
    whole = 8 * sum(p.numel() for p in loaded.hollow.parameters())
    peak = peak_bytes(lambda: measure_statistics(loaded.streamed, loaded.matrices, sequences))
    assert peak < whole / 4


def hessians_of(measuring: Measuring, matrices: list[Any]) -> dict[str, torch.Tensor]:
    found = {matrix.name: measuring.hessian(matrix.name) for matrix in matrices}
    return {name: hessian for name, hessian in found.items() if hessian is not None}


@pytest.mark.parametrize("architecture", ["llama-tied", "opt"])
def test_rounds_give_the_same(architecture: str, build_network: Any) -> None:
    network = build_network(architecture)
    matrices = find_matrices(network)
    sequences = torch.randint(3, 96, (5, 12), generator=torch.Generator().manual_seed(1))
    steps: list[tuple[int, int]] = []
    found = []
    for rounds in (1, 2, 5):
        progress = lambda done, total: steps.append((done, total))  # noqa: E731
        measuring = Measuring(
            network, matrices, sequences, "kl", 3, progress, hessians=True, rounds=rounds
        )
        found.append((measuring.statistics(), hessians_of(measuring, matrices)))
    assert steps == [(i, 30) for i in range(1, 31)] * 3
    (one, hessians), *others = found
    for statistics, others_hessians in others:
        for matrix in matrices:
            for field in FIELDS:
                a, b = (getattr(s[matrix.name], field) for s in (one, statistics))
                np.testing.assert_array_equal(a, b)
            assert torch.equal(others_hessians[matrix.name], hessians[matrix.name])


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_a_network_in_one_piece_is_measured_alike(
    architecture: str, save_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))

    def measured() -> tuple[int, dict[str, Any], dict[str, torch.Tensor]]:
        source = open_source(str(save_network(architecture)))
        loaded = load_model(source, ConversionOptions.of(bits=4.0))
        matrices = loaded.matrices
        measuring = Measuring(loaded.streamed, matrices, sequences, "kl", 2, hessians=True)
        statistics = measuring.statistics()
        return len(loaded.streamed.blocks), statistics, hessians_of(measuring, matrices)

    blocks, expected, hessians = measured()
    monkeypatch.setattr("cvxq_converter.source.exactness.find_blocks", lambda _: [])
    none, found, moments = measured()
    assert (blocks, none) == (2, 0)
    for name, statistics in expected.items():
        for field in FIELDS:
            a, b = getattr(statistics, field), getattr(found[name], field)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-7 * float(np.abs(a).max()))
        torch.testing.assert_close(moments[name], hessians[name], rtol=1e-4, atol=1e-6)
