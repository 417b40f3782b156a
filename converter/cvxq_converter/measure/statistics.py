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

Evidence says in how many sequences a row or column was felt at all. For the rows of an output head
under "kl" that means: the token was drawn as a target (or, for a tied head, read as an input). Its
softmax share alone is a gradient too, but says only that calibration never needed the token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.sums import AxisSums, InputMean, MatrixStatistics, TokenWeights
from cvxq_converter.source.matrices import Matrix
from cvxq_converter.stages import Done

METRICS = ("kl", "logits")
_LOGITS_CHUNK = 1 << 18  # logits turned into float32 probabilities at once


def measure_statistics(
    network: Any,
    matrices: list[Matrix],
    sequences: Tensor,
    metric: str = "kl",
    seed: int = 0,
    progress: Done | None = None,
) -> dict[str, MatrixStatistics]:
    """Measure squared gradients of weights and of outputs, and moments of inputs, of every matrix.

    sequences: (S, L) int64 tokens. Same arguments and machine, same result.
    Raises ConversionError if a gradient overflows the network's dtype.
    """
    sums = {matrix.name: AxisSums(matrix) for matrix in matrices}
    modules = [m.input_module_name for m in matrices if m.input_module_name is not None]
    means = {name: InputMean() for name in modules}
    felt = {name: TokenWeights() for name in modules}
    hooks: list[Any] = []
    for name in means:
        module = network.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(means[name].add))
        hooks.append(module.register_forward_hook(felt[name].watch))
    try:
        _backward_all(network, matrices, sequences, metric, seed, sums, progress)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        m.name: sums[m.name].finish(
            len(sequences),
            sequences.shape[1],
            means.get(m.input_module_name or ""),
            felt.get(m.input_module_name or ""),
        )
        for m in matrices
    }


@dataclass
class _TiedPass:
    """What one sequence leaves behind until both uses of a tied matrix have their gradients.

    Only the tokens of the sequence have a gradient from both uses. So the head's rows of those
    tokens wait for the embedding's, and every other row is reduced and freed at once.
    """

    tokens: Tensor | None = None  # (U,) sorted tokens of the sequence
    waiting: dict[str, Tensor] = field(default_factory=dict)


