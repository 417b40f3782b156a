"""Gradients on their way into sums, one stage of the network at a time.

A stage is a block, what comes after the blocks (whose number is that of the blocks), or what comes
before them. Gradients live only from their last accumulation to the hook that reduces them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cvxq_converter.measure.head import HeadPass
from cvxq_converter.measure.lookups import expect
from cvxq_converter.measure.sums import MatrixSums, Totals, laps
from cvxq_converter.ranks import Ranks
from cvxq_converter.source.blocks import Streamed
from cvxq_converter.source.matrices import Matrix

FRONT = -1  # the stage before the first block


class Gathering:
    """What the matrices of a network feel, gathered for the stage and the sequence at hand.

    stages: in the order of the way back, each with the matrices of which it finds something, tables
    at either end: the logits tell which tokens are to be expected. head: the matrix of the output
    layer, if it is one of the matrices. s: the number of the sequence at hand.
    """

    def __init__(
        self, streamed: Streamed, matrices: list[Matrix], sequences: Tensor, hessians: bool
    ) -> None:
        self._streamed, self.matrices, self._hessians = streamed, matrices, hessians
        self._sequences, self._blocks = sequences, len(streamed.blocks)
        self._scratch = streamed.scratch
        self.head = next((m for m in matrices if streamed.is_head(m.input_module_name)), None)
        self._stages = {matrix.name: self._stage_of(matrix) for matrix in matrices}
        order = [self._blocks, *reversed(range(FRONT if self._blocks else 0, self._blocks))]
        self.stages: dict[int, list[Matrix]] = {stage: [] for stage in order}
        for matrix in matrices:
            self.stages[self._stages[matrix.name]].append(matrix)
        self.stages[self._blocks] += [
            m for m in matrices if m.rows_are_tokens and self._stages[m.name] != self._blocks
        ]
        self.sums: dict[str, MatrixSums] = {}
        self._totals: dict[str, dict[str, Tensor]] = {}
        self.s = 0
        self._is_ready = False

    def begin(
        self, stage: int, so_far: Mapping[str, Totals] | None
    ) -> dict[str, dict[str, Tensor]]:
        """Begin a stage; returns its totals by matrix, which grow from those `so_far`.

        None: nothing is to be added up.
        """
        (S, L), scratch = self._sequences.shape, self._scratch
        self.sums = {
            m.name: MatrixSums(m, S, L, scratch, self._hessians and self._multiplies(m, stage))
            for m in self.stages[stage]
        }
        self._totals = {
            name: {key: scratch.copy(total) for key, total in so_far[name].items()}
            if so_far
            else sums.zeros(scratch)
            for name, sums in self.sums.items()
            if so_far is not None
        }
        return self._totals

    def each(self, shards: list[range], ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
        """Yield place and tokens (L,) of each sequence of this rank; add up after each shard."""
        n = 0
        for shard, count in laps(shards, ranks):
            for self.s in shard:
                ids = self._sequences[self.s].to(self._streamed.device)
                yield n, ids
                n += 1
            for name, totals in self._totals.items():
                self.sums[name].move_to(totals, ranks, count)

    def _stage_of(self, matrix: Matrix) -> int:
        """Where the last gradient of a matrix comes."""
        if not self._blocks:
            return 0
        if matrix.kind == "embedding":
            return FRONT
        return self._streamed.stage_of(matrix.module_name)

    def _multiplies(self, matrix: Matrix, stage: int) -> bool:
        """Whether the products of a matrix are at this stage; a tied one's are at the other."""
        return matrix is not self.head or stage == self._blocks

    def end_sequence(self) -> None:
        """Close the sequence at hand for all matrices of the stage at hand."""
        for sums in self.sums.values():
            sums.end_sequence()

    def add_head(self, ids: Tensor, found: HeadPass) -> None:
        """Take what the sequence at hand, of tokens (L,), left of the output layer."""
        for matrix in self.stages[self._blocks]:
            sums = self.sums[matrix.name]
            if matrix.kind == "embedding":
                expect(sums.totals["expected"], ids, found.expected)
            if matrix is self.head:
                sums.add_head(self.s, found)

    @contextmanager
    def watching(self, stage: int) -> Iterator[None]:
        """Let the modules of a stage, the head excepted, add what goes in and comes back."""
        with ExitStack() as hooks:
            for matrix in self.stages[stage]:
                name = matrix.input_module_name
                if name is None or matrix is self.head:
                    continue
                module = self._streamed.network.get_submodule(name)
                hooks.enter_context(module.register_forward_hook(self._observer(matrix.name)))
            yield

    def _observer(self, name: str) -> Callable[[Any, Any, Tensor], None]:
        def observe(_: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            s, sums, x = self.s, self.sums[name], inputs[0].detach().flatten(0, -2)
            sums.add_inputs(s, x)
            output.register_hook(lambda gradient: sums.add_felt(s, x, gradient.flatten(0, -2)))

        return observe

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Be ready to run stages, inside of another such context or not."""
        if self._is_ready:
            yield
            return
        self._is_ready = True
        try:
            with self._prepared(), self._streamed.opened():
                yield
        finally:
            self._is_ready = False

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Let gradients come back to what is looked up, and no further; undo it after.

        A matrix that multiplies something needs what goes in and comes back, see `add_felt`; only
        rows of tables take gradients, reduced and freed by a hook.
        """
        network = self._streamed.network
        wanted = {p: p.requires_grad for p in network.parameters()}
        training = network.training
        undo: list[Callable[[], None]] = []
        try:
            network.eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            undo.append(network.get_input_embeddings().register_forward_hook(_take_gradient).remove)
            for matrix in self.matrices:
                if matrix.kind == "embedding":
                    undo += self._watch(matrix)
            with _deterministic(self._streamed.device):
                yield
        finally:
            for step in reversed(undo):
                step()
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)
                parameter.grad = None
            network.train(training)

    def _watch(self, matrix: Matrix) -> list[Callable[[], None]]:
        """Let a table take gradients for the rows that are looked up; return the steps to undo it.

        A dense gradient of the table would be as large as the table, for a few rows of it.
        """
        table = self._streamed.network.get_submodule(matrix.module_name)
        matrix.parameter.requires_grad_(True)
        hook = matrix.parameter.register_post_accumulate_grad_hook(partial(self._consume, matrix))
        return [_set(table, "sparse", True), hook.remove]

    def _consume(self, matrix: Matrix, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        part = gradient.coalesce()
        self.sums[matrix.name].add_lookups(part.indices()[0], part.values())


def _take_gradient(_: Any, __: Any, output: Tensor) -> None:
    """Have a gradient come back to the input embedding, though its weights may need none."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _set(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute and return the step that restores it."""
    old = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, old)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, keep to operations that add in a fixed order; on a CPU they all do.

    Memory-efficient attention has no such backward pass; flash attention (16 bits) and plain
    attention (float32) have.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            warnings.catch_warnings(),
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
