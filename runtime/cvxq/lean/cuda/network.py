"""The forward pass of a `DecoderSpec` in torch: ids and positions in, logits out.

The residual stream is float32, whatever the matrices compute in: at batch one it costs nothing,
and it keeps large activations of deep models out of float16's way.  What happens between the
matrices is in `cvxq_kernels.decode`, one call each, so that a GPU runs one kernel each.  A norm
always follows a residual sum, so the two are one operation, which is why a layer's first norm is
computed at the end of the layer before.
"""

from __future__ import annotations

from types import ModuleType

import torch
from cvxq_kernels.decode import Norm, reference

from cvxq.lean.cuda.weights import Layer, TorchWeights
from cvxq.lean.spec import DecoderSpec


class KeyValueCache:
    """Keys and values of all layers, each (KV, places, D), and the rotary tables.

    Places beyond the text hold zeros or what a rewound text left: finite, so that a weight of zero
    makes nothing of them.
    """

    def __init__(
        self, spec: DecoderSpec, places: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Allocate for `places` tokens."""
        shape = (spec.kv_heads, places, spec.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self._spec = spec
        self._make_tables()

    def _make_tables(self) -> None:
        self.cosine: torch.Tensor | None = None
        self.sine: torch.Tensor | None = None
        if self._spec.rope is not None:
            cosine, sine = self._spec.rope.tables(self.places)
            self.cosine = torch.from_numpy(cosine).to(self.keys[0].device)
            self.sine = torch.from_numpy(sine).to(self.keys[0].device)

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


class TorchNetwork:
    """Computes what `spec` describes with `weights`; the matrices compute in `dtype`."""

    def __init__(
        self, spec: DecoderSpec, weights: TorchWeights, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Join specification and weights."""
        self.spec = spec
        self.weights = weights
        self.device = device
        self.dtype = dtype
        self._ops = _operations(device)

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
        a single token, lets the device find it in `positions`, so that the same launches serve
        every length.  Returns logits (M, V) float32, (1, V) if `last_only`.
        """
        spec, weights = self.spec, self.weights
        masks = {} if length is None else self._masks(positions, length)
        x = self._embed(ids, positions)
        first = weights.layers[0].before_attention
        h = (x if first is None else self._ops.normalize(x, first)).to(self.dtype)
        for index, layer in enumerate(weights.layers):
            delta = self._attention(index, layer, h, positions, cache, masks)
            h = self._join(x, delta, layer.after_attention, layer.before_ffn)
            delta = layer.down(self._ops.activate(layer.up(h), spec.activation, spec.gated))
            following = weights.layers[index + 1 : index + 2]
            after = following[0].before_attention if following else weights.final_norm
            h = self._join(x, delta, layer.after_ffn, after)
        return self._logits(h[-1:] if last_only else h)

    def _masks(self, positions: torch.Tensor, length: int) -> dict[int | None, torch.Tensor]:
        """Return for every window what each token sees of the first `length` places."""
        places = torch.arange(length, device=self.device)
        return {w: reference.visible(places, positions, w) for w in set(self.spec.windows)}

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the stream's first state, (M, hidden) float32."""
        x = self.weights.embedding.rows(ids)
        if self.weights.project_in is not None:
            x = self.weights.project_in(x.to(self.dtype))
        x = x.float() * self.spec.embedding_scale
        if self.weights.positions is not None and self.spec.position_offset is not None:
            x += self.weights.positions.index_select(0, positions + self.spec.position_offset)
        return x

    def _attention(
        self,
        index: int,
        layer: Layer,
        h: torch.Tensor,
        positions: torch.Tensor,
        cache: KeyValueCache,
        masks: dict[int | None, torch.Tensor],
    ) -> torch.Tensor:
        spec, ops = self.spec, self._ops
        turns = spec.rope_layers[index]
        keys, values = cache.keys[index], cache.values[index]
        tables = (cache.cosine, cache.sine) if turns else (None, None)
        q = ops.rotate_and_store(layer.qkv(h), *tables, positions, layer.qk_norms, keys, values)
        window, scale, softcap = spec.windows[index], spec.attention_scale, spec.attention_softcap
        if not masks:
            y = ops.attend_one(q, keys, values, positions, window, scale, softcap)
        else:
            mask = masks[window]
            seen = mask.shape[1]
            y = reference.attend(q, keys[:, :seen], values[:, :seen], mask, scale, softcap)
        return layer.o(y)

    def _join(
        self, x: torch.Tensor, delta: torch.Tensor, after: Norm | None, before: Norm | None
    ) -> torch.Tensor:
        """Add a block's output to the stream x in place; return what the next block reads."""
        scale, ops = self.spec.residual_scale, self._ops
        if self.spec.norm_placement == "post":
            h = ops.add_and_normalize(x, delta, scale, after, torch.float32)
            x.copy_(h)
            return h.to(self.dtype)
        if after is not None:
            delta = ops.normalize(delta, after)
        return ops.add_and_normalize(x, delta, scale, before, self.dtype)

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        if self.weights.project_out is not None:
            h = self.weights.project_out(h)
        logits = self.weights.head(h).float() * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _operations(device: torch.device) -> ModuleType:
    """Return the module of the operations between matrices that suits `device`."""
    if device.type != "cuda":
        return reference
    from cvxq_kernels.decode import launch

    return launch
