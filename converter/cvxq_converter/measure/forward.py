"""Hessians by a pass forward over the original, where sensitivities were measured before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from cvxq_converter.journal import Journal
from cvxq_converter.measure.statistics import FRONT, Between
from cvxq_converter.measure.sums import MatrixSums, Statistics, laps, shards_of
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix


class InputHessians:
    """The Hessians of all matrices that have statistics; it leaves the originals in the network.

    sequences: (S, L) int64, those that `statistics` were measured on.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sequences: Tensor,
        statistics: Statistics,
        journal: Journal | None = None,
    ) -> None:
        self._loaded, self._streamed = loaded, loaded.streamed
        self._sequences, self._statistics = sequences, statistics
        self.tokens = sequences.numel()
        self._journal = journal or Journal()
        self._own = self._journal.own()
        self._blocks = len(self._streamed.blocks)  # also the number of the head's stage
        self._stages = {matrix.name: self._stage_of(matrix) for matrix in loaded.matrices}
        self._is_gathered = False
        self._left: dict[int, set[str]] = {stage: set() for stage in self._order()}
        for name, stage in self._stages.items():
            self._left[stage].add(name)

    def hessian(self, name: str) -> Tensor | None:
        """H (K, K) float32 of a matrix; None for one that nothing was measured of."""
        if name not in self._statistics:
            return None
        if not self._is_gathered:
            self._gather()
        found = self._moments(self._stages[name]).get(name)
        lookups = self._statistics[name].lookup_moment
        if lookups is None:
            return found
        felt = torch.from_numpy(lookups)
        return felt if found is None else found + felt

    def forget(self, name: str) -> None:
        """Give up the Hessian of a matrix, and the sums of a stage all of whose were given up."""
        stage = self._stages[name]
        self._left[stage].discard(name)
        if not self._left[stage]:
            self._journal.drop(f"sums.{stage}")

    def _gather(self) -> None:
        self._loaded.restore()
        with self._streamed.opened():
            for stage in self._order():
                self._moments(stage)
                self._own.drop(f"forward.{stage - 1}")
        self._is_gathered = True

    def _order(self) -> range:
        """Stages on the way forward: what is before the blocks, they, the head."""
        return range(FRONT if self._blocks else 0, self._blocks + 1)

    def _stage_of(self, matrix: Matrix) -> int:
        name = matrix.input_module_name or matrix.module_name
        return self._blocks if self._streamed.is_head(name) else self._streamed.stage_of(name)

    def _moments(self, stage: int) -> dict[str, Tensor]:
        """Σ w x xᵀ / tokens of the matrices of a stage that multiply something."""

        def compute() -> dict[str, Tensor]:
            after, moments = self._run(stage)
            self._own.put(f"forward.{stage}", after)
            return moments

        return self._journal.step(f"sums.{stage}", compute, together=True)

    def _between(self, stage: int) -> Between | None:
        """What a stage hands to the next one."""
        if stage not in self._order():
            return None
        return self._own.step(f"forward.{stage}", lambda: self._run(stage, adds=False)[0])

    @torch.no_grad()
    def _run(self, stage: int, adds: bool = True) -> tuple[Between | None, dict[str, Tensor]]:
        streamed, (S, L) = self._streamed, self._sequences.shape
        before, after = self._between(stage - 1), None
        if before is not None and stage < self._blocks:
            after = streamed.scratch.zeros(before.hidden.shape, before.hidden.dtype)
        mine = [m for m in self._loaded.matrices if self._is_felt(m, stage)]
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
                for name, part in sums.items() if adds else ():
                    part.move_to(totals[name], self._journal.ranks, count)
            handed = None if after is None else Between(after, dict(streamed.more))
        return handed, {name: total["hessian"] for name, total in totals.items()}

    def _is_felt(self, matrix: Matrix, stage: int) -> bool:
        """Whether a matrix multiplies something at a stage that is known to count."""
        stats = self._statistics.get(matrix.name)
        is_known = stats is not None and stats.token_weights is not None
        multiplies = matrix.input_module_name is not None
        return is_known and multiplies and self._stages[matrix.name] == stage

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
