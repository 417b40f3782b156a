"""A network that runs block by block, so that one block's weights are in memory at a time.

The network's own forward runs around its blocks, whose places are taken by stubs that hand on what
they are given: masks, rotary angles, scaled embeddings, per-layer inputs, soft-capped logits are
computed as the architecture has it, and nothing here knows any. A block runs for all sequences
before the next one does; what lies between two blocks lies in scratch files.

Whether this gives what the network gives as a whole is tried before it is relied on (`exactness`).
A network that it does not hold for is taken as one piece: no block, and everything in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_layers import GradientCheckpointingLayer

from cvxq_converter.errors import ConversionError
from cvxq_converter.source.scratch import Scratch

LOGITS = 1 << 23  # entries of logits that are looked at together

Values = Callable[[str, nn.Parameter], Tensor]  # by parameter name: what it holds
States = list[Tensor]  # (S, L, hidden) each
More = dict[tuple[int, int], tuple[Any, ...]]  # by block and sequence


class _Reached(Exception):  # noqa: N818 (no error)
    """The place that was wanted has been reached; the rest of the forward is not needed."""


@dataclass(frozen=True)
class Call:
    """How the network calls a block for one sequence. hidden: what it hands to it, (1, L, h).

    cuts: tensors beside it that have a gradient, as leaves; origins: what they were cut from.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    cuts: tuple[Tensor, ...] = ()
    origins: tuple[Tensor, ...] = ()


