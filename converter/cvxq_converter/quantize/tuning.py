"""After quantization: scales, norms, biases and a few codes moved to where the loss is least.

Every matrix was quantized as if the others were exact. Tuning lets them make up for each other:
Adam minimises KL(original ‖ quantized) over what costs no bits to change, that is the scale code of
every group, the norms and the biases; and the codes that promise most of it move by a level. The
network always computes with what the file can hold, and gradients pass through the rounding. The
step size follows √KL, the distance that there is to go: what mends a network of 2 bits would wreck
one of 4. Sequences that took no part in it are asked again and again: where they lose by what was
done, it is undone, and steps become smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from cvxq_format import Codebook, CompandedTensor, dequantize
from torch import Tensor

from cvxq_converter.journal import Journal
from cvxq_converter.measure.quality import Reference, divergence
from cvxq_converter.measure.sums import Statistics
from cvxq_converter.measure.teaching import Lesson
from cvxq_converter.products import coarse_products
from cvxq_converter.quantize.correction import to_16_bits
from cvxq_converter.quantize.moving import Moves, Moving
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.allocator import freed_memory_kept
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.stages import Done

STEP = 0.008  # in octaves of the scales per √nat
LARGEST_STEP = 0.02
OF_VECTORS = 0.25  # shares of norms and biases, for an octave of the scales
WARM_UP = 6  # steps
TOKENS = 2048  # per step
TOGETHER = 512  # of them in the network at a time
CHECK = 4  # steps between two looks at the held-back sequences
WORSE = 1.05  # times the least loss, from where on what was done is undone
BETAS = (0.9, 0.95)
WIN = 0.05  # share of the loss that the codes of one step promise together
MOST_MOVES = 1024  # codes of one matrix in one step


def tune_network(
    loaded: LoadedModel,
    result: Quantized,
    statistics: Statistics,
    lessons: list[Lesson],
    held_back: Reference,
    steps: int,
    seed: int,
    progress: Done,
    journal: Journal | None = None,
) -> Quantized:
    """Tune the quantized network for some steps, and leave the best found in it.

    The network holds the quantized weights, as `correct` leaves them; all of them are in memory for
    this. statistics: by matrix name, for the curvature. lessons: the original on the sequences to
    learn from; held_back: on those that choose what is kept. Returns the result with new codes,
    scale codes and gained biases, never worse on `held_back`.
    """

    def tune() -> tuple[dict[str, CompandedTensor], dict[str, Tensor]]:
        with loaded.whole(), freed_memory_kept():
            return _tuned(loaded, result, statistics, lessons, held_back, steps, seed, progress)

    tensors, vectors = (journal or Journal()).step("tuned", tune)
    added = _settle(loaded, tensors, result.codebook, vectors, result.added_biases)
    quality = divergence(loaded.streamed, held_back)
    return replace(result, tensors=tensors, added_biases=added, quality=quality)


def _tuned(
    loaded: LoadedModel,
    result: Quantized,
    statistics: Statistics,
    lessons: list[Lesson],
    held_back: Reference,
    steps: int,
    seed: int,
    progress: Done,
) -> tuple[dict[str, CompandedTensor], dict[str, Tensor]]:
    """The best tensors and vectors that were found."""
    least = divergence(loaded.streamed, held_back).mean
    tuning = _Tuning(loaded, result.tensors, result.codebook, statistics, least)
    batch = min(sequences_of_a_step(len(lessons[0].ids)), len(lessons))
    drawn = _draw(len(lessons), torch.Generator().manual_seed(seed))
    try:
        for step in range(steps):
            pace = min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
            tuning.step([lessons[i] for i in islice(drawn, batch)], pace)
            is_last = step + 1 == steps
            if (step + 1) % CHECK == 0 or is_last:
                found = divergence(loaded.streamed, held_back).mean
                if found < least:
                    least = found
                    tuning.keep()
                elif is_last or found > WORSE * least:
                    tuning.undo()
            progress(step + 1, steps)
        return tuning.tensors(), tuning.vectors()
    finally:
        tuning.close()


def sequences_of_a_step(length: int) -> int:
    """How many sequences of this length one step learns from."""
    return max(1, TOKENS // length)


def _draw(count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers below `count` without end, every one once before any comes again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def _settle(
    loaded: LoadedModel,
    tensors: Mapping[str, CompandedTensor],
    codebook: Codebook,
    vectors: Mapping[str, Tensor],
    added_biases: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Put into the network just what the file will hold; returns the gained biases."""
    loaded.replace(lambda matrix: torch.from_numpy(dequantize(tensors[matrix.name], codebook)))
    parameters = dict(loaded.hollow.named_parameters())
    for name, value in vectors.items():
        parameters[name].copy_(to_16_bits(value))
    added = {}
    for matrix in loaded.matrices:
        if matrix.bias_name in added_biases:
            assert matrix.bias_name is not None
            bias = loaded.hollow.get_submodule(matrix.input_module_name).bias
            added[matrix.bias_name] = bias.detach().float().clone()
    return added


