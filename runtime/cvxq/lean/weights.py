"""Where a decoder's weights lie in a `.cvxq` file.

`find_weights` names the tensors of every slot of a `DecoderSpec` and checks that each is in the
file with the shape that the specification asks for, and that nothing is left over.  Prefixes,
aliases and tied heads are matched by the rules of `cvxq.names`, as on the transformers path; biases
that conversion added are found where the source had none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cvxq_format import CompandedTensor, Reader, dequantize

from cvxq.errors import InconsistentFileError
from cvxq.lean.errors import NotLeanError
from cvxq.lean.spec import DecoderSpec
from cvxq.names import match_names


@dataclass(frozen=True)
class Matrix:
    """A linear map (N, K): names of the tensors of its weight and of its bias (N,), if any."""

    weight: str
    bias: str | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Norm:
    """Tensors of a norm's weight and bias, each (n,); None where it has none."""

    weight: str | None
    bias: str | None


@dataclass(frozen=True)
class LayerWeights:
    """The slots of one layer; `before` norms precede a block, `after` norms follow it.

    "pre" has the two before, "post" the two after, "sandwich" all four.  "post" norms follow the
    residual sum, those of "sandwich" come before it (`spec.py`).
    """

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix | None
    up: Matrix
    down: Matrix
    q_norm: Norm | None
    k_norm: Norm | None
    before_attention: Norm | None
    after_attention: Norm | None
    before_ffn: Norm | None
    after_ffn: Norm | None


@dataclass(frozen=True)
class DecoderWeights:
    """Tensor names of a whole decoder, as the file spells them, aliases resolved.

    A tied head has the same `weight` as the embedding (V, W).  positions: (context + offset,
    hidden); project_in (hidden, W) and project_out (W, hidden) only where W is not hidden.
    """

    embedding: str
    positions: str | None
    project_in: Matrix | None
    project_out: Matrix | None
    layers: tuple[LayerWeights, ...]
    final_norm: Norm | None
    head: Matrix


def find_weights(spec: DecoderSpec, reader: Reader) -> DecoderWeights:
    """Find every tensor that `spec` needs in the open file.

    Raises NotLeanError when a tensor is missing, left over or of another shape; the transformers
    path, which then takes over, knows best whether that is an error.
    """
    slots = _Slots(spec, reader)
    weights = _decoder(spec, slots)
    slots.check(reader)
    return weights


def read_floats(reader: Reader, name: str) -> npt.NDArray[np.float32]:
    """Return a small tensor (a norm, a bias, positions) as float32, expanded if it is packed."""
    value = reader.read(name)
    if isinstance(value, CompandedTensor):
        return dequantize(value, reader.codebook(value.codebook))
    return value.to_float32().reshape(value.shape)


class _Slots:
    """Names as the architecture has them, and what the file calls them."""

    def __init__(self, spec: DecoderSpec, reader: Reader) -> None:
        """Match all names of the architecture at once, so that leftovers are noticed."""
        parameters = _parameters(spec)
        self._shapes = parameters
        head = "lm_head.weight"
        embedding = next(name for name in parameters if name.endswith("embed_tokens.weight"))
        try:
            self._found = match_names(
                [*reader.names, *reader.aliases],
                parameters,
                [[embedding, head]] if spec.tied else [],
                prefix="model",
                added_biases=reader.added_biases,
                network=f"the {spec.model_type} decoder",
            )
        except InconsistentFileError as error:
            raise NotLeanError(str(error)) from None
        self._aliases = reader.aliases

    def name(self, parameter: str) -> str | None:
        """Return the file's tensor for `parameter`, or None when there is none."""
        tensor = self._found.get(parameter)
        return None if tensor is None else self._aliases.get(tensor, tensor)

    def needed(self, parameter: str) -> str:
        """Return the file's tensor for a parameter that every such decoder has."""
        return self._aliases.get(self._found[parameter], self._found[parameter])

    def matrix(self, module: str) -> Matrix:
        """Return the tensors of a linear map."""
        outputs, inputs = self._shapes[f"{module}.weight"]
        bias = self.name(f"{module}.bias")
        return Matrix(self.needed(f"{module}.weight"), bias, (outputs, inputs))

    def norm(self, module: str) -> Norm:
        """Return the tensors of a norm."""
        return Norm(self.name(f"{module}.weight"), self.name(f"{module}.bias"))

    def check(self, reader: Reader) -> None:
        """Raise NotLeanError for a shape that is not the parameter's, or a bias nothing adds."""
        for parameter, tensor in self._found.items():
            expected = self._shapes.get(parameter)
            if expected is None:  # a bias that conversion added
                module = parameter.removesuffix(".bias")
                expected = self._shapes[f"{module}.weight"][:1]
                if "embed_" in module or "norm" in module:
                    raise NotLeanError(f"{module!r} has an added bias, {tensor!r}")
            found = tuple(reader.entry(tensor).shape)
            if found != expected:
                raise NotLeanError(
                    f"tensor {tensor!r} has shape {found}, the {parameter!r} of the config needs "
                    f"{expected}"
                )


