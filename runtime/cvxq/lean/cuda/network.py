"""The forward pass of a `DecoderRecord` in torch: ids and positions in, logits out.

The residual stream is float32, whatever the matrices compute in: at batch one it costs nothing,
and it keeps large activations of deep models out of float16's way.  What happens between the
matrices is in `cvxq_kernels.decode`, one call each, so that a GPU runs one kernel each.  A norm
always follows a residual sum, so the two are one operation, which is why a layer's first norm is
computed at the end of the layer before.
"""

from __future__ import annotations

from copy import copy
from types import ModuleType

import torch
from cvxq_format import decoder_record as described
from cvxq_format.decoder_record import DecoderRecord, Rope
from cvxq_kernels.decode import Norm, reference

from cvxq import cuda
from cvxq.lean.cuda.weights import Block, Layer, TorchWeights


class KeyValueCache:
    """Keys and values of all layers, each (texts · KV, places, D), and the tables of the ropes.

    tables: of each rope cosine and sine, (places, R/2) float32, of short texts or of long ones.
    Places beyond the text hold zeros or what a rewound text left: finite, so that a weight of zero
    makes nothing of them.
    """

    def __init__(
        self,
        record: DecoderRecord,
        places: int,
        device: torch.device,
        dtype: torch.dtype,
        texts: int = 1,
    ) -> None:
        """Allocate for `places` tokens of each text."""
        self.texts = texts
        shape = (texts * record.kv_heads, places, record.head_dim)
        layers = range(len(record.layers))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._ropes = record.ropes
        self._is_long = False
        self._make_tables()

    def _make_tables(self) -> None:
        device = self.keys[0].device
        made = [_tables(rope, self.places, self._is_long) for rope in self._ropes]
        self.tables = [(cosine.to(device), sine.to(device)) for cosine, sine in made]

    def text(self, index: int) -> KeyValueCache:
        """Return the part of one text, which shares its memory."""
        part = copy(self)
        heads = self.keys[0].shape[0] // self.texts
        own = slice(index * heads, (index + 1) * heads)
        part.keys, part.values = [k[own] for k in self.keys], [v[own] for v in self.values]
        part.texts = 1
        return part

    def turn(self, is_long: bool) -> None:
        """Fill the tables for long texts or for short ones; they stay where they are."""
        self._is_long = is_long
        for rope, tables in zip(self._ropes, self.tables, strict=True):
            for table, values in zip(tables, _tables(rope, self.places, is_long), strict=True):
                table.copy_(values)

    @property
    def places(self) -> int:
        """How many tokens fit."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def grow(self, places: int, used: int) -> None:
        """Make room for `places` tokens, keeping the first `used`; one tensor at a time."""
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                tensors[index] = old.new_zeros((old.shape[0], places, old.shape[2]))
                tensors[index][:, :used] = old[:, :used]
        self._make_tables()


def _tables(rope: Rope, places: int, is_long: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine, each (places, R/2) float32, the rope's factor included."""
    long = is_long and rope.switch is not None
    factor = rope.long_factor if long else rope.factor
    inverse = torch.tensor(rope.long_inverse_frequencies if long else rope.inverse_frequencies)
    angles = torch.arange(places, dtype=torch.float32)[:, None] * inverse
    return angles.cos() * factor, angles.sin() * factor


