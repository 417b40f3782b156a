"""What a trellis gains over scalar levels in the same groups: squared error, and KL at equal rates.

    python benchmarks/trellis.py
    python benchmarks/trellis.py --model demo/model --text text.txt --bits 2.3 --bits 3.3

The first prints squared errors on Gaussian data. The second converts a model, keeps the depths and
scales of all its groups, and codes the dense depths in other ways, all with error feedback. A
code takes as many bits whichever way, so the rates are the same but for the tables of the codebook
(under 0.001 bits per weight of the demo model). docs/decisions/0007 has the results.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ablation import Bench, divergence
from cvxq_converter.allocate.plan import MatrixPlan, make_plans
from cvxq_converter.job import quantize_prepared
from cvxq_converter.measure.hessian import InverseFactor
from cvxq_converter.measure.quality import divergence as loss
from cvxq_converter.quantize.companding import fit_levels
from cvxq_converter.quantize.gain import EXPONENTS, shrinkage_ratios
from cvxq_converter.quantize.search import Tables, make_grid, search_scales
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Stages
from cvxq_format import Codebook, CompandedTensor
from torch import Tensor
from trellis_codes import (
    DENSE,
    Code,
    Computed,
    Encoded,
    Ungerboeck,
    encode,
    encode_plain,
    histogram,
    nearest,
)

SAMPLES, COLUMNS = 1 << 15, 256  # that levels are fitted to, as so many to a row
LEAST_SAMPLES = 1 << 12
MEMORIES, WINDOWS = (2, 3, 6), (10,)


class Part:
    """One quantized matrix, clusters padded with zeros, columns in stored order: by falling term.

    weights: (C, G, K) in units of the grid; shares: (C, G), of each row in the error; depths:
    (C, K); factor: U of `InverseFactor` for this order.
    """

    def __init__(
        self,
        plan: MatrixPlan,
        original: Tensor,
        tensor: CompandedTensor,
        codebook: Codebook,
        factor: InverseFactor,
    ) -> None:
        assert tensor.column_terms is not None
        order = np.argsort(-tensor.column_terms[0].astype(np.int64), kind="stable")
        self.order, clustering = torch.from_numpy(order), plan.clustering
        self.grid = make_grid(*plan.moments, codebook, with_means=plan.with_means)
        self.unit = max(float(self.grid.unit), 1e-38)
        self.tables = Tables.of(codebook, torch.device("cpu"))
        C, G, N = clustering.clusters, int(clustering.cluster_rows.max()), len(plan.row_weights)
        within = np.arange(N) - np.repeat(clustering.bounds[:-1], clustering.cluster_rows)
        slots = np.repeat(np.arange(C), clustering.cluster_rows) * G + within
        self.slots = torch.from_numpy(slots)
        self.rows = torch.from_numpy(clustering.permutation)
        self.weights = torch.zeros(C * G, len(order))
        self.weights[self.slots] = original.float()[self.rows][:, self.order] / self.unit
        self.weights = self.weights.view(C, G, -1)
        shares = torch.zeros(C * G)
        shares[self.slots] = torch.from_numpy(plan.row_weights)
        self.shares = shares.view(C, G)
        self.depths = tensor.depths[0][:, order]
        self.factor = reordered(factor, self.order)

    def fit_group(self, column: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (C, 1) of least squared error with scalar levels."""
        shared = self.shares / self.shares.sum(1, keepdim=True) * weights
        moments = shared.sum(1)[None], (shared * weights).sum(1)[None]
        depths = torch.from_numpy(self.depths[:, column].astype(np.int64))[None]
        found = search_scales(
            weights[None], self.shares, depths, moments, self.tables, self.grid, True
        )
        scale = self.grid.scales[found.scale[0]]
        return scale[:, None], (scale * found.mean[0] * float(self.grid.mean_step))[:, None]

    def samples(self, depth: int) -> Tensor:
        """The weights of one depth at unit scale, flat, each group on its own."""
        found = []
        for column in range(self.weights.shape[2]):
            clusters = self.depths[:, column] == depth
            if clusters.any():
                weights = self.weights[..., column]
                scale, shift = self.fit_group(column, weights)
                unit = (weights - shift) / scale.clamp_min(1e-30)
                used = torch.from_numpy(clusters)[:, None] & (self.shares > 0) & (scale > 0)
                found.append(unit[used])
        return torch.cat(found) if found else torch.empty(0)

    def encode(self, tables: list[Tensor], code: Code | None) -> Encoded:
        """Quantize with feedback."""
        return encode(self.weights, self.depths, self.fit_group, tables, code, self.factor)

    def dense(self, coded: Encoded, gains: Tensor) -> Tensor:
        """The matrix (N, K) as in the network; gains: (9,) by depth."""
        values = coded.quantized * gains[self.depths.astype(np.int64)][:, None]
        stored = (values + coded.shift[:, None]).flatten(0, 1)[self.slots] * self.unit
        dense = torch.empty_like(stored)
        dense[self.rows[:, None], self.order] = stored
        return dense

    def sums(self, coded: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """(9,) ⟨w, w⟩ and ⟨w, wq⟩ by depth."""
        deep, filled = self.depths.ravel(), (self.shares > 0)[..., None]
        products = (coded.moved.square(), coded.moved * coded.quantized)
        energy, projection = (
            np.bincount(deep, (p * filled).sum(1).flatten(), minlength=9) for p in products
        )
        return energy * self.unit**2, projection * self.unit**2


def reordered(factor: InverseFactor, order: Tensor) -> Tensor:
    """The factor U (K, K) of the same Hessian, its columns in another order."""
    upper = torch.linalg.inv(factor.factor.double())
    hessian = torch.empty_like(upper)
    hessian[factor.order[:, None], factor.order] = upper @ upper.T
    moved = hessian[order][:, order]
    root = torch.linalg.cholesky(moved.flip(0, 1)).flip(0, 1)
    return torch.linalg.inv(root).float()


class Comparison:
    """One model at one rate: the depths and scales of a conversion, coded in several ways."""

    def __init__(self, bench: Bench, bits: float) -> None:
        options = bench.options.having(bits=bits, gain=0.0)
        self.bench, self.prepared = bench, bench.prepared(options)
        feedback, loaded = self.prepared.feedback, bench.loaded
        assert feedback is not None
        untuned = replace(self.prepared, lessons=[])
        result = quantize_prepared(untuned, options, Stages(None))
        self.tables = [torch.zeros(1), *(torch.from_numpy(t) for t in result.codebook.levels)]
        self.parts = {}
        plans = make_plans(loaded, self.prepared.statistics, options.method)
        for matrix, plan in zip(loaded.matrices, plans, strict=True):
            factor = feedback.factor(matrix.name)
            assert factor is not None
            original, tensor = loaded.originals[matrix.name], result.tensors[matrix.name]
            self.parts[matrix.name] = Part(plan, original, tensor, result.codebook, factor)

    def fit(self, code: Code) -> None:
        """Fit the levels of the dense depths to the weights that have them."""
        random = torch.Generator().manual_seed(0)
        for depth in DENSE:
            samples = torch.cat([p.samples(depth) for p in self.parts.values()])
            if len(samples) < LEAST_SAMPLES:
                raise SystemExit(f"{len(samples)} weights of depth {depth}, too few to fit levels")
            chosen = torch.randperm(len(samples), generator=random)[:SAMPLES]
            rows = len(chosen) // COLUMNS
            code.fit(depth, samples[chosen[: rows * COLUMNS]].view(rows, COLUMNS))

    def kl(self, code: Code | None) -> str:
        """KL on the text with the gain that is best on the calibration sequences."""
        coded = {n: p.encode(self.tables, code) for n, p in self.parts.items()}
        sums = [part.sums(coded[name]) for name, part in self.parts.items()]
        ratios = torch.from_numpy(shrinkage_ratios(*zip(*sums, strict=True))).float()
        best = min(EXPONENTS, key=lambda p: self._loss(coded, ratios**p))
        self._install(coded, ratios**best)
        with self.bench.loaded.whole() as network:
            found = divergence(network, self.bench.original, self.bench.windows)
        return f"{found.kl.mean:.4f} ± {found.kl.standard_error:.4f} (p = {best:g})"

    def _loss(self, coded: dict[str, Encoded], gains: Tensor) -> float:
        self._install(coded, gains)
        assert self.prepared.choosing is not None
        return loss(self.bench.loaded.streamed, self.prepared.choosing).mean

    def _install(self, coded: dict[str, Encoded], gains: Tensor) -> None:
        def dense(matrix: Matrix) -> Tensor:
            return self.parts[matrix.name].dense(coded[matrix.name], gains)

        self.bench.loaded.replace(dense)


def codes() -> dict[str, Code]:
    """The codes that are compared."""
    made: dict[str, Code] = {f"table, {1 << m} states": Ungerboeck(m) for m in MEMORIES}
    return made | {f"computed, window {bits}": Computed(bits) for bits in WINDOWS}


def squared_errors(samples: int) -> None:
    """Print the mean squared errors on Gaussian data of unit variance."""
    random = torch.Generator().manual_seed(0)
    fitting = torch.randn(samples // COLUMNS, COLUMNS, generator=random)
    judging = torch.randn(samples // COLUMNS, COLUMNS, generator=random)
    print("| bits | code | squared error | gain, dB | gain, bits |\n|---|---|---:|---:|---:|")
    for depth in DENSE:
        table = torch.from_numpy(fit_levels(histogram(fitting), depth))
        scalar = float((judging - nearest(judging, table)).square().mean())
        print(f"| {depth} | scalar | {scalar:.5f} | | |", flush=True)
        for name, code in codes().items():
            code.fit(depth, fitting)
            error = float((judging - encode_plain(judging, depth, code)).square().mean())
            octaves = math.log2(scalar / error)
            gains = f"{octaves * 10 * math.log10(2):.2f} | {octaves / 2:.3f}"
            print(f"| {depth} | {name} | {error:.5f} | {gains} |", flush=True)


def main() -> None:
    """Print one table or the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a model folder; without it, squared errors are printed")
    parser.add_argument("--text", type=Path, help="to judge KL on")
    parser.add_argument("--bits", type=float, action="append", help="default: 2.3, 3.3 and 4.3")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the Gaussian data")
    args = parser.parse_args()
    if args.model is None:
        squared_errors(args.samples)
        return
    bench = Bench(args.model, args.text.read_text("utf-8"), (args.sequences, None))
    for bits in args.bits or [2.3, 3.3, 4.3]:
        comparison = Comparison(bench, bits)
        print(f"| {bits:g} | scalar | {comparison.kl(None)} |", flush=True)
        for name, code in codes().items():
            comparison.fit(code)
            print(f"| {bits:g} | {name} | {comparison.kl(code)} |", flush=True)


if __name__ == "__main__":
    main()
