"""What a decoder has to compute, read from a config.json without transformers.

`read_spec` accepts a model only if every field of its configuration is known: implemented by both
lean decoders, or known to change nothing.  Everything else is a `NotLeanError` with its reason,
upon which the model runs through transformers; so a lean decoder never computes something else
than the original silently.

The network, in the order of computation, with s the spec:

    x = embed[ids] · s.embedding_scale                  (OPT: project_in, + positions[i + offset])
    per layer, "pre":       x += r · attention(norm(x));        x += r · ffn(norm(x))
               "sandwich":  x += r · norm(attention(norm(x)));  x += r · norm(ffn(norm(x)))
               "post":      x = norm(x + r · attention(x));     x = norm(x + r · ffn(x))
    logits = head(norm(x)) · s.logit_scale, soft-capped         (OPT: project_out before the head)

with r = s.residual_scale, soft-capping c · tanh(y / c), and ffn(x) = down(act(gate(x)) · up(x)) or
down(act(up(x))).  Attention turns queries and keys after their norms (RMS per head), scales
scores by s.attention_scale, soft-caps them, then masks: query i sees keys j ≤ i with i − j below
the layer's window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cvxq.lean.errors import NotLeanError
from cvxq.lean.families import DEFAULT_THETA, DEFAULTS, HARMLESS, NEUTRAL, ROPE_FIELDS
from cvxq.lean.fields import Activation, Fields, short
from cvxq.lean.rope import Rope, read_rope, rope_settings


@dataclass(frozen=True)
class DecoderSpec:
    """Everything mathematical of one decoder-only transformer.

    Sizes are counts; context: the most positions; embedding_width: columns of the embedding
    (hidden, unless OPT projects).  norm_offset is added to every stored norm weight (Gemma: 1);
    norm_affine: norms have weights, and biases too when norm is "layer".  rope_layers says which
    layers turn queries and keys; position_offset: rows of the learned position table before
    position 0, None without such a table.  windows: per layer, None = all keys.
    """

    model_type: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    embedding_width: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float
    norm_affine: bool
    norm_placement: Literal["pre", "post", "sandwich"]
    final_norm: bool
    activation: Activation
    gated: bool
    rope: Rope | None
    rope_layers: tuple[bool, ...]
    position_offset: int | None
    qk_norm: bool
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    embedding_scale: float
    residual_scale: float
    logit_scale: float

    @property
    def norm_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.norm == "layer" and self.norm_affine


def read_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Return what the model of `config` (a parsed config.json) computes.

    Raises NotLeanError, with one line that says why, for anything that is not implemented.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise NotLeanError(f"model type {kind!r} has no lean decoder")
    _check_fields(kind, config)
    fields = Fields({name: config.get(name, value) for name, value in DEFAULTS[kind].items()})
    return _opt(fields) if kind == "opt" else _llama_like(kind, fields, config)


def _check_fields(kind: str, config: Mapping[str, Any]) -> None:
    """Raise NotLeanError for a field that is not known to be implemented or harmless."""
    known = DEFAULTS[kind].keys() | HARMLESS | (ROPE_FIELDS if kind != "opt" else set())
    for name, value in config.items():
        if name in known:
            continue
        if not any(type(value) is type(n) and value == n for n in NEUTRAL.get(name, ())):
            raise NotLeanError(f"config field {name!r} = {short(value)} of {kind} is unknown")


def _llama_like(kind: str, fields: Fields, config: Mapping[str, Any]) -> DecoderSpec:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise NotLeanError(f"{heads} attention heads are no multiple of {kv_heads} key-value heads")
    if fields.values.get("head_dim") is None and hidden % heads:
        raise NotLeanError(f"hidden size {hidden} is no multiple of {heads} attention heads")
    head_dim = fields.count("head_dim", hidden // heads)
    if kind == "stablelm" and head_dim * heads != hidden:
        raise NotLeanError(f"head_dim {head_dim} is not hidden size / heads, which stablelm uses")
    layers, context = fields.count("num_hidden_layers"), fields.count("max_position_embeddings")
    settings = rope_settings(config, DEFAULT_THETA.get(kind, 10_000.0))
    if kind == "stablelm":
        settings.setdefault("partial_rotary_factor", fields.values["partial_rotary_factor"])
    elif settings.get("partial_rotary_factor") not in (None, 1.0):
        raise NotLeanError(f"partial_rotary_factor in a model of type {kind}, which ignores it")
    rope_layers = _rope_layers(kind, fields, layers)
    attention_bias = "attention_bias" in fields.values and fields.flag("attention_bias")
    gemma = kind == "gemma2"
    return DecoderSpec(
        model_type=kind,
        vocab=fields.count("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=fields.count("intermediate_size"),
        context=context,
        embedding_width=hidden,
        norm="layer" if kind == "stablelm" else "rms",
        norm_eps=fields.number("layer_norm_eps" if kind == "stablelm" else "rms_norm_eps"),
        norm_offset=1.0 if gemma else 0.0,
        norm_affine=True,
        norm_placement="sandwich" if gemma else "pre",
        final_norm=True,
        activation=fields.activation("hidden_activation" if gemma else "hidden_act"),
        gated=True,
        rope=read_rope(settings, head_dim, context),
        rope_layers=rope_layers,
        position_offset=None,
        qk_norm=kind == "qwen3",
        attention_scale=_attention_scale(kind, fields, head_dim),
        attention_softcap=fields.optional("attn_logit_softcapping"),
        logit_softcap=fields.optional("final_logit_softcapping"),
        windows=_windows(kind, fields, rope_layers),
        qkv_bias=kind == "qwen2"
        or (fields.flag("use_qkv_bias") if kind == "stablelm" else attention_bias),
        o_bias=attention_bias,
        mlp_bias="mlp_bias" in fields.values and fields.flag("mlp_bias"),
        tied=fields.flag("tie_word_embeddings"),
        embedding_scale=math.sqrt(hidden) if gemma else fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / fields.number("logits_scaling", 1.0),
    )


def _opt(fields: Fields) -> DecoderSpec:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    layers = fields.count("num_hidden_layers")
    if hidden % heads:
        raise NotLeanError(f"hidden size {hidden} is no multiple of {heads} attention heads")
    before, bias = fields.flag("do_layer_norm_before"), fields.flag("enable_bias")
    return DecoderSpec(
        model_type="opt",
        vocab=fields.count("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=fields.count("ffn_dim"),
        context=fields.count("max_position_embeddings"),
        embedding_width=fields.count("word_embed_proj_dim", hidden),
        norm="layer",
        norm_eps=1e-5,
        norm_offset=0.0,
        norm_affine=fields.flag("layer_norm_elementwise_affine"),
        norm_placement="pre" if before else "post",
        final_norm=before and not fields.flag("_remove_final_layer_norm"),
        activation=fields.activation("activation_function"),
        gated=False,
        rope=None,
        rope_layers=(False,) * layers,
        position_offset=2,
        qk_norm=False,
        attention_scale=(hidden // heads) ** -0.5,
        attention_softcap=None,
        logit_softcap=None,
        windows=(None,) * layers,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tied=fields.flag("tie_word_embeddings"),
        embedding_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
    )


def _attention_scale(kind: str, fields: Fields, head_dim: int) -> float:
    if kind == "granite":
        return fields.number("attention_multiplier")
    if kind == "gemma2":
        return fields.number("query_pre_attn_scalar") ** -0.5
    return head_dim**-0.5


def _rope_layers(kind: str, fields: Fields, layers: int) -> tuple[bool, ...]:
    """Which layers turn queries and keys: all but SmolLM3's every fourth."""
    if kind != "smollm3":
        return (True,) * layers
    chosen = fields.values["no_rope_layers"]
    if chosen is None:
        interval = fields.count("no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if (
        not isinstance(chosen, list)
        or len(chosen) < layers
        or any(turned not in (0, 1) for turned in chosen)
    ):
        raise NotLeanError(f"no_rope_layers is {short(chosen)}, not a list of {layers} zeros, ones")
    return tuple(bool(turned) for turned in chosen[:layers])


