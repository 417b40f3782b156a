"""How much the output feels each weight: one backward pass per sequence, with random signs.

For one sequence with tokens t, let s_t be a random vector over the vocabulary with known second
moment. Back-propagating Σ_t ε_t s_t (ε_t = ±1, independent) gives a weight gradient g whose square
has mean Σ_t E[(∂(s_t·z_t)/∂w)²], because the cross terms between tokens vanish in expectation.
So a single pass estimates what would otherwise take one pass per token and component.

    metric "kl"      s_t = onehot(y_t) − softmax(z_t) with y_t drawn from softmax(z_t): g² estimates
                     the diagonal Fisher information F of the sequence. KL ≈ ½ Σ F_ii δ_i².
    metric "logits"  s_t = a ±1 for every component of the logits z_t: g² estimates Σ_v (∂z_tv/∂w)²,
                     the squared logit error per squared weight error.

Everything is reported per token: divided by the number of tokens, averaged over the sequences.
Gradients live only from their last accumulation to the hook that reduces them.

The network runs by blocks (`source.blocks`): forward with the inputs of all blocks kept in scratch
files, then back, each block recomputed and differentiated for all sequences in turn. Every sequence
draws from a generator of its own, so that the order of the work plays no part.

Evidence says in how many sequences a row or column was felt at all. For the rows of an output head
under "kl" that means: the token was drawn as a target (or, for a tied head, read as an input). Its
softmax share alone is a gradient too, but says only that calibration never needed the token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.head import HeadPass, head_pass, output_gradient
from cvxq_converter.measure.moments import InputMoments
from cvxq_converter.measure.seeds import generator_of
from cvxq_converter.measure.sums import AxisSums, InputMean, MatrixStatistics, TokenWeights
from cvxq_converter.measure.tied import TiedRows
from cvxq_converter.source.blocks import States, Streamed
from cvxq_converter.source.exactness import as_streamed
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done

METRICS = ("kl", "logits")


def measure_statistics(
    network: Any,
    matrices: list[Matrix],
    sequences: Tensor,
    metric: str = "kl",
    seed: int = 0,
    progress: Done | None = None,
    moments: InputMoments | None = None,
    rounds: int = 1,
) -> dict[str, MatrixStatistics]:
    """Measure squared gradients of weights and of outputs, and moments of inputs, of every matrix.

    network: whole, or by blocks. sequences: (S, L) int64 tokens. moments: takes the second moments
    of the inputs on the way. rounds: so many times some of the sequences go forward and back, which
    takes less disk and gives the same. Same arguments and machine, same result.
    Raises ConversionError if a gradient overflows the network's dtype.
    """
    if metric not in METRICS:
        raise ConversionError(f"metric {metric!r}: expected one of {', '.join(METRICS)}")
    streamed = as_streamed(network)
    measuring = _Measuring(streamed, matrices, sequences, metric, seed, progress, moments)
    step = -(-len(sequences) // rounds)
    with measuring.prepared(), streamed.opened():
        for first in range(0, len(sequences), step):
            measuring.run_round(first, sequences[first : first + step])
    return measuring.finish()


class _Measuring:
    """The sums of a reverse pass, and the pass."""

    def __init__(
        self,
        streamed: Streamed,
        matrices: list[Matrix],
        sequences: Tensor,
        metric: str,
        seed: int,
        progress: Done | None,
        moments: InputMoments | None,
    ) -> None:
        self.streamed, self.matrices, self.sequences = streamed, matrices, sequences
        self.metric, self.seed, self.moments = metric, seed, moments
        self.sums = {matrix.name: AxisSums(matrix) for matrix in matrices}
        S, L = sequences.shape
        modules = [m.input_module_name for m in matrices if m.input_module_name is not None]
        self.means = {name: InputMean() for name in modules}
        self.felt = {name: TokenWeights(S, L) for name in modules}
        self._network = streamed.network
        self.head = next((m for m in matrices if streamed.is_head(m.input_module_name)), None)
        self.tied: TiedRows | None = None
        if self.head is not None and self.head.kind == "embedding":
            self.tied = TiedRows(self.head, self.sums, streamed.scratch)
        self.some, self.first = sequences, 0  # of this round, and the number of its first
        self.targets: list[Tensor | None] = []  # of all sequences so far
        self.gradient: Tensor | None = None  # (S, L, h) of the output of the block at hand
        self.cuts: dict[tuple[int, int], list[Tensor]] = {}
        self._at, self._tokens = 0, torch.empty(0)
        self._done, self._total = 0, S * (2 * len(streamed.blocks) + 1 + bool(streamed.blocks))
        self._progress = progress
        self._stages = {matrix.name: self._stage_of(matrix) for matrix in matrices}

    def step(self) -> None:
        """One sequence through one block, forward or back, or through what is outside of them."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    # --- the pass -------------------------------------------------------------------------------

    def run_round(self, first: int, some: Tensor) -> None:
        """Forward and back with some of the sequences, (S, L), the first of them being `first`."""
        self.first, self.some = first, some
        if self.tied is not None:
            self.tied.begin_round(*some.shape)
        states = self.streamed.forward(some, keep=True, progress=self.step)
        with torch.enable_grad():
            self.run_head(states)
            self._settle()
            for i in reversed(range(len(self.streamed.blocks))):
                self.run_block(i, states)
                self._settle()
            if self.streamed.blocks:
                self.run_front()
                self._settle()
        self.gradient = None

    def run_head(self, states: States) -> None:
        """From the logits back to the output of the last block."""
        streamed, stage = self.streamed, len(self.streamed.blocks)
        L, V = self.sequences.shape[1], len(streamed.head.weight)
        space = streamed.scratch.zeros((L, V), streamed.head.weight.dtype)
        last = states.pop() if states else None
        for s, ids in self._each():
            leaf = None if last is None else last[s][None].to(streamed.device).requires_grad_()
            with self._watching(stage):
                x = streamed.head_input(s, ids, leaf)
            draw = partial(
                output_gradient,
                metric=self.metric,
                generator=generator_of(self.seed, self.first + s, streamed.device),
            )
            found = head_pass(streamed, s, ids, leaf, x, draw, space)
            self.targets.append(found.targets)
            if self.head is not None:
                self._add_head(self.first + s, found)
            if x.requires_grad:
                x.backward(found.input_gradient)
            self._end_sequence(stage)
            if last is not None:
                assert leaf is not None
                assert leaf.grad is not None
                last[s] = leaf.grad[0]
            self.step()
        self.gradient = last

    def run_block(self, i: int, states: States) -> None:
        """From the output of block i back to its input."""
        streamed, gradient, inputs = self.streamed, self.gradient, states.pop()
        assert gradient is not None
        with streamed.filled(f"{streamed.names[i]}."), self._watching(i):
            for s, ids in self._each():
                call = streamed.call(i, s, ids)
                hidden = inputs[s][None].to(streamed.device).requires_grad_()
                out = streamed.run_block(i, s, call, hidden)
                out.backward(gradient[s][None].to(streamed.device))
                del out
                assert hidden.grad is not None
                gradient[s] = hidden.grad[0]
                if call.cuts:
                    self.cuts[i, s] = [
                        torch.zeros_like(cut) if cut.grad is None else cut.grad for cut in call.cuts
                    ]
                self._end_sequence(i)
                self.step()

    def run_front(self) -> None:
        """From the input of the first block back to the embedding."""
        streamed, gradient = self.streamed, self.gradient
        assert gradient is not None
        for s, ids in self._each():
            if self.tied is not None:
                self.tied.take_up(s, self._tokens)
            with self._watching(-1):
                call = streamed.call(0, s, ids)
            outputs, gradients = [call.hidden], [gradient[s][None].to(streamed.device)]
            for i in range(len(streamed.blocks)):
                if (i, s) in self.cuts:
                    outputs += (call if i == 0 else streamed.call(i, s, ids)).origins
                    gradients += self.cuts.pop((i, s))
            felt = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
            if felt:
                torch.autograd.backward([o for o, _ in felt], [g for _, g in felt])
            self._end_sequence(-1)
            self.step()

    def _each(self) -> Iterator[tuple[int, Tensor]]:
        """Number within the round, and tokens (L,)."""
        for n, sequence in enumerate(self.some):
            ids = sequence.to(self.streamed.device)
            self._at, self._tokens = n, torch.unique(ids)
            yield n, ids

    # --- the sums -------------------------------------------------------------------------------

    def _stage_of(self, matrix: Matrix) -> int:
        """Where the last gradient of a matrix comes."""
        if not self.streamed.blocks:
            return 0
        if matrix.kind == "embedding":
            return -1
        return self.streamed.stage_of(matrix.module_name)

    def _end_sequence(self, stage: int) -> None:
        """Close the sequence at hand for all matrices of a stage."""
        for matrix in self.matrices:
            if self._stages[matrix.name] == stage:
                self.sums[matrix.name].end_sequence(self._felt_rows(matrix))
            elif matrix is self.head and self.tied is not None:
                self.tied.park(self._at, self._tokens)

    def _felt_rows(self, matrix: Matrix) -> Tensor | None:
        """Say which rows of the output head had evidence; None for every other matrix."""
        targets = self.targets[self.first + self._at]
        if targets is None or matrix is not self.head:
            return None
        felt = torch.zeros(len(matrix.weight), dtype=torch.bool, device=targets.device)
        felt[targets] = True
        if matrix.kind == "embedding":
            felt[self._tokens] = True
        return felt

    def _add_head(self, s: int, found: HeadPass) -> None:
        """Take what one sequence left of the head; rows that the embedding feels, too, wait."""
        assert self.head is not None
        name = self.head.input_module_name
        assert name is not None
        self.means[name].add(None, (found.inputs,))
        self.felt[name].add(s, found.gradients)
        if self.moments is not None:
            self.moments.add(self.head, found.inputs, self.felt[name].values[s])
        for rows, gradient in found.weight_gradients():
            if self.tied is not None:
                self.tied.hold_back(gradient, rows, self._tokens)
            within = torch.arange(rows.start, rows.stop, device=gradient.device)
            self.sums[self.head.name].add(gradient, within)

    @contextmanager
    def _watching(self, stage: int) -> Iterator[None]:
        """Let the modules of a stage, the head excepted, add what goes in and comes back."""
        hooks: list[Any] = []
        for matrix in self.matrices:
            name = matrix.input_module_name
            if name is None or matrix is self.head or self._stages[matrix.name] != stage:
                continue
            module = self._network.get_submodule(name)
            hooks.append(module.register_forward_hook(self._observer(matrix, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _settle(self) -> None:
        if self.moments is not None:
            self.moments.settle()

    def _observer(self, matrix: Matrix, name: str) -> Callable[[Any, Any, Tensor], None]:
        def observe(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            s, x = self.first + self._at, inputs[0].detach()
            self.means[name].add(module, inputs)

            def feel(gradient: Tensor) -> None:
                self.felt[name].add(s, gradient)
                if self.moments is not None:
                    self.moments.add(matrix, x.flatten(0, -2), self.felt[name].values[s])

            output.register_hook(feel)

        return observe

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Let only the matrices take gradients, each reduced and freed by a hook; undo it after."""
        network = self._network
        wanted = {p: p.requires_grad for p in network.parameters()}
        training = network.training
        undo: list[Callable[[], None]] = []
        try:
            network.eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            for matrix in self.matrices:
                undo += self._watch(matrix)
            with _deterministic(self.streamed.device):
                yield
        finally:
            for step in reversed(undo):
                step()
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)
                parameter.grad = None
            network.train(training)

    def _watch(self, matrix: Matrix) -> list[Callable[[], None]]:
        """Attach the hooks of one matrix and return the steps that undo it."""
        undo: list[Callable[[], None]] = []
        if matrix is self.head and self.tied is None:
            return undo  # whose gradient `run_head` makes
        table = self._network.get_submodule(matrix.module_name)
        matrix.parameter.requires_grad_(True)
        if isinstance(table, nn.Embedding):
            # A dense gradient of the table would be as large as the table, for a few rows of it.
            undo.append(_set(table, "sparse", True))
        hook = partial(self._consume, matrix)
        undo.append(matrix.parameter.register_post_accumulate_grad_hook(hook).remove)
        return undo

    def _consume(self, matrix: Matrix, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        sums = self.sums[matrix.name]
        if not gradient.is_sparse:
            sums.add(gradient.T if matrix.kind == "conv1d" else gradient)
            return
        part = gradient.coalesce()
        rows, values = part.indices()[0], part.values()
        sums.add_lookups(values)
        if matrix is self.head and self.tied is not None:
            self.tied.add_lookups(rows, values, self._tokens)
        else:
            sums.add(values, rows)

    def finish(self) -> dict[str, MatrixStatistics]:
        """Turn sums into statistics, by matrix name."""
        S, L = self.sequences.shape
        found = {}
        for matrix in self.matrices:
            name = matrix.input_module_name or ""
            found[matrix.name] = self.sums[matrix.name].finish(
                S, L, self.means.get(name), self.felt.get(name)
            )
            if self.moments is not None:
                self.moments.add_lookups(matrix, found[matrix.name].lookup_moment)
        return found


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