class TorchNetwork:
    """Computes what `record` describes with `weights`; the matrices compute in `dtype`."""

    def __init__(
        self,
        record: DecoderRecord,
        weights: TorchWeights,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Join record and weights.

        `waits` tells that a forward pass waits for the device, so that no graph can hold it: where
        experts are chosen, or attention has sinks, which the kernel for one token lacks.
        """
        self.record = record
        self.weights = weights
        self.device = device
        self.dtype = dtype
        self._ops = _operations(device)
        layers = record.layers
        self.waits = any(y.feed_forward.experts or y.attention.sinks for y in layers)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KeyValueCache,
        length: int | None,
        last_only: bool = True,
    ) -> torch.Tensor:
        """Read ids (M,) at positions (M,), both int64 on the device, into the cache.

        length: how many places of the cache are looked at, the last position included; None, for
        a single token of every text of the cache, lets the device find it in `positions`, so that
        the same launches serve every length.  Returns logits (M, V) float32, (1, V) if `last_only`.
        """
        weights, layers = self.weights, self.record.layers
        masks = {} if length is None else self._masks(positions, length)
        x = self._embed(ids, positions)
        h = self._normed(x, weights.layers[0].attention_in)
        for index, (told, layer) in enumerate(zip(layers, weights.layers, strict=True)):
            beside = self._normed(x, layer.ffn_in) if told.parallel else None
            delta = self._attention(index, told.attention, layer, h, positions, cache, masks)
            before = None if told.parallel else layer.ffn_in
            h = self._join(x, delta, layer.attention_out, layer.attention_sum, before)
            delta = self._feed_forward(told.feed_forward, layer, h if beside is None else beside)
            following = weights.layers[index + 1 : index + 2]
            after = following[0].attention_in if following else weights.final_norm
            h = self._join(x, delta, layer.ffn_out, layer.ffn_sum, after)
        return self._logits(h[-1:] if last_only else h)

    def _normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return (x if norm is None else self._ops.normalize(x, norm)).to(self.dtype)

    def _masks(self, positions: torch.Tensor, length: int) -> dict[int | None, torch.Tensor]:
        """Return for every window what each token sees of the first `length` places."""
        places = torch.arange(length, device=self.device)
        windows = {layer.attention.window for layer in self.record.layers}
        return {w: reference.visible(places, positions, w) for w in windows}

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the stream's first state, (M, hidden) float32."""
        x = self.weights.embedding.rows(ids).float() * self.record.embedding_scale
        if self.weights.project_in is not None:
            x = self.weights.project_in(x.to(self.dtype)).float()
        if self.weights.positions is not None:
            x += self.weights.positions.index_select(0, positions + self.record.position_offset)
        return x

    def _attention(
        self,
        index: int,
        told: described.Attention,
        layer: Layer,
        h: torch.Tensor,
        positions: torch.Tensor,
        cache: KeyValueCache,
        masks: dict[int | None, torch.Tensor],
    ) -> torch.Tensor:
        ops, keys, values = self._ops, cache.keys[index], cache.values[index]
        tables = (None, None) if told.rope is None else cache.tables[told.rope]
        qkv, norms = layer.qkv(h), (layer.q_norm, layer.k_norm)
        if not told.norms_over_heads:
            heads, width = self.record.kv_heads, self.record.head_dim
            qkv = reference.normalize_heads(qkv, norms, heads, width, over_one=False)
            norms = None, None
        texts = cache.texts
        q = ops.rotate_and_store(qkv, *tables, positions, norms, keys, values, texts)
        if not masks:
            rules = told.window, told.scale, told.softcap
            y = ops.attend_one(q, keys, values, positions, *rules, texts)
        else:
            mask = masks[told.window]
            seen = mask.shape[1]
            y = reference.attend(
                *(q, keys[:, :seen], values[:, :seen], mask),
                *(told.scale, told.softcap, layer.sinks),
            )
        return layer.o(y)

    def _feed_forward(
        self, told: described.FeedForward, layer: Layer, x: torch.Tensor
    ) -> torch.Tensor:
        if told.experts is None:
            return self._block(told, layer.blocks[0], x)
        assert layer.router is not None
        shares, routes = route(layer.router(x), told.experts)
        made = torch.zeros(x.shape[0], self.record.hidden, device=self.device)
        for index, (tokens, places) in routes.items():
            out = self._block(told, layer.blocks[index], x[tokens]).float()
            made.index_add_(0, tokens, out * shares[tokens, places, None])
        return made

    def _block(self, told: described.FeedForward, block: Block, x: torch.Tensor) -> torch.Tensor:
        up, gated = block.up(x), told.gate is not None
        if told.limit is None and (told.slope, told.up_offset) == (1, 0):
            return block.down(self._ops.activate(up, told.activation, gated))
        bounds = told.limit, told.slope, told.up_offset
        return block.down(reference.activate_bounded(up, told.activation, gated, *bounds))

    def _join(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        after: Norm | None,
        of_sum: Norm | None,
        before: Norm | None,
    ) -> torch.Tensor:
        """Add a block's output to the stream x in place; return what the next block reads."""
        scale, ops = self.record.residual_scale, self._ops
        if after is not None:
            delta = ops.normalize(delta, after)
        if of_sum is None:
            return ops.add_and_normalize(x, delta, scale, before, self.dtype)
        x.copy_(ops.add_and_normalize(x, delta, scale, of_sum, torch.float32))
        return self._normed(x, before)

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        if self.weights.project_out is not None:
            h = self.weights.project_out(h)
        logits = self.weights.head(h).float().mul_(self.record.logit_scale)
        cap = self.record.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


Routes = dict[int, tuple[torch.Tensor, torch.Tensor]]


def route(scores: torch.Tensor, experts: described.Experts) -> tuple[torch.Tensor, Routes]:
    """Choose the experts of each token by scores (M, count); waits for the device.

    Returns the chosen ones' shares (M, chosen) float32, and of each expert that is chosen by any:
    which tokens did, and as the how-manieth, both int64.
    """
    kept, picks = scores.float().topk(experts.chosen, dim=1)
    total = kept if experts.shares == "of_chosen" else scores.float()
    shares = (kept - total.logsumexp(1, keepdim=True)).exp()
    order = torch.argsort(picks.reshape(-1), stable=True)
    counts = torch.bincount(picks.reshape(-1), minlength=experts.count).tolist()
    parts = enumerate(order.split(counts))
    found = {e: (p // experts.chosen, p % experts.chosen) for e, p in parts if len(p)}
    return shares, found


def _operations(device: torch.device) -> ModuleType:
    """Return the module of the operations between matrices that suits `device`."""
    if device.type != "cuda" or not cuda.runs_kernels(device):
        return reference
    from cvxq_kernels.decode import launch

    return launch
