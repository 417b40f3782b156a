"""A network → the record of what it computes, with the numbers that its modules hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from cvxq_format.decoder_record import (
    ANY_EXPERT,
    Attention,
    DecoderRecord,
    Experts,
    FeedForward,
    Layer,
    Norm,
    Part,
    Rope,
    Rows,
)
from torch import nn

from cvxq_converter.errors import NotDescribedError
from cvxq_converter.source.decoding import numbers
from cvxq_converter.source.decoding.families import Family, family_of


def describe(
    network: Any, names: Mapping[str, str], added_biases: Collection[str] = ()
) -> DecoderRecord:
    """Return the record of a causal LM of transformers.

    names: parameter of the network → tensor in the file; tied parameters take the embedding's.
    added_biases: tensors that are not in `names`, each the bias of the product named like it.
    Raises NotDescribedError, with the reason in one line, for an architecture that is not known,
    or a parameter that the record has no place for.
    """
    return _Describer(network, names, added_biases).record()


class _Describer:
    """One network and the names of its tensors; notes which of them the record mentions."""

    def __init__(
        self, network: Any, names: Mapping[str, str], added_biases: Collection[str]
    ) -> None:
        self._family: Family = family_of(network)
        self._network = network
        self._names = names
        self._added = set(added_biases)
        self._body = network.get_submodule(self._family.body)
        self._paths = {id(module): path for path, module in network.named_modules()}
        self._stored = _stored_names(network, names, self._module(self._family.embedding))
        self._used: set[str] = set()
        self._ropes: list[Rope] = []

    def record(self) -> DecoderRecord:
        """Describe the network from its embedding to its logits."""
        family, config = self._family, self._network.config
        embedding, head = self._module(family.embedding), self._network.get_output_embeddings()
        layers = self._module(family.layers)
        described = tuple(self._layer(layer, index) for index, layer in enumerate(layers))
        positions = self._module(family.positions) if family.positions else None
        cap = config.final_logit_softcapping if family.logit_softcap else None
        first = layers[0].get_submodule(family.attention)
        vocabulary, width = embedding.weight.shape
        record = DecoderRecord(
            vocabulary=vocabulary,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=self._kv_heads(),
            head_dim=_head_dim(first),
            ffn=self._ffn(layers[0]),
            context=numbers.context_of(config),
            embedding_width=width,
            embedding=self._weight(embedding),
            head=self._part(head),
            layers=described,
            ropes=tuple(self._ropes),
            final_norm=self._norm(self._module(family.final_norm)) if family.final_norm else None,
            positions=None if positions is None else self._weight(positions),
            position_offset=int(getattr(positions, "offset", 0)),
            project_in=self._part(self._module(family.project_in)) if family.project_in else None,
            project_out=(
                self._part(self._module(family.project_out)) if family.project_out else None
            ),
            embedding_scale=self._embedding_scale(embedding),
            residual_scale=self._residual_scale(layers),
            logit_scale=1 / getattr(config, family.logit_divisor) if family.logit_divisor else 1.0,
            logit_softcap=None if cap is None else float(cap),
            end_tokens=numbers.end_tokens(self._network),
        )
        self._check(record, head, layers)
        return record

    def _module(self, path: str) -> Any:
        return self._body.get_submodule(path)

    def _kv_heads(self) -> int:
        config = self._network.config
        given = getattr(config, "num_key_value_heads", None)
        return int(config.num_attention_heads if given is None else given)

    def _layer(self, layer: Any, index: int) -> Layer:
        family = self._family
        norms = {slot: self._norm(layer.get_submodule(n)) for slot, n in family.norms.items()}
        return Layer(
            attention=self._attention(layer.get_submodule(family.attention), index),
            feed_forward=self._feed_forward(layer),
            parallel=family.parallel,
            **norms,
        )

    def _attention(self, attention: Any, index: int) -> Attention:
        family = self._family
        q, k, v = self._qkv(attention)
        cap = getattr(attention, family.softcap) if family.softcap else None
        return Attention(
            q=q,
            k=k,
            v=v,
            o=self._part(attention.get_submodule(family.o)),
            scale=float(attention.scaling),
            q_norm=self._norm(attention.get_submodule(family.q_norm)) if family.q_norm else None,
            k_norm=self._norm(attention.get_submodule(family.k_norm)) if family.k_norm else None,
            norms_over_heads=family.norms_over_heads,
            softcap=None if cap is None else float(cap),
            window=self._window(index),
            rope=self._rope(index) if getattr(attention, "use_rope", True) else None,
            sinks=self._tensor(getattr(attention, family.sinks)) if family.sinks else None,
        )

    def _qkv(self, attention: Any) -> tuple[Part, Part, Part]:
        family = self._family
        if family.qkv is None:
            parts = [self._part(attention.get_submodule(n)) for n in (family.q, family.k, family.v)]
            return parts[0], parts[1], parts[2]
        module, size = attention.get_submodule(family.qkv), _head_dim(attention)
        if family.heads_take_turns:
            rows = [Rows(size * place, size, 3 * size) for place in range(3)]
        else:
            queries, keys = (
                n * size for n in (self._network.config.num_attention_heads, self._kv_heads())
            )
            rows = [
                Rows(0, queries, queries),
                Rows(queries, keys, keys),
                Rows(queries + keys, keys, keys),
            ]
        q, k, v = (self._part(module, part) for part in rows)
        return q, k, v

    def _ffn(self, layer: Any) -> int:
        family = self._family
        if family.experts is not None:
            return self._rows_of(layer.get_submodule(f"{family.experts}.0.up_proj"))
        rows = self._rows_of(layer.get_submodule(family.gate_up or family.up))
        return rows // (2 if family.gate_up else 1)

    def _mixture(self, layer: Any) -> FeedForward:
        """The experts of a layer, each part named once for all of them."""
        family = self._family
        experts, router = (layer.get_submodule(n) for n in (family.experts, family.router))
        gate, up, down = (
            self._of_all(
                [getattr(getattr(experts, str(e)), role) for e in range(len(router.weight))]
            )
            for role in ("gate_proj", "up_proj", "down_proj")
        )
        bounds = {}
        if family.bounded:
            bounds = {"limit": experts.limit, "slope": experts.alpha, "up_offset": 1.0}
        act = (
            "silu"
            if family.bounded
            else numbers.activation_of(layer.get_submodule(family.activation))
        )
        return FeedForward(
            up=up,
            down=down,
            activation=act,
            gate=gate,
            experts=Experts(len(router.weight), router.top_k, self._part(router), family.shares),
            **{key: float(value) for key, value in bounds.items()},
        )

    def _of_all(self, modules: list[Any]) -> Part:
        """One part for what all experts have, with the place of their number marked."""
        parts = [self._part(module) for module in modules]
        weight = _marked([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        if biases and len(biases) < len(parts):
            raise NotDescribedError("experts of which only some have a bias are not described")
        return Part(weight, _marked(biases) if biases else None)

    def _feed_forward(self, layer: Any) -> FeedForward:
        family = self._family
        if family.experts is not None:
            return self._mixture(layer)
        if family.gate_up is not None:
            fused = layer.get_submodule(family.gate_up)
            half = self._rows_of(fused) // 2
            gate: Part | None = self._part(fused, Rows(0, half, half))
            up = self._part(fused, Rows(half, half, half))
        else:
            gate = self._part(layer.get_submodule(family.gate)) if family.gate else None
            up = self._part(layer.get_submodule(family.up))
        return FeedForward(
            up=up,
            down=self._part(layer.get_submodule(family.down)),
            activation=numbers.activation_of(layer.get_submodule(family.activation)),
            gate=gate,
        )

    def _layer_type(self, index: int) -> str | None:
        types = getattr(self._network.config, "layer_types", None)
        return None if types is None else str(types[index])

    def _window(self, index: int) -> int | None:
        """How many keys, itself included, a query of the layer sees; None for all."""
        windows, kind = self._family.windows, self._layer_type(index)
        if windows == "by layer type":
            if kind not in ("full_attention", "sliding_attention"):
                raise NotDescribedError(f"a layer of type {kind!r} is not described")
            if kind == "full_attention":
                return None
        window = self._network.config.sliding_window if windows != "never" else None
        return None if window is None else int(window)

    def _rope(self, index: int) -> int | None:
        """Index of the layer's angles among those of the record."""
        if self._family.rope is None:
            return None
        rope = numbers.rope_of(self._module(self._family.rope), self._layer_type(index))
        if rope not in self._ropes:
            self._ropes.append(rope)
        return self._ropes.index(rope)

    def _embedding_scale(self, embedding: Any) -> float:
        attribute = self._family.embedding_scale
        if attribute is None:
            return 1.0
        owner = embedding if hasattr(embedding, attribute) else self._body
        return numbers.scale_of(owner, attribute, embedding.weight.dtype)

    def _residual_scale(self, layers: Any) -> float:
        attribute = self._family.residual_scale
        if attribute is None:
            return 1.0
        scales = {float(getattr(layer, attribute)) for layer in layers}
        if len(scales) > 1:
            raise NotDescribedError("layers whose residual scales differ are not described")
        return scales.pop()

    def _weight(self, module: Any) -> str:
        """Name of the tensor of a module's weight."""
        return self._tensor(module.weight)

    def _tensor(self, parameter: Any) -> str:
        name = self._stored[id(parameter)]
        self._used.add(name)
        return name

    def _bias(self, module: Any) -> str | None:
        """Name of the bias that the module has, or that was added to it."""
        path = self._paths[id(module)]
        own = self._names.get(f"{path}.bias")
        if own is None:
            weight = self._names[f"{path}.weight"]
            tied = weight == self._stored[id(module.weight)] and self._is_table(module.weight)
            added = f"{path}.bias" if tied else weight.removesuffix("weight") + "bias"
            own = added if added in self._added else None
        if own is not None:
            self._used.add(own)
        return own

    def _is_table(self, weight: Any) -> bool:
        return weight is self._module(self._family.embedding).weight

    def _part(self, module: Any, rows: Rows | None = None) -> Part:
        return Part(self._weight(module), self._bias(module), rows)

    def _rows_of(self, module: Any) -> int:
        """Outputs of a linear map; GPT-2's are stored as inputs × outputs."""
        return int(module.weight.shape[0 if isinstance(module, nn.Linear) else 1])

    def _norm(self, module: Any) -> Norm:
        is_layer = numbers.is_layer_norm(module)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        name = None if weight is None else self._weight(module)
        return Norm(
            kind="layer" if is_layer else "rms",
            epsilon=numbers.norm_epsilon(module),
            weight=name,
            bias=None if bias is None else self._bias(module),
            offset=0.0 if is_layer else self._family.norm_offset,
        )

    def _check(self, record: DecoderRecord, head: Any, layers: Any) -> None:
        """Raise NotDescribedError if a tensor was left out, or sizes are not those expected."""
        for name in [*self._stored.values(), *self._added]:
            if name not in self._used:
                raise NotDescribedError(f"the tensor {name} has no place in a decoder's record")
        sizes = {_head_dim(layer.get_submodule(self._family.attention)) for layer in layers}
        if len(head.weight) != record.vocabulary or len(sizes) > 1:
            raise NotDescribedError("a head of another size than the embedding, or layers unlike")


def _stored_names(network: Any, names: Mapping[str, str], embedding: Any) -> dict[int, str]:
    """id(parameter) → the tensor that the file keeps for it, the embedding's for a tied head."""
    stored: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name in names and (id(parameter) not in stored or parameter is embedding.weight):
            stored.setdefault(id(parameter), names[name])
    for name, module in network.named_modules():
        if module is embedding:
            stored[id(embedding.weight)] = names[f"{name}.weight"]
    return stored


def _marked(names: list[str]) -> str:
    """The names of all experts' tensors, 0 first, as one with `ANY_EXPERT` for their number."""
    for match in re.finditer(r"(?<![0-9])0(?![0-9])", names[0]):
        marked = names[0][: match.start()] + ANY_EXPERT + names[0][match.end() :]
        if names == [marked.replace(ANY_EXPERT, str(i)) for i in range(len(names))]:
            return marked
    if len(names) == 1 and ANY_EXPERT not in names[0]:
        return names[0]
    raise NotDescribedError(f"the experts' tensors beside {names[0]} are not numbered")


def _head_dim(attention: Any) -> int:
    return int(getattr(attention, "head_dim", None) or attention.head_size)