class _Tuning:
    """The network while it is tuned: what moves, and the optimizer that moves it."""

    def __init__(
        self,
        loaded: LoadedModel,
        tensors: Mapping[str, CompandedTensor],
        codebook: Codebook,
        statistics: Statistics,
        loss: float,
    ) -> None:
        self.network: Any = loaded.hollow
        self.matrices = [
            Moving(m, tensors[m.name], codebook, statistics.get(m.name)) for m in loaded.matrices
        ]
        held = {id(m.parameter) for m in loaded.matrices}
        for matrix in loaded.matrices:
            matrix.parameter.requires_grad_(True)
        self.parameters = {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if id(parameter) not in held and parameter.ndim == 1
        }
        rate = min(STEP * max(loss, 0.0) ** 0.5, LARGEST_STEP)
        self.groups: list[dict[str, Any]] = [
            {"params": [m.octaves for m in self.matrices], "rate": rate}
        ]
        for parameter in self.parameters.values():
            size = float(parameter.detach().float().square().mean().sqrt())
            share = OF_VECTORS * rate * size
            self.groups.append({"params": [parameter.requires_grad_(True)], "rate": share})
        self.win = WIN
        self.products = coarse_products(loaded.hollow.device.type, loss)
        self.optimizer = torch.optim.Adam(self.groups, betas=BETAS)
        self.steps = 0
        self._kept = self._positions()

    def step(self, lessons: list[Lesson], pace: float) -> None:
        """Take one step on the lessons; pace: share of the full step size."""
        loss = self._feel(lessons)
        felt = 1 - BETAS[0] ** self.steps
        moves = [m.promising(MOST_MOVES, felt) for m in self.matrices] if self.steps else []
        self.steps += 1
        for matrix in self.matrices:
            matrix.feel(1 - BETAS[0])
        for group in self.groups:
            group["lr"] = group["rate"] * pace
        self.optimizer.step()
        self.optimizer.zero_grad()
        for matrix in self.matrices:
            matrix.move_scales()
        self._move_codes(moves, self.win * loss)

    def _feel(self, lessons: list[Lesson]) -> float:
        """Leave the gradient of the loss on the lessons at all that moves; returns that loss."""
        total, several = 0.0, max(1, TOGETHER // len(lessons[0].ids))
        with torch.enable_grad():
            for first in range(0, len(lessons), several):
                part = lessons[first : first + several]
                ids = torch.stack([lesson.ids for lesson in part])
                with self.products:
                    logits = self.network(input_ids=ids, use_cache=False).logits
                losses = [lesson.loss(row) for lesson, row in zip(part, logits, strict=True)]
                loss = torch.stack(losses).sum() / len(lessons)
                loss.backward()
                total += float(loss.detach())
        return total

    def _move_codes(self, moves: list[Moves], win: float) -> None:
        """Move the codes that promise most, together no more than `win` nats."""
        if not moves:
            return
        gains = torch.cat([m.gains.cpu() for m in moves]).sort(descending=True).values
        count = int((gains.double().cumsum(0) <= win).sum())
        if count:
            least = float(gains[count - 1])
            for matrix, all_moves in zip(self.matrices, moves, strict=True):
                matrix.move_codes(all_moves.at_least(least))

    def keep(self) -> None:
        """Never undo what was done until now."""
        self._kept = self._positions()
        for matrix in self.matrices:
            matrix.keep()

    @torch.no_grad()
    def undo(self) -> None:
        """Undo what was done since `keep`; from there on with steps half as large."""
        for matrix in self.matrices:
            matrix.undo()
        for parameter, before in zip(self._moved(), self._kept, strict=True):
            parameter.copy_(before)
        for matrix in self.matrices:
            matrix.move_scales()
        for group in self.groups:
            group["rate"] /= 2
        self.win /= 2

    def _moved(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    def _positions(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._moved()]

    def tensors(self) -> dict[str, CompandedTensor]:
        """The matrices with the codes of this moment."""
        return {m.matrix.name: m.tensor_now() for m in self.matrices}

    def vectors(self) -> dict[str, Tensor]:
        """Copies of norms and biases, by parameter name."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def close(self) -> None:
        """Let nothing ask for gradients any more."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
