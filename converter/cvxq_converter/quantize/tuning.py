"""After quantization: scales, norms and biases moved to where the loss is least, codes fixed.

Every matrix was quantized as if the others were exact. Tuning lets them make up for each other:
Adam minimises KL(original ‖ quantized) over what costs no bits to change, that is the scale code of
every group, the norms and the biases. Scale codes are whole steps of the codebook's ladder: a real
position is kept beside each, the network always computes with the code nearest to it, and the
gradient passes through the rounding. The step size follows √KL, the distance that there is to go:
what mends a network of 2 bits would wreck one of 4. Sequences that took no part in it stop the
tuning where it would begin to harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from cvxq_format import Codebook, CompandedTensor, dequantize
from torch import Tensor

from cvxq_converter.journal import Journal
from cvxq_converter.measure.quality import Reference, divergence
from cvxq_converter.measure.teaching import Lesson
from cvxq_converter.quantize.correction import to_16_bits
from cvxq_converter.quantize.result import Quantized
from cvxq_converter.source.loaded import LoadedModel
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done

STEP = 0.05  # in octaves of the scales (and shares of vectors) per √nat
LARGEST_STEP = 0.03
WARM_UP = 10  # steps
BATCH = 4  # sequences per step
CHECKS = 6  # how often the held-back sequences are asked
BETAS = (0.9, 0.95)


def tune_network(
    loaded: LoadedModel,
    result: Quantized,
    lessons: list[Lesson],
    held_back: Reference,
    steps: int,
    seed: int,
    progress: Done,
    journal: Journal | None = None,
) -> Quantized:
    """Tune the quantized network for some steps, and leave the best found in it.

    The network holds the quantized weights, as `correct` leaves them; all of them are in memory for
    this. lessons: the original on the sequences to learn from; held_back: on those that choose when
    to stop. Returns the result with new scale codes and gained biases, never worse on `held_back`.
    """

    def tune() -> tuple[dict[str, CompandedTensor], dict[str, Tensor]]:
        with loaded.whole():
            return _tuned(loaded, result, lessons, held_back, steps, seed, progress)

    tensors, vectors = (journal or Journal()).step("tuned", tune)
    added = _settle(loaded, tensors, result.codebook, vectors, result.added_biases)
    quality = divergence(loaded.streamed, held_back)
    return replace(result, tensors=tensors, added_biases=added, quality=quality)


def _tuned(
    loaded: LoadedModel,
    result: Quantized,
    lessons: list[Lesson],
    held_back: Reference,
    steps: int,
    seed: int,
    progress: Done,
) -> tuple[dict[str, CompandedTensor], dict[str, Tensor]]:
    """The best tensors and vectors that were found."""
    least = divergence(loaded.streamed, held_back).mean
    tuning = _Tuning(loaded, result.tensors, result.codebook, least)
    tensors, vectors = dict(result.tensors), tuning.vectors()
    generator = torch.Generator().manual_seed(seed)
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    try:
        for step in range(1, steps + 1):
            chosen = torch.randperm(len(lessons), generator=generator)[:BATCH].tolist()
            pace = min(1.0, step / WARM_UP) * (1 - (step - 1) / steps)
            tuning.step([lessons[i] for i in chosen], pace)
            if step in checks:
                found = divergence(loaded.streamed, held_back).mean
                if found < least:
                    least, tensors, vectors = found, tuning.tensors(), tuning.vectors()
            progress(step, steps)
    finally:
        tuning.close()
    return tensors, vectors


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
        loss: float,
    ) -> None:
        self.network: Any = loaded.hollow
        self.scales = [_Scales(m, tensors[m.name], codebook) for m in loaded.matrices]
        held = {id(m.parameter) for m in loaded.matrices}
        self.parameters = {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if id(parameter) not in held and parameter.ndim == 1
        }
        rate = min(STEP * max(loss, 0.0) ** 0.5, LARGEST_STEP)
        groups: list[dict[str, Any]] = [{"params": [s.octaves for s in self.scales], "rate": rate}]
        for parameter in self.parameters.values():
            size = float(parameter.detach().float().square().mean().sqrt())
            groups.append({"params": [parameter.requires_grad_(True)], "rate": rate * size})
        self.optimizer = torch.optim.Adam(groups, betas=BETAS)
        self.hooks = [s.watch() for s in self.scales]

    def step(self, lessons: list[Lesson], pace: float) -> None:
        """Take one step on the lessons; pace: share of the full step size."""
        with torch.enable_grad():
            for lesson in lessons:
                logits = self.network(input_ids=lesson.ids[None], use_cache=False).logits[0]
                (lesson.loss(logits) / len(lessons)).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * pace
        self.optimizer.step()
        self.optimizer.zero_grad()
        for scales in self.scales:
            scales.apply()

    def tensors(self) -> dict[str, CompandedTensor]:
        """The matrices with the scale codes of this moment."""
        return {s.matrix.name: s.tensor_now() for s in self.scales}

    def vectors(self) -> dict[str, Tensor]:
        """Copies of norms and biases, by parameter name."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def close(self) -> None:
        """Stop watching gradients."""
        for hook in self.hooks:
            hook.remove()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


