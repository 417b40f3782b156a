"""Where the loss of a conversion comes from, and what its calibration can tell.

    cvxq measure demo/model -o model.stats.safetensors
    python benchmarks/attribution.py demo/model model.stats.safetensors --text demo/evaluation.txt

The model is quantized once. Then the network runs with only some of its matrices quantized: the
tables of tokens, all others, each kind of matrix, each block; the KL of each stands beside what
was predicted for these matrices and depths. A second table says for each kind what the Hessians
are worth: how many tokens of equal weight they come from, the largest token's share of all
weights, and by how much feedback lowers the error of the outputs on sequences that were held back.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cvxq import evaluate
from cvxq_converter.allocate.allocation import GAUSSIAN_DISTORTION
from cvxq_converter.allocate.plan import MatrixPlan, make_plans
from cvxq_converter.allocate.prediction import group_costs
from cvxq_converter.job import Prepared, quantize_prepared
from cvxq_converter.journal import Journal
from cvxq_converter.measure.forward import InputHessians
from cvxq_converter.measure.hessian import effective_tokens
from cvxq_converter.measure.measurement import load_measurement
from cvxq_converter.measure.quality import divergence, make_reference, split_sequences
from cvxq_converter.options import ConversionOptions
from cvxq_converter.quantize.encode import encode_matrices
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.checkpoint import load_tokenizer, open_source
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Stages
from cvxq_format import Codebook, CompandedTensor, dequantize
from rates import prepared_from

Parts = dict[str, list[Matrix]]


def kind(matrix: Matrix) -> str:
    """The last part of a matrix's name that tells what it is for: `down_proj`."""
    return matrix.name.removesuffix(".weight").rsplit(".", 1)[-1]


def parts_of(prepared: Prepared) -> Parts:
    """Some matrices by what they are: tables, others, kinds, blocks; everything first."""
    matrices, names = prepared.loaded.matrices, prepared.loaded.streamed.names
    parts: Parts = {"everything": matrices}
    parts["tables of tokens"] = [m for m in matrices if m.rows_are_tokens]
    body = parts["all others"] = [m for m in matrices if not m.rows_are_tokens]
    for matrix in body:
        parts.setdefault(kind(matrix), []).append(matrix)
    for name in names:
        parts[name] = [m for m in body if m.module_name.startswith(f"{name}.")]
    return {name: part for name, part in parts.items() if part}


