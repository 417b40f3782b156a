"""Sums over gradients and inputs of one matrix, all but the second moments kept in float64.

A gradient is squared a bounded piece at a time, so that no second copy of it is ever in memory.

Floating-point sums depend on their order. Sequences are dealt to a fixed number of shards; each
shard is summed on its own, and the shards in their order. So it makes no difference who sums a
shard, and when.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.head import HeadPass
from cvxq_converter.measure.lookups import row_squares
from cvxq_converter.ranks import Ranks
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.source.scratch import Scratch

SHARDS = 8
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # weights squared at once, in float64


@dataclass(frozen=True)
class MatrixStatistics:
    """Sensitivities of one matrix (outputs N, inputs K), per token.

    row_sensitivity[n] = Σ_k of the squared gradients of the weights / tokens; columns alike with
    Σ_n.
    Evidence counts sequences; input_mean is None for a matrix that multiplies no input.
    token_weights[s, t] = Σ_n of the squared gradient of output n at that token. lookup_moment =
    Σ g gᵀ / tokens over what a table's look-ups felt. Each is None where there is no such use.
    routed_tokens: how many tokens of each sequence came to an expert, the others' weights being 0
    at the end; None for a matrix that all tokens come to.
    """

    row_sensitivity: NDArray[np.float64]  # (N,)
    column_sensitivity: NDArray[np.float64]  # (K,)
    row_evidence: NDArray[np.int64]  # (N,)
    column_evidence: NDArray[np.int64]  # (K,)
    input_mean: NDArray[np.float32] | None  # (K,)
    input_second_moment: NDArray[np.float32] | None  # (K,)
    sequences: int
    token_weights: NDArray[np.float32] | None = None  # (S, L)
    lookup_moment: NDArray[np.float32] | None = None  # (K, K)
    routed_tokens: NDArray[np.int64] | None = None  # (S,)


Statistics = Mapping[str, MatrixStatistics]  # by matrix name
Totals = Mapping[str, Tensor]  # of one matrix, as in `MatrixSums`


def _row_chunks(gradient: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, squares in float64) of a (N, K) gradient, a bounded piece at a time."""
    rows = max(1, _CHUNK.get(gradient.device.type, 1 << 20) // gradient.shape[1])
    for start in range(0, gradient.shape[0], rows):
        piece = slice(start, min(start + rows, gradient.shape[0]))
        yield piece, gradient[piece].to(torch.float64).square_()


def laps(shards: list[range], ranks: Ranks) -> Iterator[tuple[range, int]]:
    """Yield this rank's shard, or an empty one, and how many ranks have one, until all are done."""
    for first in range(0, len(shards), ranks.world):
        lap = shards[first : first + ranks.world]
        yield lap[ranks.rank] if ranks.rank < len(lap) else range(0), len(lap)


def shards_of(sequences: int) -> list[range]:
    """The numbers of the sequences in each shard, none of them empty."""
    count = min(SHARDS, sequences)
    bounds = [sequences * k // count for k in range(count + 1)] if count else [0]
    return [range(a, b) for a, b in pairwise(bounds)]


class MatrixSums:
    """What is added up of one matrix (N, K), over some of S sequences of L tokens each.

    totals, by name: rows (N,), columns (K,) and, unless its rows are of tokens, how many sequences
    felt each of them; of what it multiplies, the sum and the squares (K,), the tokens by sequence
    (S,), and token_weights (S, L), how much the loss feels its outputs there; of a table, looked_up
    (N,) and expected (N,), f and x of `lookups`, and lookups (K, K), Σ g gᵀ over the rows that were
    looked up; hessian (K, K), Σ w x xᵀ / tokens, both in float32 and in scratch files. An expert's
    tokens are those that came to it, in their order; after them its weights are 0.
    """

    def __init__(self, matrix: Matrix, S: int, L: int, scratch: Scratch, hessian: bool) -> None:
        N, K = matrix.weight.shape
        self.name, self._tokens = matrix.name, S * L
        device = matrix.parameter.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.sequence_rows, self.sequence_columns = zeros(N), zeros(K)
        self.totals = {"rows": zeros(N), "columns": zeros(K)}
        if not matrix.rows_are_tokens:
            self.totals["row_evidence"] = zeros(N, dtype=torch.int64)
            self.totals["column_evidence"] = zeros(K, dtype=torch.int64)
        if matrix.input_module_name is not None:
            self.totals |= {
                "inputs": zeros(K),
                "input_squares": zeros(K),
                "tokens": torch.zeros(S, dtype=torch.int64),
                "token_weights": torch.zeros(S, L),
            }
        space = scratch.zeros if device.type == "cpu" else partial(torch.zeros, device=device)
        if hessian and matrix.input_module_name is not None:
            self.totals["hessian"] = space((K, K), dtype=torch.float32)
        if matrix.kind == "embedding":
            self.totals |= {"looked_up": zeros(N), "expected": zeros(N)}
            self.totals["lookups"] = space((K, K), dtype=torch.float32)

    def zeros(self, scratch: Scratch) -> dict[str, Tensor]:
        """Totals of nothing so far, on the CPU."""
        return {name: scratch.zeros(t.shape, t.dtype) for name, t in self.totals.items()}

    # --- one sequence ---------------------------------------------------------------------------

    def add_lookups(self, rows: Tensor, gradient: Tensor) -> None:
        """Take the gradients (U, K) of the rows (U,) that one sequence looked up."""
        for piece, squares in _row_chunks(gradient):
            self.totals["looked_up"][rows[piece]] += squares.sum(1)
            self.sequence_columns += squares.sum(0)
        self.totals["lookups"] += gradient.float().T @ gradient.float()

    def add_head(self, s: int, found: HeadPass) -> None:
        """Take what sequence s left of the output layer."""
        self.add_inputs(s, found.inputs)
        self.sequence_rows += found.rows
        self.sequence_columns += (found.weights @ found.inputs.float().square()).double()
        weights = self.totals["token_weights"][s]
        weights.copy_(found.weights)
        self.add_moment(found.inputs, weights)

    def add_inputs(self, s: int, inputs: Tensor) -> None:
        """Take what sequence s brings, (M, K)."""
        rows = inputs.detach()
        self.totals["inputs"] += rows.sum(0, dtype=torch.float64)
        self.totals["input_squares"] += rows.float().square().sum(0, dtype=torch.float64)
        self.totals["tokens"][s] += len(rows)

    def add_felt(self, s: int, inputs: Tensor, gradient: Tensor) -> None:
        """Take the gradient (M, N) of the outputs for the inputs (M, K) of sequence s.

        The square of a weight's gradient at one token, g_n x_k, is g_n² x_k²: sums over rows and
        columns need no gradient of the weights.
        """
        wide = torch.promote_types(gradient.dtype, torch.float32)
        felt, squares = gradient.to(wide).square(), inputs.to(wide).square()
        norm = felt.sum(-1)
        self.sequence_rows += squares.sum(-1) @ felt
        self.sequence_columns += norm @ squares
        weights = self.totals["token_weights"][s]
        weights[: len(norm)] = norm.float()
        self.add_moment(inputs, weights)

    def add_moment(self, inputs: Tensor, weights: Tensor) -> None:
        """Take inputs (M, K) with their weights (L,), of which those after M are of no token."""
        if "hessian" in self.totals:
            rows = inputs.float()
            share = weights[: len(rows)].to(rows) / self._tokens
            self.totals["hessian"] += (rows * share[:, None]).T @ rows

    def end_sequence(self) -> None:
        """Close a sequence."""
        if not torch.isfinite(self.sequence_columns.sum()):
            raise ConversionError(
                f"{self.name}: its gradient is not finite; use --dtype bfloat16 or float32"
            )
        totals = self.totals
        if "row_evidence" in totals:
            totals["row_evidence"] += self.sequence_rows > 0
            totals["column_evidence"] += self.sequence_columns > 0
        totals["rows"] += self.sequence_rows
        totals["columns"] += self.sequence_columns
        self.sequence_rows.zero_()
        self.sequence_columns.zero_()

    def move_to(self, totals: Mapping[str, Tensor], ranks: Ranks, count: int) -> None:
        """Add what the first `count` ranks have of a shard each to the first one's `totals`."""
        for name, part in self.totals.items():
            ranks.add_in_order(totals[name], part.cpu(), count)
            part.zero_()


def hessian_of(totals: Totals, sequences: int, length: int) -> Tensor | None:
    """H (K, K) float32 from sums over all sequences, see `hessian`; None for none of its terms."""
    hessian, lookups = totals.get("hessian"), totals.get("lookups")
    if lookups is not None:
        felt = lookups / (sequences * length)
        return felt if hessian is None else hessian + felt
    return hessian


def finished(totals: Totals, sequences: int, length: int) -> MatrixStatistics:
    """Turn sums over all sequences into means per token."""
    tokens = sequences * length
    values = {name: total.cpu() for name, total in totals.items() if name != "hessian"}
    came = values.get("tokens", torch.zeros(0, dtype=torch.int64))
    seen = int(came.sum())
    rows, columns = values["rows"], values["columns"]
    if "looked_up" in values:
        rows = rows + row_squares(values["looked_up"], values["expected"], tokens)
    # Rows of tokens are all known, be it from what the network expects of them.
    row_evidence = values.get("row_evidence", sequences * (rows > 0))
    column_evidence = values.get("column_evidence", sequences * (columns > 0))
    return MatrixStatistics(
        row_sensitivity=(rows / tokens).numpy(),
        column_sensitivity=(columns / tokens).numpy(),
        row_evidence=row_evidence.numpy(),
        column_evidence=column_evidence.numpy(),
        input_mean=(values["inputs"] / seen).float().numpy() if seen else None,
        input_second_moment=(values["input_squares"] / seen).float().numpy() if seen else None,
        sequences=sequences,
        token_weights=values["token_weights"].numpy() if "tokens" in values else None,
        lookup_moment=(values["lookups"] / tokens).numpy() if "lookups" in values else None,
        routed_tokens=came.numpy() if "tokens" in values and seen != tokens else None,
    )