class _Scales:
    """The scales of one matrix as positions on the codebook's ladder, in octaves.

    octaves: (C, K) float32 offset from the first scale; codes: (C, K) int64 in use. A scale of 0
    stays: nothing depends on it smoothly.
    """

    def __init__(self, matrix: Matrix, tensor: CompandedTensor, codebook: Codebook) -> None:
        device = matrix.parameter.device
        self.matrix, self.tensor = matrix, tensor
        rows = np.asarray(tensor.cluster_rows())
        cluster = np.repeat(np.arange(len(rows)), rows)
        if tensor.permutation is not None:
            cluster = cluster[np.argsort(tensor.permutation[0])]
        self.cluster = torch.from_numpy(cluster).to(device)
        table = torch.from_numpy(codebook.scale_table[1:].astype(np.float64))
        self.ladder = torch.log2(table).float().to(device)
        self.middle = (self.ladder[1:] + self.ladder[:-1]) / 2
        codes = torch.from_numpy(tensor.scale_codes[0].astype(np.int64)).to(device)
        self.moves = codes > 0
        self.codes = codes
        self.start = self.ladder[(codes - 1).clamp_min(0)]
        self.octaves = torch.zeros_like(self.start).requires_grad_(True)

    def watch(self) -> Any:
        """Turn the weights' gradient into the scales', and free it, as soon as it is there."""
        parameter = self.matrix.parameter
        parameter.requires_grad_(True)

        def consume(_: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            gradient = gradient.T if self.matrix.kind == "conv1d" else gradient
            felt = (gradient * self.matrix.weight).float()  # ∂loss / ∂ ln(scale), weight by weight
            total = torch.zeros_like(self.start).index_add_(0, self.cluster, felt)
            total.mul_(self.moves).mul_(float(np.log(2)))
            before = self.octaves.grad
            self.octaves.grad = total if before is None else before.add_(total)

        return parameter.register_post_accumulate_grad_hook(consume)

    @torch.no_grad()
    def apply(self) -> None:
        """Move to the nearest codes, and scale the network's weights by what that changes."""
        nearest = torch.bucketize(self.start + self.octaves, self.middle) + 1
        codes = torch.where(self.moves, nearest, self.codes)
        change = self.ladder[(codes - 1).clamp_min(0)] - self.ladder[(self.codes - 1).clamp_min(0)]
        if bool(change.any()):
            self.matrix.weight.mul_(torch.exp2(change)[self.cluster])
        self.codes = codes

    def tensor_now(self) -> CompandedTensor:
        """The tensor with the codes in use."""
        return replace(self.tensor, scale_codes=self.codes[None].to(torch.uint8).cpu().numpy())