def hollow(
    parameter: Tensor, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Tensor:
    """NaN in the shape of a parameter, without memory for it."""
    dtype, device = dtype or parameter.dtype, device or parameter.device
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(parameter.shape)


def is_hollow(parameter: Tensor) -> bool:
    """Whether a parameter has no memory behind it."""
    return parameter.ndim > 1 and not any(parameter.stride())


def find_blocks(network: nn.Module) -> list[str]:
    """Names of a decoder's blocks in order: the longest list of nothing but layers."""
    lists = [
        [f"{name}.{i}" for i in range(len(module))]
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    return max(lists, key=len, default=[])


class Streamed:
    """A network by blocks.

    network: its matrices may be hollow. names: of its blocks, none for a network in one piece.
    values: gives what a parameter holds when it is needed; None for a network that holds everything
    itself. sequence: the number of the one at hand. forms: length of the tuple that a block
    returns, None for a tensor; more: what it returned beside its output, as long as it is opened.
    before: names of the modules that run before the first block.
    """

    def __init__(
        self,
        network: Any,
        names: list[str],
        values: Values | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.network = network
        self.values = values
        self.scratch = scratch or Scratch()
        self.head = network.get_output_embeddings()
        if self.head is None:
            raise ConversionError(f"{type(network).__name__} has no output layer; not supported")
        self.names = names
        self.blocks = [network.get_submodule(name) for name in names]
        self._project = self.head.forward
        self._real = [block.forward for block in self.blocks]
        self.forms: list[int | None] = [None] * len(names)
        self.before: set[str] = set()
        self.more: More = {}
        self._stop: int | None = None
        self._last: Tensor | None = None
        self._reached: Call | None = None
        self.sequence = 0

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(iter(self.network.parameters())).device

    def is_head(self, module_name: str | None) -> bool:
        """Whether a module is the output layer."""
        return module_name is not None and self.network.get_submodule(module_name) is self.head

    def stage_of(self, module_name: str) -> int:
        """The block that a module is in; −1 for what comes before them, their number for after."""
        for i, name in enumerate(self.names):
            if module_name.startswith(f"{name}."):
                return i
        return -1 if self.blocks and module_name in self.before else len(self.blocks)

    # --- weights --------------------------------------------------------------------------------

    @contextmanager
    def filled(self, prefix: str | None = None) -> Iterator[None]:
        """Have the weights of one block in memory for a while, or all outside of the blocks."""
        taken = [f"{name}." for name in self.names] if prefix is None else []
        parameters = [
            (name, parameter)
            for name, parameter in self.network.named_parameters()
            if name.startswith(prefix or "") and not any(name.startswith(t) for t in taken)
        ]
        done = self.fill(parameters)
        try:
            yield
        finally:
            empty(done)

    def fill(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
        """Put memory behind those parameters that are hollow, and return them."""
        done = []
        for name, parameter in list(parameters):  # a value may bring a bias with it
            if is_hollow(parameter) and self.values is not None:
                value = self.values(name, parameter)
                parameter.data = value.to(parameter.device, parameter.dtype)
                done.append(parameter)
        return done

    # --- running --------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Put stubs in the places of the blocks, and have everything outside of them in memory."""
        with self.filled(), contextlib.ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                stack.enter_context(_forward_of(block, self._stub(i)))
            yield
            self.more.clear()

    def _stub(self, i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self._stop == i:
                self._reached = Call(args, kwargs, hidden)
                raise _Reached
            is_last = i == len(self.blocks) - 1
            out = self._last if is_last and self._last is not None else hidden
            form = self.forms[i]
            if form is None:
                return out
            return (out, *self.more.get((i, self.sequence), (None,) * (form - 1)))

        return forward

    def call(self, i: int, s: int, ids: Tensor) -> Call:
        """How block i is called for sequence s, tokens (L,); its input is right for i = 0 only."""
        self._stop, self._last, self.sequence = i, None, s
        try:
            with contextlib.suppress(_Reached):
                self.run(ids)
            assert self._reached is not None
            found, self._reached = self._reached, None
            return _cut(found) if torch.is_grad_enabled() else found
        finally:
            self._stop = None

    def run_block(self, i: int, s: int, call: Call, hidden: Tensor) -> Tensor:
        """The output (1, L, h) of block i for its input `hidden`."""
        args, kwargs = call.args, call.kwargs
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        with _forward_of(self.blocks[i], self._real[i]):
            out = self.blocks[i](*args, **kwargs)
        if not isinstance(out, tuple):
            return out
        more = pytree.tree_map(lambda t: t.detach() if torch.is_tensor(t) else t, out[1:])
        if any(item is not None for item in more):
            self.more[i, s] = more
        return out[0]

    @torch.no_grad()
    def enter(self, sequences: Tensor) -> Tensor:
        """The inputs (S, L, h) of the first block for sequences (S, L), inside of `opened`."""
        state: Tensor | None = None
        for s, ids in enumerate(sequences):
            hidden = self.call(0, s, ids).hidden[0]
            if state is None:
                state = self.scratch.zeros((len(sequences), *hidden.shape), hidden.dtype)
            state[s] = hidden
        assert state is not None
        return state

    @torch.no_grad()
    def advance(self, i: int, s: int, ids: Tensor, state: Tensor, after: Tensor) -> None:
        """Take sequence s through block i, which is filled: from its `state` to the one `after`."""
        hidden = state[s][None].to(self.device)
        after[s] = self.run_block(i, s, self.call(i, s, ids), hidden)[0]

    def forward(self, sequences: Tensor, *, keep: bool) -> States:
        """Run sequences (S, L) through the blocks, inside of `opened`.

        Returns the inputs of all blocks and the output of the last one if they are to be kept, else
        the latter alone; an empty list for a network in one piece.
        """
        states = [self.enter(sequences)] if self.blocks else []
        for i, name in enumerate(self.names):
            state = states[-1]
            after = self.scratch.zeros(state.shape, state.dtype) if keep else state
            with self.filled(f"{name}."):
                for s, ids in enumerate(sequences):
                    self.advance(i, s, ids, state, after)
            states = [*states, after] if keep else [after]
        return states

    def head_input(self, s: int, ids: Tensor, last: Tensor | None) -> Tensor:
        """What comes to the output layer, (1, L, K), from the last block's output (1, L, h)."""
        found: list[Tensor] = []

        def take(x: Tensor) -> Tensor:
            found.append(x)
            raise _Reached

        with _forward_of(self.head, take), contextlib.suppress(_Reached):
            self._finish(s, ids, last)
        return found[0]

    def logits(self, s: int, ids: Tensor, last: Tensor | None, projected: Tensor) -> Tensor:
        """What the network makes of the output layer's output, (1, M, V), for some tokens."""
        with _forward_of(self.head, lambda _: projected):
            found: Tensor = self._finish(s, ids, last).logits
        return found

    def project(self, x: Tensor) -> Tensor:
        """The output layer's output for its input (1, M, K)."""
        found: Tensor = self._project(x)
        return found

    def parts(self, length: int) -> list[slice]:
        """Runs of positions whose logits are looked at together."""
        step = max(1, LOGITS // self.head.weight.shape[0]) if self.blocks else length
        return [slice(a, min(a + step, length)) for a in range(0, length, step)]

    @torch.no_grad()
    def all_logits(self, sequences: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (sequence, positions, logits (M, V)) for all positions of sequences (S, L)."""
        with self.opened():
            states = self.forward(sequences, keep=False)
            for s, ids in enumerate(sequences):
                last = states[-1][s][None].to(self.device) if states else None
                x = self.head_input(s, ids, last)
                for part in self.parts(len(ids)):
                    yield s, part, self.logits(s, ids, last, self.project(x[:, part]))[0]

    def _finish(self, s: int, ids: Tensor, last: Tensor | None) -> Any:
        self._last, self.sequence = last, s
        try:
            return self.run(ids)
        finally:
            self._last = None

    def run(self, ids: Tensor) -> Any:
        """What the network makes of tokens (L,): as a whole, unless inside of `opened`."""
        return self.network(input_ids=ids[None].to(self.device), use_cache=False)


@contextmanager
def _forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def empty(parameters: Iterable[nn.Parameter]) -> None:
    """Take the memory of parameters away."""
    for parameter in parameters:
        parameter.data = hollow(parameter)


def _cut(call: Call) -> Call:
    """The call with what has a gradient cut off."""
    flat, spec = pytree.tree_flatten((call.args, call.kwargs))
    cuts, origins = [], []
    for n, item in enumerate(flat):
        if torch.is_tensor(item) and item.requires_grad and item is not call.hidden:
            flat[n] = item.detach().requires_grad_()
            cuts.append(flat[n])
            origins.append(item)
    args, kwargs = pytree.tree_unflatten(flat, spec)
    return Call(args, kwargs, call.hidden, tuple(cuts), tuple(origins))