def _backward_all(
    network: Any,
    matrices: list[Matrix],
    sequences: Tensor,
    metric: str,
    seed: int,
    sums: dict[str, AxisSums],
    progress: Done | None,
) -> None:
    if metric not in METRICS:
        raise ConversionError(f"metric {metric!r}: expected one of {', '.join(METRICS)}")
    device = next(network.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    state = _TiedPass()
    with _prepared(network, matrices, sums, state), torch.enable_grad():
        for done, sequence in enumerate(sequences):
            ids = sequence.to(device)
            state.tokens = torch.unique(ids)
            logits = network(input_ids=ids[None], use_cache=False).logits
            gradient, targets = _output_gradient(logits, metric, generator)
            logits.backward(gradient)
            del logits, gradient
            for matrix in matrices:
                sums[matrix.name].end_sequence(_felt(network, matrix, targets, ids))
            if progress is not None:
                progress(done + 1, len(sequences))


def _output_gradient(
    logits: Tensor, metric: str, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Draw the random vector to back-propagate, like `logits`, and the targets of "kl".

    Works on a few tokens at a time: float32 copies of all logits would rival the model in size.
    """
    gradient = torch.empty_like(logits)
    if metric == "logits":
        return gradient.bernoulli_(0.5, generator=generator).mul_(2).sub_(1), None
    rows, out = logits.detach().flatten(0, -2), gradient.view(-1, logits.shape[-1])
    step = max(1, _LOGITS_CHUNK // rows.shape[1])
    targets = []
    for start in range(0, len(rows), step):
        share = torch.softmax(rows[start : start + step], dim=-1, dtype=torch.float32)
        if not torch.isfinite(share).all():
            raise ConversionError("logits are not finite; use --dtype bfloat16 or float32")
        target = torch.multinomial(share, 1, generator=generator)
        sign = torch.empty_like(target, dtype=torch.float32)
        sign.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        share.neg_().scatter_add_(1, target, torch.ones_like(sign)).mul_(sign)
        out[start : start + step] = share.to(out.dtype)
        targets.append(target.flatten())
    return gradient, torch.cat(targets)


def _felt(network: Any, matrix: Matrix, targets: Tensor | None, ids: Tensor) -> Tensor | None:
    """Say which rows of the output head had evidence; None for every other matrix."""
    head = network.get_output_embeddings()
    is_head = head is not None and matrix.input_module_name is not None
    if targets is None or not is_head:
        return None
    if network.get_submodule(matrix.input_module_name) is not head:
        return None
    felt = torch.zeros(len(matrix.weight), dtype=torch.bool, device=ids.device)
    felt[targets] = True
    if matrix.kind == "embedding":
        felt[ids] = True
    return felt


@contextmanager
def _prepared(
    network: Any,
    matrices: list[Matrix],
    sums: dict[str, AxisSums],
    state: _TiedPass,
) -> Iterator[None]:
    """Let only the matrices take gradients, each reduced and freed by a hook; undo it all after."""
    wanted = {p: p.requires_grad for p in network.parameters()}
    training = network.training
    undo: list[Callable[[], None]] = []
    try:
        network.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        for matrix in matrices:
            undo += _watch(network, matrix, sums[matrix.name], state)
        with _deterministic(next(iter(wanted)).device):
            yield
    finally:
        for step in reversed(undo):
            step()
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        network.train(training)


def _watch(
    network: Any, matrix: Matrix, sums: AxisSums, state: _TiedPass
) -> list[Callable[[], None]]:
    """Attach the hooks of one matrix and return the steps that undo it."""
    undo: list[Callable[[], None]] = []
    table = network.get_submodule(matrix.module_name)
    matrix.parameter.requires_grad_(True)
    if isinstance(table, nn.Embedding):
        # A dense gradient of the table would be as large as the table, for a few rows of it.
        undo.append(_set(table, "sparse", True))
    if matrix.kind == "embedding" and matrix.input_module_name is not None:
        head = network.get_submodule(matrix.input_module_name)
        own = nn.Parameter(matrix.parameter.data)  # same memory, a gradient of its own
        undo.append(_set(head, "weight", own))
        undo.append(own.register_post_accumulate_grad_hook(_head_hook(matrix, sums, state)).remove)
    hook = _hook(matrix, sums, state)
    undo.append(matrix.parameter.register_post_accumulate_grad_hook(hook).remove)
    return undo


def _set(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute and return the step that restores it."""
    old = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, old)


def _hook(matrix: Matrix, sums: AxisSums, state: _TiedPass) -> Callable[[Tensor], None]:
    def consume(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        waiting = state.waiting.pop(matrix.name, None)
        if gradient.is_sparse:
            part = gradient.coalesce()
            rows, values = part.indices()[0], part.values()
            sums.add_lookups(values)
            if waiting is None:
                sums.add(values, rows)
                return
            assert state.tokens is not None
            waiting.index_add_(0, torch.searchsorted(state.tokens, rows), values)
            sums.add(waiting, state.tokens)
        else:
            if waiting is not None:
                gradient.index_add_(0, state.tokens, waiting)  # type: ignore[arg-type]
            sums.add(gradient.T if matrix.kind == "conv1d" else gradient)

    return consume


def _head_hook(matrix: Matrix, sums: AxisSums, state: _TiedPass) -> Callable[[Tensor], None]:
    def consume(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        assert state.tokens is not None
        state.waiting[matrix.name] = gradient[state.tokens]
        gradient[state.tokens] = 0
        sums.add(gradient)

    return consume


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