def _windows(kind: str, fields: Fields, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
    """How many keys, itself included, each layer's queries see; None for all."""
    layers = len(rope_layers)
    window = None
    if fields.values.get("sliding_window") is not None and (
        "use_sliding_window" not in fields.values or fields.flag("use_sliding_window")
    ):
        window = fields.count("sliding_window")
    if kind == "mistral":
        return (window,) * layers
    types = fields.values.get("layer_types")
    if types is None and kind == "gemma2":
        slides = [layer % 2 == 0 for layer in range(layers)]
    elif types is None and kind == "smollm3":
        slides = [window is not None and not turned for turned in rope_layers]
    elif types is None and kind in ("qwen2", "qwen3"):
        first = fields.count("max_window_layers", zero=True) if window is not None else layers
        slides = [layer >= first for layer in range(layers)]
    elif types is None:
        slides = [False] * layers
    else:
        if not isinstance(types, list) or len(types) != layers:
            raise NotLeanError(f"layer_types is {short(types)}, not a list of {layers}")
        strangers = [name for name in types if name not in ("full_attention", "sliding_attention")]
        if strangers:
            raise NotLeanError(f"layer type {strangers[0]!r} has no lean decoder")
        slides = [name == "sliding_attention" for name in types]
    if any(slides) and window is None:
        raise NotLeanError("layer_types has sliding_attention, but no sliding window is set")
    return tuple(window if slide else None for slide in slides)
