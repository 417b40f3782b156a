"""How much the output feels each weight: one backward pass per sequence, with random signs.

For one sequence with tokens t, let s_t be a random vector over the vocabulary with known second
moment. Back-propagating Σ_t ε_t s_t (ε_t = ±1, independent) gives gradients whose squares have the
mean Σ_t E[(∂(s_t·z_t)/∂·)²], because the cross terms between tokens vanish in expectation. So a
single pass estimates what would otherwise take one pass per token and component.

    metric "kl"      s_t = onehot(y_t) − softmax(z_t) with y_t drawn from softmax(z_t): squares
                     estimate the diagonal Fisher information F of the sequence. KL ≈ ½ Σ F_ii δ_i².
    metric "logits"  s_t = a ±1 for every component of the logits z_t: squares estimate
                     Σ_v (∂z_tv/∂w)², the squared logit error per squared weight error.

A matrix multiplies x_t at every token, and the gradient g_t of what comes out comes back. What the
output feels of weight (n, k) is taken to be Σ_t g_tn² x_tk², as if every token had the weight for
itself. Sums over rows and columns of that need no gradient of the weights, which would be a third
of the way back (docs/decisions/0021-no-gradients-of-weights.md).

Everything is reported per token: divided by the number of tokens, averaged over the sequences.

The network runs by blocks (`source.blocks`): forward with the inputs of all blocks kept, then back,
each block recomputed and differentiated for all sequences in turn. Every sequence draws from a
generator of its own, so that the order of the work plays no part. What lies between two blocks, in
either direction, and the sums of a block are steps of a journal, each made from those before it.

Tokens are too many for any calibration to meet them all. So the rows of an output head take the
expected square of their gradient (`head`), and those of a table what its look-ups felt, shared out
by how often the network expects each token (`lookups`). The gradients of a tied matrix's two uses
are hardly correlated, and their squares add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cvxq_converter.errors import ConversionError
from cvxq_converter.journal import Journal
from cvxq_converter.measure.gathering import FRONT, Gathering
from cvxq_converter.measure.head import head_pass, output_gradient
from cvxq_converter.measure.seeds import generator_of
from cvxq_converter.measure.sums import (
    MatrixStatistics,
    Totals,
    finished,
    hessian_of,
    laps,
    shards_of,
)
from cvxq_converter.source.blocks import More, Streamed
from cvxq_converter.source.exactness import as_streamed
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done

METRICS = ("kl", "logits")


@dataclass(frozen=True)
class Between:
    """What lies between two blocks on the way forward, for some sequences.

    hidden: (S, L, h). more: what blocks so far returned beside it.
    """

    hidden: Tensor
    more: More


@dataclass(frozen=True)
class Felt:
    """What comes back between two blocks, for some sequences.

    gradient: (S, L, h), of what lies there; None for a network in one piece. cuts: gradients of
    what the blocks after that place were given beside it, by block and sequence. more: of the head,
    for what comes before the blocks.
    """

    gradient: Tensor | None
    cuts: dict[tuple[int, int], list[Tensor]]
    more: More = field(default_factory=dict)


SoFar = Mapping[str, Totals] | None  # sums by matrix that grow; None where they do not matter
Finding = tuple[Felt, Mapping[str, Totals]]  # what a stage hands on, and its sums by matrix


def measure_statistics(
    network: Any,
    matrices: list[Matrix],
    sequences: Tensor,
    metric: str = "kl",
    seed: int = 0,
    progress: Done | None = None,
) -> dict[str, MatrixStatistics]:
    """What `Measuring` finds, without second moments."""
    return Measuring(network, matrices, sequences, metric, seed, progress).statistics()


class Measuring:
    """Squared gradients of weights and of outputs, and moments of inputs, of every matrix.

    network: whole, or by blocks. sequences: (S, L) int64 tokens. hessians: gather second moments of
    the inputs on the way. rounds: so many times some of the sequences go forward and back, which
    takes less disk and gives the same. Same arguments and machine, same result.
    Raises ConversionError if a gradient overflows the network's dtype.
    """

    def __init__(
        self,
        network: Any,
        matrices: list[Matrix],
        sequences: Tensor,
        metric: str = "kl",
        seed: int = 0,
        progress: Done | None = None,
        *,
        hessians: bool = False,
        rounds: int = 1,
        journal: Journal | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ConversionError(f"metric {metric!r}: expected one of {', '.join(METRICS)}")
        self.streamed = as_streamed(network)
        self.matrices, self.sequences = matrices, sequences
        self.tokens = sequences.numel()
        self.metric, self.seed, self.hessians = metric, seed, hessians
        self.journal = journal or Journal()
        self._own = self.journal.own()
        shards = shards_of(len(sequences))
        step = -(-len(shards) // rounds)
        self.rounds = [shards[first : first + step] for first in range(0, len(shards), step)]
        self._blocks = len(self.streamed.blocks)  # also the number of the head's stage
        self._gathering = Gathering(self.streamed, matrices, sequences, hessians)
        self._progress = progress
        stages = self._gathering.stages
        self._left = {stage: {m.name for m in found} for stage, found in stages.items()}

    def statistics(self) -> dict[str, MatrixStatistics]:
        """By matrix name."""
        return self.journal.step("statistics", self._statistics, together=True)

    def parts(self) -> list[list[str]]:
        """Names of the matrices whose Hessians may be there together: all of them."""
        return [[matrix.name for matrix in self.matrices]]

    def hessian(self, name: str) -> Tensor | None:
        """H (K, K) float32 of a matrix, see `measure.hessian`; None where there is none."""
        return hessian_of(self._all_totals(name), *self.sequences.shape) if self.hessians else None

    def forget(self, name: str) -> None:
        """Give up the Hessian of a matrix, and the sums of a stage all of whose were given up."""
        for stage, left in self._left.items():
            left.discard(name)
            if not left:
                self.journal.drop(f"{len(self.rounds) - 1}.sums.{stage}")

    # --- steps ----------------------------------------------------------------------------------

    def _statistics(self) -> dict[str, MatrixStatistics]:
        with self._gathering.ready():
            for r in range(len(self.rounds)):
                for stage in self._gathering.stages:
                    self._totals(r, stage)
                    self._drop_before(r, stage)
        S, L = self.sequences.shape
        return {m.name: finished(self._all_totals(m.name), S, L) for m in self.matrices}

    def _drop_before(self, r: int, stage: int) -> None:
        """Give up what no stage after this one needs."""
        drop = self._own.drop
        self.journal.drop(f"{r - 1}.sums.{stage}")
        drop(f"{r}.forward.{stage}")
        if stage + 1 < self._blocks:
            drop(f"{r}.back.{stage + 1}")
        if stage == [*self._gathering.stages][-1]:
            drop(f"{r}.back.{self._blocks}", f"{r}.back.{stage}")

    def _between(self, r: int, i: int) -> Between:
        """The input of block i; of the head for the number of the blocks."""
        return self._own.step(f"{r}.forward.{i}", lambda: self._forward(r, i))

    def _felt(self, r: int, stage: int) -> Felt:
        """What comes back from a stage to the one before it."""
        return self._own.step(f"{r}.back.{stage}", lambda: self._back(r, stage, None)[0])

    def _totals(self, r: int, stage: int) -> Mapping[str, Totals]:
        """The sums of a stage, by matrix, up to a round."""

        def compute() -> Mapping[str, Totals]:
            so_far = self._totals(r - 1, stage) if r else {}
            felt, totals = self._back(r, stage, so_far)
            self._own.put(f"{r}.back.{stage}", felt)
            return totals

        return self.journal.step(f"{r}.sums.{stage}", compute, together=True)

    def _all_totals(self, name: str) -> Totals:
        """The sums of a matrix at the end; a tied one has some from either of its uses."""
        found: dict[str, Tensor] = {}
        for stage, matrices in self._gathering.stages.items():
            if any(m.name == name for m in matrices):
                part = self._totals(len(self.rounds) - 1, stage)[name]
                found = {**part, **{key: found[key] + part.get(key, 0) for key in found}}
        return found

    # --- stages ---------------------------------------------------------------------------------

    def _forward(self, r: int, i: int) -> Between:
        """From the input of the block before i, or from the tokens."""
        streamed, numbers = self.streamed, self._numbers(r)
        if i == 0:
            if not numbers:
                return Between(torch.empty(0), {})
            with self._gathering.ready():
                return Between(streamed.enter(self.sequences[numbers]), {})
        before = self._between(r, i - 1)
        after = _zeros_like(before.hidden, streamed)
        with self._gathering.ready(), streamed.filled(f"{streamed.names[i - 1]}."):
            streamed.more = dict(before.more)
            for n, s in enumerate(numbers):
                ids = self.sequences[s].to(streamed.device)
                streamed.advance(i - 1, n, ids, before.hidden, after)
                self._step(r, i - 1, n)
            return Between(after, dict(streamed.more))

    def _back(self, r: int, stage: int, so_far: SoFar) -> Finding:
        """Run a stage back; returns what it hands on, and its sums, which go on from `so_far`.

        With None there are none, and the other ranks need not take part.
        """
        with self._gathering.ready(), torch.enable_grad():
            if stage == self._blocks:
                return self._run_head(r, so_far)
            if stage == FRONT:
                return self._run_front(r, so_far)
            return self._run_block(r, stage, so_far)

    def _run_head(self, r: int, so_far: SoFar) -> Finding:
        """From the logits back to the output of the last block."""
        streamed, gathering, stage = self.streamed, self._gathering, self._blocks
        between = None
        for i in range(self._blocks + 1) if self._blocks else ():
            between = self._between(r, i)
        totals = gathering.begin(stage, so_far)
        gradient = None if between is None else _zeros_like(between.hidden, streamed)
        streamed.more = {} if between is None else dict(between.more)
        for n, ids in gathering.each(self.rounds[r], self.journal.ranks):
            leaf = None
            if between is not None:
                leaf = between.hidden[n][None].to(streamed.device).requires_grad_()
            with gathering.watching(stage):
                x = streamed.head_input(n, ids, leaf)
            generator = generator_of(self.seed, gathering.s, streamed.device)
            draw = partial(output_gradient, metric=self.metric, generator=generator)
            found = head_pass(streamed, n, ids, leaf, x, draw)
            gathering.add_head(ids, found)
            if x.requires_grad:
                x.backward(found.input_gradient)
            gathering.end_sequence()
            if leaf is not None and gradient is not None:
                assert leaf.grad is not None
                gradient[n] = leaf.grad[0]
            self._step(r, stage, n)
        return Felt(gradient, {}, dict(streamed.more)), totals

    def _run_block(self, r: int, i: int, so_far: SoFar) -> Finding:
        """From the output of block i back to its input."""
        streamed, gathering = self.streamed, self._gathering
        after, between = self._felt(r, i + 1), self._between(r, i)
        totals = gathering.begin(i, so_far)
        assert after.gradient is not None
        gradient = _zeros_like(between.hidden, streamed)
        cuts, streamed.more = dict(after.cuts), dict(between.more)
        with streamed.filled(f"{streamed.names[i]}."), gathering.watching(i):
            for n, ids in gathering.each(self.rounds[r], self.journal.ranks):
                call = streamed.call(i, n, ids)
                hidden = between.hidden[n][None].to(streamed.device).requires_grad_()
                out = streamed.run_block(i, n, call, hidden)
                out.backward(after.gradient[n][None].to(streamed.device))
                del out
                assert hidden.grad is not None
                gradient[n] = hidden.grad[0]
                if call.cuts:
                    cuts[i, n] = [
                        torch.zeros_like(cut) if cut.grad is None else cut.grad for cut in call.cuts
                    ]
                gathering.end_sequence()
                self._step(r, 2 * self._blocks - i, n)
        return Felt(gradient, cuts), totals

    def _run_front(self, r: int, so_far: SoFar) -> Finding:
        """From the input of the first block back to the embedding."""
        streamed, gathering = self.streamed, self._gathering
        felt, head = self._felt(r, 0), self._felt(r, self._blocks)
        totals = gathering.begin(FRONT, so_far)
        assert felt.gradient is not None
        streamed.more = dict(head.more)
        for n, ids in gathering.each(self.rounds[r], self.journal.ranks):
            with gathering.watching(FRONT):
                call = streamed.call(0, n, ids)
            outputs, gradients = [call.hidden], [felt.gradient[n][None].to(streamed.device)]
            for i in range(self._blocks):
                if (i, n) in felt.cuts:
                    outputs += (call if i == 0 else streamed.call(i, n, ids)).origins
                    gradients += felt.cuts[i, n]
            known = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
            if known:
                torch.autograd.backward([o for o, _ in known], [g for _, g in known])
            gathering.end_sequence()
            self._step(r, 2 * self._blocks + 1, n)
        return Felt(None, {}), totals

    def _numbers(self, r: int) -> list[int]:
        """The sequences of a round that are this rank's."""
        return [s for shard, _ in laps(self.rounds[r], self.journal.ranks) for s in shard]

    def _step(self, r: int, place: int, n: int) -> None:
        """A sequence went through one of the places: blocks, head, blocks, front."""
        places = 2 * self._blocks + 1 + bool(self._blocks)
        if self._progress is not None:
            first, end = self.rounds[r][0].start, self.rounds[r][-1].stop
            done = min(end - first, (n + 1) * self.journal.ranks.world)
            so_far = first * places + place * (end - first) + done
            self._progress(so_far, len(self.sequences) * places)


def _zeros_like(hidden: Tensor, streamed: Streamed) -> Tensor:
    return streamed.scratch.zeros(hidden.shape, hidden.dtype)