def predicted(
    prepared: Prepared, plans: list[MatrixPlan], depths: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Half the sum of squared sensitivity × squared error, by matrix."""
    return {
        plan.matrix.name: 0.5
        * float(
            (
                group_costs(plan, prepared.statistics)
                * GAUSSIAN_DISTORTION[depths[plan.matrix.name]]
            ).sum()
        )
        for plan in plans
    }


def losses(
    prepared: Prepared, result: Quantized, parts: Parts, windows: torch.Tensor
) -> Iterator[tuple[str, float]]:
    """KL on the windows (S, L) with only the matrices of each part quantized, biases included."""
    loaded = prepared.loaded
    biases = {
        m.name: loaded.hollow.get_submodule(m.input_module_name).bias
        for m in loaded.matrices
        if m.input_module_name is not None
    }
    loaded.restore()
    reference = make_reference(loaded.streamed, windows)
    for name, part in parts.items():
        chosen = {matrix.name for matrix in part}

        def weight(matrix: Matrix, chosen: set[str] = chosen) -> torch.Tensor:
            if matrix.name in chosen:
                return torch.from_numpy(dequantize(result.tensors[matrix.name], result.codebook))
            return loaded.originals[matrix.name]

        loaded.restore()
        for matrix in part:
            if biases.get(matrix.name) is not None:
                loaded.set_bias(matrix, biases[matrix.name].data)
        loaded.replace(weight)
        yield name, divergence(loaded.streamed, reference).mean
    loaded.restore()


def held_out_ratios(
    prepared: Prepared, result: Quantized, plans: list[MatrixPlan], options: ConversionOptions
) -> dict[str, float]:
    """tr(E H Eᵀ) with feedback over without, H of the sequences held back, by matrix."""
    loaded, allocation = prepared.loaded, result.allocation
    assert allocation is not None
    plain = encode_matrices(
        loaded, plans, allocation, options.method, lambda *_: None, None, Journal()
    )
    _, held = split_sequences(prepared.sequences)
    ones = np.ones(tuple(held.shape), np.float32)
    alike = {
        name: replace(stats, token_weights=ones, lookup_moment=None)
        for name, stats in prepared.statistics.items()
        if stats.token_weights is not None and stats.routed_tokens is None
    }
    hessians = InputHessians(loaded, held, alike)

    def error(matrix: Matrix, tensor: CompandedTensor, codebook: Codebook) -> float:
        made = torch.from_numpy(dequantize(tensor, codebook))
        off, hessian = made - loaded.originals[matrix.name].float(), hessians.hessian(matrix.name)
        assert hessian is not None
        return float(((off @ hessian) * off).sum())

    return {
        matrix.name: error(matrix, result.tensors[matrix.name], result.codebook)
        / max(error(matrix, without, plain.codebook), 1e-30)
        for matrix, without in zip(loaded.matrices, plain.tensors, strict=True)
        if matrix.name in alike
    }


def windows_of(model: str, text: str, count: int, length: int) -> torch.Tensor:
    """Tokens (S, L) of the beginning of a text."""
    tokenizer = load_tokenizer(open_source(model))
    found = evaluate.windows(evaluate.token_ids(tokenizer, text), length)[:count]
    return torch.stack([torch.from_numpy(window.ids) for window in found])


def report(
    prepared: Prepared, options: ConversionOptions, windows: torch.Tensor, say: Callable[..., None]
) -> None:
    """Quantize, take apart, and print both tables."""
    loaded, parts = prepared.loaded, parts_of(prepared)
    assert prepared.feedback is not None
    plans = make_plans(loaded, prepared.feedback.foresee(prepared.statistics), options.method)
    result = quantize_prepared(prepared, options, Stages(None))
    assert result.allocation is not None
    depths = {m.name: d for m, d in zip(loaded.matrices, result.allocation.depths, strict=True)}
    expected = predicted(prepared, plans, depths)
    say("| quantized | weights | mean depth | KL expected | KL found |")
    say("|---|---:|---:|---:|---:|")
    for name, loss in losses(prepared, result, parts, windows):
        weights = sum(m.weight.numel() for m in parts[name])
        bits = sum(m.weight.numel() * depths[m.name].mean() for m in parts[name]) / weights
        share = sum(expected[m.name] for m in parts[name])
        say(f"| {name} | {weights:,} | {bits:.2f} | {share:.4f} | {loss:.4f} |")
    tokens = set(prepared.sequences.flatten().tolist())
    for matrix in parts.get("tables of tokens", []):
        rows = prepared.statistics[matrix.name].row_sensitivity
        unseen = np.array([row not in tokens for row in range(len(rows))])
        say(
            f"\n{matrix.name}: {unseen.mean():.1%} of the rows are of tokens that calibration does "
            f"not have; they have {rows[unseen].sum() / rows.sum():.1%} of its sensitivity."
        )
    ratios = held_out_ratios(prepared, result, plans, options)
    say("\n| kind | effective tokens | largest token's share | error with feedback over without |")
    say("|---|---:|---:|---:|")
    for name, part in parts.items():
        felt = [prepared.statistics[m.name].token_weights for m in part]
        known = [w for w in felt if w is not None]
        if name in loaded.streamed.names or not known:
            continue
        kept = [ratios[m.name] for m in part if m.name in ratios]
        worst = f"{statistics.median(kept):.3f}, at most {max(kept):.3f}" if kept else ""
        tokens_known = statistics.median(effective_tokens(w) for w in known)
        largest = max(float(w.max() / max(w.sum(), 1e-30)) for w in known)
        say(f"| {name} | {tokens_known:.0f} | {largest:.1%} | {worst} |")


def main() -> None:
    """Print Markdown tables of losses and of what Hessians are worth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    measurement = load_measurement(arguments.statistics)
    measured = {n: v for n, v in measurement.record.options.items() if n != "dtype"}
    options = ConversionOptions.of(bits=arguments.bits, **measured)
    prepared = prepared_from(arguments.model, measurement, options)
    text = arguments.text.read_text("utf-8")
    windows = windows_of(arguments.model, text, arguments.windows, arguments.length)
    report(prepared, options, windows, print)


if __name__ == "__main__":
    main()
