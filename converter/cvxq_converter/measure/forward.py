"""Hessians by a pass forward over the original, where sensitivities were measured before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvxq_converter.journal import Journal
from cvxq_converter.measure.statistics import FRONT, Between
from cvxq_converter.measure.sums import MatrixSums, Statistics, laps, shards_of
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix


@dataclass(frozen=True)
class _Run:
    """One stage run for all sequences, for the Hessians of some of its matrices."""

    stage: int
    matrices: list[Matrix]


class InputHessians:
    """The Hessians of all matrices that have statistics; it leaves the originals in the network.

    sequences: (S, L) int64, those that `statistics` were measured on. room: bytes of Hessians that
    may be there at once; a part of the matrices is then had at a time. None for all of them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sequences: Tensor,
        statistics: Statistics,
        journal: Journal | None = None,
        room: int | None = None,
    ) -> None:
        self._loaded, self._streamed = loaded, loaded.streamed
        self._sequences, self._statistics = sequences, statistics
        self.tokens = sequences.numel()
        self._journal = journal or Journal()
        self._own = self._journal.own()
        self._blocks = len(self._streamed.blocks)  # also the number of the head's stage
        self._room, self._is_gathered = room, False
        self._runs = [run for stage in self._order() for run in self._runs_of(stage, room)]
        self._run_of = {m.name: n for n, run in enumerate(self._runs) for m in run.matrices}
        self._left = [{matrix.name for matrix in run.matrices} for run in self._runs]

    def parts(self) -> list[list[str]]:
        """Names of the matrices whose Hessians may be there together, in the order to ask in."""
        parts = [[m.name for m in run.matrices if m.name in self._statistics] for run in self._runs]
        if self._room is None:
            return [[name for part in parts for name in part]]
        return [part for part in parts if part]

    def hessian(self, name: str) -> Tensor | None:
        """H (K, K) float32 of a matrix; None for one that nothing was measured of."""
        if name not in self._statistics:
            return None
        if self._room is None and not self._is_gathered:
            for n in range(len(self._runs)):
                self._moments(n)
            self._own.drop(f"forward.{self._blocks - 1}")
            self._is_gathered = True
        found = self._moments(self._run_of[name]).get(name)
        lookups = self._statistics[name].lookup_moment
        if lookups is None:
            return found
        felt = torch.from_numpy(lookups)
        return felt if found is None else found + felt

    def forget(self, name: str) -> None:
        """Give up the Hessian of a matrix, and the sums of a run all of whose were given up."""
        n = self._run_of[name]
        self._left[n].discard(name)
        if not self._left[n]:
            self._journal.drop(f"sums.{n}")

    def _order(self) -> range:
        """Stages on the way forward: what is before the blocks, they, the head."""
        return range(FRONT if self._blocks else 0, self._blocks + 1)

    def _runs_of(self, stage: int, room: int | None) -> Iterator[_Run]:
        """The matrices of a stage, pool by pool, as many together as there is room for."""
        mine = [m for m in self._loaded.matrices if self._stage_of(m) == stage]
        taken, size = list[Matrix](), 0
        for matrix in mine if room is None else sorted(mine, key=lambda m: m.pool or ""):
            bytes_ = 4 * matrix.weight.shape[1] ** 2
            if room is not None and taken and size + bytes_ > room:
                yield _Run(stage, taken)
                taken, size = [], 0
            taken, size = [*taken, matrix], size + bytes_
        yield _Run(stage, taken)

    def _stage_of(self, matrix: Matrix) -> int:
        name = matrix.input_module_name or matrix.module_name
        return self._blocks if self._streamed.is_head(name) else self._streamed.stage_of(name)

    def _moments(self, n: int) -> dict[str, Tensor]:
        """Σ w x xᵀ / tokens of the matrices of a run that multiply something."""
        run = self._runs[n]

        def compute() -> dict[str, Tensor]:
            if self._room is not None:  # only this part, and not for the last time
                self._journal.drop(*(f"sums.{other}" for other in range(len(self._runs))))
                self._left[n] = {matrix.name for matrix in run.matrices}
            self._loaded.restore()
            after, moments = self._run(run)
            self._own.put(f"forward.{run.stage}", after)
            return moments

        return self._journal.step(f"sums.{n}", compute, together=True)

    def _between(self, stage: int) -> Between | None:
        """What a stage hands to the next one; what was handed to it is then given up."""
        if stage not in self._order():
            return None
        found = self._own.step(f"forward.{stage}", lambda: self._run(_Run(stage, []))[0])
        self._own.drop(f"forward.{stage - 1}")
        return found

    @torch.no_grad()
    def _run(self, run: _Run) -> tuple[Between | None, dict[str, Tensor]]:
        """Run a stage for all sequences; returns what it hands on, and moments by matrix name."""
        streamed, (S, L), stage = self._streamed, self._sequences.shape, run.stage
        before, after = self._between(stage - 1), None
        if before is not None and stage < self._blocks:
            after = streamed.scratch.zeros(before.hidden.shape, before.hidden.dtype)
        mine = [m for m in run.matrices if self._is_felt(m)]
        sums = {m.name: MatrixSums(m, S, L, streamed.scratch, hessian=True) for m in mine}
        totals = {name: part.zeros(streamed.scratch) for name, part in sums.items()}
        prefix = f"{streamed.names[stage]}." if 0 <= stage < self._blocks else None
        with streamed.opened(), streamed.filled(prefix), self._watching(mine, sums):
            streamed.more = {} if before is None else dict(before.more)
            for shard, count in laps(shards_of(S), self._journal.ranks):
                for s in shard:
                    ids = self._sequences[s].to(streamed.device)
                    if stage == self._blocks:
                        last = (
                            None if before is None else before.hidden[s][None].to(streamed.device)
                        )
                        streamed.head_input(s, ids, last)
                    elif before is not None and after is not None:
                        streamed.advance(stage, s, ids, before.hidden, after)
                    else:
                        hidden = streamed.call(0, s, ids).hidden[0]
                        if after is None:
                            after = streamed.scratch.zeros((S, *hidden.shape), hidden.dtype)
                        after[s] = hidden
                for name, part in sums.items():
                    part.move_to(totals[name], self._journal.ranks, count)
            handed = None if after is None else Between(after, dict(streamed.more))
        return handed, {name: total["hessian"] for name, total in totals.items()}

    def _is_felt(self, matrix: Matrix) -> bool:
        """Whether a matrix multiplies something that is known to count."""
        stats = self._statistics.get(matrix.name)
        is_known = stats is not None and stats.token_weights is not None
        return is_known and matrix.input_module_name is not None

    @contextmanager
    def _watching(self, matrices: list[Matrix], sums: Mapping[str, MatrixSums]) -> Iterator[None]:
        """Let modules add the moments of what comes to them."""

        def adds(matrix: Matrix) -> Callable[[Any, tuple[Any, ...]], None]:
            weights = torch.from_numpy(self._statistics[matrix.name].token_weights)

            def add(_: Any, inputs: tuple[Any, ...]) -> None:
                rows = inputs[0].flatten(0, -2)
                sums[matrix.name].add_moment(rows, weights[self._streamed.sequence])

            return add

        with ExitStack() as hooks:
            for matrix in matrices:
                module = self._streamed.network.get_submodule(matrix.input_module_name or "")
                hooks.enter_context(module.register_forward_pre_hook(adds(matrix)))
            yield
