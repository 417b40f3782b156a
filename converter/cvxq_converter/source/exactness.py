"""Whether a network by blocks gives what it gives as a whole: tried, not looked up in a list.

It runs on a few tokens both ways, with weights that share the memory of the largest of them; its
logits are compared, and their gradient at the first block. Blocks that share more than what each
hands to the next show there, as do blocks that run twice and work that is done between them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cvxq_converter.source.blocks import Streamed, Values, empty, find_blocks
from cvxq_converter.source.scratch import Scratch

_TOKENS = 12
_PLACES = 4096  # where the numbers of a matrix may begin
_DRAWN = 999_983  # numbers that are drawn, and repeated; prime, so that rows are not alike
_TOLERANCE = 1e-4  # of the largest logit or gradient


def stream(network: Any, values: Values | None = None, scratch: Scratch | None = None) -> Streamed:
    """A network by blocks, or in one piece where that would not be the same.

    values: as in `Streamed`. Raises ConversionError for a network without an output layer.
    """
    streamed = Streamed(network, find_blocks(network), values, scratch)
    if streamed.blocks and is_exact(streamed):
        return streamed
    return Streamed(network, [], values, scratch)


def as_streamed(network: Any) -> Streamed:
    """A network by blocks, from one or from one that is whole in memory."""
    return network if isinstance(network, Streamed) else stream(network)


def is_exact(streamed: Streamed) -> bool:
    """Run both ways; notes what blocks return, and what runs before them."""
    network, values = streamed.network, streamed.values
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    table = network.get_input_embeddings()
    ids = torch.arange(min(_TOKENS, context or _TOKENS)) % len(table.weight)
    flags = {p: p.requires_grad for p in network.parameters()}
    training = network.training
    everything: list[nn.Parameter] = []
    felt = table.register_forward_hook(lambda _, __, out: out.requires_grad_())
    try:
        network.eval().requires_grad_(False)
        streamed.values = None if values is None else _made_up(network)
        everything = streamed.fill(network.named_parameters())
        with torch.enable_grad():
            expected = _whole(streamed, ids)
            found = _by_blocks(streamed, ids) if expected is not None else ()
    except Exception:  # whatever an architecture's code makes of the stubs
        return False
    finally:
        felt.remove()
        empty(everything)
        streamed.values = values
        network.train(training)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return expected is not None and all(map(_agree, found, expected))


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    error = float((ours - theirs).abs().max())
    return error <= _TOLERANCE * float(theirs.abs().max())  # not for NaN


def _whole(streamed: Streamed, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits, and their gradient at the input of the first block.

    None if blocks do not run once, in order.
    """
    order: list[int] = []
    inputs: list[Tensor] = []

    def note(i: int) -> Callable[[Any, Any, Any], None]:
        def after(_: Any, __: Any, out: Any) -> None:
            order.append(i)
            streamed.forms[i] = len(out) if isinstance(out, tuple) else None

        return after

    def first(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        inputs[0].retain_grad()

    def before(name: str) -> Callable[[Any, Any], None]:
        return lambda *_: None if inputs else streamed.before.add(name)

    hooks = [b.register_forward_hook(note(i)) for i, b in enumerate(streamed.blocks)]
    hooks.append(streamed.blocks[0].register_forward_pre_hook(first, with_kwargs=True))
    modules = streamed.network.named_modules()
    hooks += [module.register_forward_pre_hook(before(name)) for name, module in modules]
    try:
        logits = streamed.run(ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    if order != list(range(len(streamed.blocks))):
        return None
    logits.backward(_direction(logits))
    assert inputs[0].grad is not None
    return logits.detach(), inputs[0].grad


def _by_blocks(streamed: Streamed, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same, the logits in two parts."""
    with streamed.opened():
        states = [s.to(streamed.device) for s in streamed.forward(ids[None], keep=True)]
        last = states.pop().requires_grad_()
        x = streamed.head_input(0, ids, last)
        middle = max(1, len(ids) // 2)
        halves = [streamed.project(x[:, part]) for part in (slice(middle), slice(middle, None))]
        logits = torch.cat([streamed.logits(0, ids, last, half) for half in halves], 1)
        logits.backward(_direction(logits))
        assert last.grad is not None
        gradient = last.grad
        for i in reversed(range(len(streamed.blocks))):
            hidden = states.pop().requires_grad_()
            call = streamed.call(i, 0, ids)
            streamed.run_block(i, 0, call, hidden).backward(gradient)
            assert hidden.grad is not None
            gradient = hidden.grad
    return logits.detach(), gradient


def _direction(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(logits.shape, generator=generator).to(logits)


def _made_up(network: nn.Module) -> Values:
    """Random weights: every matrix is a stretch of the same numbers, from a place of its own."""
    parameters = [p for p in network.parameters() if p.ndim > 1]
    largest = max(parameters, key=lambda p: p.shape[-2:].numel())
    size = largest.shape[-2:].numel() + _PLACES
    width = max(p.shape[-1] for p in parameters)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(min(size, _DRAWN), generator=generator) * width**-0.5
    pool = pool.to(largest.device, largest.dtype).repeat(-(-size // len(pool)))

    def value(name: str, parameter: nn.Parameter) -> Tensor:
        place, shape = zlib.crc32(name.encode()) % _PLACES, parameter.shape[-2:]
        return pool[place : place + shape.numel()].view(shape).expand(parameter.shape)

    return value