def _decoder(spec: DecoderSpec, slots: _Slots) -> DecoderWeights:
    opt = spec.model_type == "opt"
    root = "model.decoder" if opt else "model"
    projects = spec.embedding_width != spec.hidden
    layer = _opt_layer if opt else _llama_layer
    return DecoderWeights(
        embedding=slots.needed(f"{root}.embed_tokens.weight"),
        positions=slots.name(f"{root}.embed_positions.weight"),
        project_in=slots.matrix(f"{root}.project_in") if projects else None,
        project_out=slots.matrix(f"{root}.project_out") if projects else None,
        layers=tuple(layer(spec, slots, f"{root}.layers.{i}") for i in range(spec.layers)),
        final_norm=slots.norm(_final_norm(spec)) if spec.final_norm else None,
        head=slots.matrix("lm_head"),
    )


def _llama_layer(spec: DecoderSpec, slots: _Slots, root: str) -> LayerWeights:
    sandwich = spec.norm_placement == "sandwich"
    attention = f"{root}.self_attn"
    after = slots.norm(f"{root}.post_attention_layernorm")
    return LayerWeights(
        q=slots.matrix(f"{attention}.q_proj"),
        k=slots.matrix(f"{attention}.k_proj"),
        v=slots.matrix(f"{attention}.v_proj"),
        o=slots.matrix(f"{attention}.o_proj"),
        gate=slots.matrix(f"{root}.mlp.gate_proj"),
        up=slots.matrix(f"{root}.mlp.up_proj"),
        down=slots.matrix(f"{root}.mlp.down_proj"),
        q_norm=slots.norm(f"{attention}.q_norm") if spec.qk_norm else None,
        k_norm=slots.norm(f"{attention}.k_norm") if spec.qk_norm else None,
        before_attention=slots.norm(f"{root}.input_layernorm"),
        # Llama's "post-attention" norm is the one before the feed-forward block.
        after_attention=after if sandwich else None,
        before_ffn=slots.norm(f"{root}.pre_feedforward_layernorm") if sandwich else after,
        after_ffn=slots.norm(f"{root}.post_feedforward_layernorm") if sandwich else None,
    )


def _opt_layer(spec: DecoderSpec, slots: _Slots, root: str) -> LayerWeights:
    before = spec.norm_placement == "pre"
    attention = slots.norm(f"{root}.self_attn_layer_norm")
    ffn = slots.norm(f"{root}.final_layer_norm")
    return LayerWeights(
        q=slots.matrix(f"{root}.self_attn.q_proj"),
        k=slots.matrix(f"{root}.self_attn.k_proj"),
        v=slots.matrix(f"{root}.self_attn.v_proj"),
        o=slots.matrix(f"{root}.self_attn.out_proj"),
        gate=None,
        up=slots.matrix(f"{root}.fc1"),
        down=slots.matrix(f"{root}.fc2"),
        q_norm=None,
        k_norm=None,
        before_attention=attention if before else None,
        after_attention=None if before else attention,
        before_ffn=ffn if before else None,
        after_ffn=None if before else ffn,
    )


def _final_norm(spec: DecoderSpec) -> str:
    return "model.decoder.final_layer_norm" if spec.model_type == "opt" else "model.norm"


def _parameters(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the architecture, by transformers' name, with its shape."""
    opt = spec.model_type == "opt"
    root = "model.decoder" if opt else "model"
    hidden, width = spec.hidden, spec.embedding_width
    shapes: dict[str, tuple[int, ...]] = {f"{root}.embed_tokens.weight": (spec.vocab, width)}

    def matrix(module: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{module}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{module}.bias"] = (outputs,)

    def norms(modules: Collection[str], size: int, bias: bool) -> None:
        for module in modules:
            if spec.norm_affine:
                shapes[f"{module}.weight"] = (size,)
            if bias:
                shapes[f"{module}.bias"] = (size,)

    if spec.position_offset is not None:
        shapes[f"{root}.embed_positions.weight"] = (spec.context + spec.position_offset, hidden)
    if width != hidden:
        matrix(f"{root}.project_in", hidden, width, False)
        matrix(f"{root}.project_out", width, hidden, False)
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for index in range(spec.layers):
        layer = f"{root}.layers.{index}"
        for letter, outputs in (("q", queries), ("k", keys), ("v", keys)):
            matrix(f"{layer}.self_attn.{letter}_proj", outputs, hidden, spec.qkv_bias)
        matrix(f"{layer}.self_attn.{'out' if opt else 'o'}_proj", hidden, queries, spec.o_bias)
        if spec.gated:
            matrix(f"{layer}.mlp.gate_proj", spec.ffn, hidden, spec.mlp_bias)
        up, down = ("fc1", "fc2") if opt else ("mlp.up_proj", "mlp.down_proj")
        matrix(f"{layer}.{up}", spec.ffn, hidden, spec.mlp_bias)
        matrix(f"{layer}.{down}", hidden, spec.ffn, spec.mlp_bias)
        names = ["self_attn_layer_norm", "final_layer_norm"]
        if not opt:
            names = ["input_layernorm", "post_attention_layernorm"]
        if spec.norm_placement == "sandwich":
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        norms([f"{layer}.{name}" for name in names], hidden, spec.norm_bias)
        if spec.qk_norm:
            attention = f"{layer}.self_attn"
            norms([f"{attention}.q_norm", f"{attention}.k_norm"], spec.head_dim, False)
    if spec.final_norm:
        norms([_final_norm(spec)], hidden, spec.norm_bias)
    matrix("lm_head", spec.vocab, width, False)
    return shapes
