"""Statistics of single experts, against autograd over transformers' stacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq_converter.job import convert, measure_model
from cvxq_converter.journal import Journal
from cvxq_converter.measure import experts as pooling
from cvxq_converter.measure.forward import InputHessians
from cvxq_converter.measure.hessian import Feedback, InverseFactor, effective_tokens
from cvxq_converter.measure.measurement import load_measurement
from cvxq_converter.measure.seeds import generator_of
from cvxq_converter.measure.statistics import Measuring, measure_statistics
from cvxq_converter.options import ConversionOptions
from cvxq_converter.preflight import preflight
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import load_model

Build = Callable[..., Any]
NAMES = {"Mixtral": ("w1", "w3", "w2"), "Qwen3Moe": ("gate_proj", "up_proj", "down_proj")}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_sums_are_those_of_the_stacks_gradients(
    family: str, build_mixture: Build, tmp_path: Path
) -> None:
    network = build_mixture(family)
    network.save_pretrained(tmp_path)
    loaded = load_model(open_source(str(tmp_path)), ConversionOptions.of(bits=4))
    sequences = torch.randint(3, 96, (1, 1))  # of several tokens squares are summed one by one
    found = measure_statistics(loaded.streamed, loaded.matrices, sequences, "logits")
    logits = network(sequences, use_cache=False).logits
    signs = torch.empty_like(logits)
    signs.bernoulli_(0.5, generator=generator_of(0, 0)).mul_(2).sub_(1)
    logits.backward(signs)
    stacks = network.model.layers[1].mlp.experts
    both, down = stacks.gate_up_proj.grad, stacks.down_proj.grad
    block = "block_sparse_moe" if family == "Mixtral" else "mlp"
    unseen = 0
    for expert in range(len(down)):
        wanted = (*both[expert].chunk(2), down[expert])
        for role, gradient in zip(NAMES[family], wanted, strict=True):
            stats = found[f"model.layers.1.{block}.experts.{expert}.{role}.weight"]
            squares = gradient.double().square().numpy()
            near = {"rtol": 1e-4, "atol": 1e-8}  # sums of up to 6, of float32 gradients
            np.testing.assert_allclose(stats.row_sensitivity, squares.sum(1), **near)
            np.testing.assert_allclose(stats.column_sensitivity, squares.sum(0), **near)
            routed = 1 if stats.routed_tokens is None else stats.routed_tokens.sum()  # None: all
            assert (routed == 0) == (not squares.any())
            assert np.count_nonzero(stats.token_weights) <= routed
            unseen += not squares.any()
    assert unseen  # one token comes to few of the experts


def test_hessians_are_of_the_tokens_that_came_and_help_each_other(
    build_mixture: Build, tmp_path: Path
) -> None:
    build_mixture("Mixtral").save_pretrained(tmp_path)
    loaded = load_model(open_source(str(tmp_path)), ConversionOptions.of(bits=4))
    sequences = torch.randint(3, 96, (2, 6))
    streamed, matrices = loaded.streamed, loaded.matrices
    measuring = Measuring(streamed, matrices, sequences, hessians=True)
    statistics = measuring.statistics()
    after = InputHessians(loaded, sequences, statistics)
    hessians = {m.name: measuring.hessian(m.name) for m in matrices}
    assert all(torch.equal(after.hessian(name), h) for name, h in hessians.items())
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in range(4)]
    inputs: list[torch.Tensor] = []
    network = loaded.network
    experts = network.model.layers[0].mlp.experts
    experts.get_submodule("0.gate_proj").register_forward_pre_hook(
        lambda _, given: inputs.append(given[0])
    )
    for sequence in sequences:
        network(sequence[None], use_cache=False)
    loaded.release()
    weights = statistics[names[0]].token_weights
    assert weights is not None
    felt = [torch.from_numpy(w[: len(x)]) for w, x in zip(weights, inputs, strict=True)]
    expected = sum((x * w[:, None]).T @ x for w, x in zip(felt, inputs, strict=True)) / 12
    torch.testing.assert_close(hessians[names[0]], expected)
    tokens = sum(int(statistics[name].routed_tokens.sum()) for name in names)  # type: ignore[union-attr]
    assert tokens == 2 * 12  # two of the four experts for each of twelve tokens
    share = pooling.PRIOR_TOKENS / tokens
    lent = share * sum(hessians[name] for name in names)
    feedback = Feedback(loaded, statistics, measuring)
    for name in (names[1], names[0], names[1]):  # whatever became a factor before
        own = statistics[name].token_weights
        assert own is not None
        known = effective_tokens(own) + pooling.PRIOR_TOKENS
        found, expected = feedback.factor(name), InverseFactor.of(hessians[name] + lent, known)
        assert found is not None
        torch.testing.assert_close(found.factor, expected.factor)


@pytest.mark.slow
def test_a_measurement_of_experts_serves_conversions(build_mixture: Build, tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "model.stats.safetensors"
    build_mixture("Mixtral", num_hidden_layers=1, hidden_size=64).save_pretrained(folder)
    options = ConversionOptions.of(bits=4, sequences=3, length=12, group_size=16)
    measure_model(str(folder), file, options)
    measurement = load_measurement(file)
    routed = measurement.statistics["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert routed.routed_tokens is not None
    assert routed.routed_tokens.shape == (len(routed.token_weights),)  # type: ignore[arg-type]
    assert measurement.statistics["lm_head.weight"].routed_tokens is None
    direct, reused = tmp_path / "direct.cvxq", tmp_path / "reused.cvxq"
    convert(str(folder), direct, options)
    convert(str(folder), reused, options, measurement=measurement)
    assert direct.read_bytes() == reused.read_bytes()


def test_hessians_come_in_parts_where_the_disk_is_small(
    build_mixture: Build, tmp_path: Path
) -> None:
    build_mixture("Mixtral").save_pretrained(tmp_path)
    loaded = load_model(open_source(str(tmp_path)), ConversionOptions.of(bits=4))
    sequences = torch.randint(3, 96, (2, 6))
    statistics = measure_statistics(loaded.streamed, loaded.matrices, sequences)
    whole = InputHessians(loaded, sequences, statistics)
    wanted = {m.name: whole.hessian(m.name) for m in loaded.matrices}
    room = 3 * 4 * max(m.weight.shape[1] for m in loaded.matrices) ** 2
    journal = Journal()
    apart = InputHessians(loaded, sequences, statistics, journal, room)
    assert sorted(name for part in apart.parts() for name in part) == sorted(wanted)
    factors = Feedback(loaded, statistics, whole).prepare(wanted)
    feedback = Feedback(loaded, statistics, apart, journal.within("factor"))
    assert len(feedback.parts) > len(wanted) / 4
    for part in [*feedback.parts, *feedback.parts]:  # as for one quantization after another
        assert sum(4 * loaded.originals[name].shape[1] ** 2 for name in part) <= room
        for name in part:
            assert torch.equal(apart.hessian(name), wanted[name])
        found = feedback.prepare(part)
        assert found.keys() == set(part)
        assert all(torch.equal(share, factors[name]) for name, share in found.items())
        feedback.release(part)
        for name in part:  # neither its Hessian nor its factor is there any more
            assert journal.lacking([f"factor.{name}"])
        assert len(journal.lacking([f"sums.{n}" for n in range(40)])) == 40


def test_a_small_disk_gives_the_same_file(build_mixture: Build, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_mixture("Mixtral", num_hidden_layers=2).save_pretrained(folder)
    options = ConversionOptions.of(
        bits=4, sequences=8, length=12, group_size=16, gain=0.5, disk=1 << 40
    )
    whole = preflight(open_source(str(folder)), options)
    less = options.having(disk=whole.scratch_bytes * 3 // 4)
    parts = preflight(open_source(str(folder)), less)
    assert whole.room is None
    assert parts.room is not None
    assert parts.scratch_bytes <= whole.scratch_bytes * 3 // 4
    files = []
    for n, chosen in enumerate((options, less)):
        files.append(tmp_path / f"{n}.cvxq")
        convert(str(folder), files[-1], chosen)
    assert files[0].read_bytes() == files[1].read_bytes()
