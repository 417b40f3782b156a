"""How the networks of each family are put together: which module does what, under which name.

`FAMILIES[class name](network)` says where things are; it holds no number that a module or a
configuration knows. A class that is not in the table is not described.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cvxq_converter.errors import NotDescribedError


@dataclass(frozen=True)
class Family:
    """Module names, relative to the network, to its body or to a layer; None for what is absent.

    windows: layers slide never, always, or where `config.layer_types` says so. qkv and gate_up:
    one module for several products; heads_take_turns: its rows are q, k, v of one head after the
    other, instead of all of q first. norms: slot of `decoder_record.Layer` → module.
    norm_offset: what norms add to their weights. softcap: attribute of the attention module.
    residual_scale: attribute of a layer. embedding_scale: of the embedding, or else of the body.
    experts: the module that holds a layer's, in place of gate, up and down. bounded: gates are as
    those of gpt-oss. sinks: parameter of the attention module.
    """

    body: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    layers: str = "layers"
    final_norm: str | None = "norm"
    rope: str | None = "rotary_emb"

    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str | None = None
    heads_take_turns: bool = False
    q_norm: str | None = None
    k_norm: str | None = None
    norms_over_heads: bool = True
    softcap: str | None = None
    windows: Literal["never", "always", "by layer type"] = "never"

    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate_up: str | None = None
    activation: str = "mlp.act_fn"
    experts: str | None = None
    router: str = "mlp.gate"
    shares: Literal["of_chosen", "of_all"] = "of_chosen"
    bounded: bool = False
    sinks: str | None = None

    norms: Mapping[str, str] = field(
        default_factory=lambda: {
            "attention_in": "input_layernorm",
            "ffn_in": "post_attention_layernorm",
        }
    )
    parallel: bool = False
    norm_offset: float = 0.0
    embedding_scale: str | None = None
    residual_scale: str | None = None
    logit_softcap: bool = False  # whether the logits are capped as config.final_logit_softcapping
    logit_divisor: str | None = None  # field of the configuration


_LLAMA = Family()
_QWEN2 = replace(_LLAMA, windows="by layer type")
_QWEN3 = replace(_QWEN2, q_norm="q_norm", k_norm="k_norm")
_QWEN3_MOE = replace(_LLAMA, q_norm="q_norm", k_norm="k_norm", windows="always")
_UNGATED = replace(_LLAMA, gate=None, activation="mlp.act")
_SANDWICH = {
    "attention_in": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "ffn_in": "pre_feedforward_layernorm",
    "ffn_out": "post_feedforward_layernorm",
}
_OLMO2 = replace(
    _LLAMA,
    q_norm="q_norm",
    k_norm="k_norm",
    norms_over_heads=False,
    norms={
        "attention_out": "post_attention_layernorm",
        "ffn_out": "post_feedforward_layernorm",
    },
)


def _gemma(network: Any) -> Family:
    _refuse(network, "use_bidirectional_attention")
    return replace(_LLAMA, norm_offset=1.0, embedding_scale="embed_scale")


def _gemma2(network: Any) -> Family:
    return replace(
        _gemma(network),
        norms=_SANDWICH,
        softcap="attn_logit_softcapping",
        logit_softcap=True,
        windows="by layer type",
    )


def _gemma3(network: Any) -> Family:
    """Gemma 2 with normed queries and keys; attention never caps its scores."""
    return replace(_gemma2(network), q_norm="q_norm", k_norm="k_norm", softcap=None)


def _granite(network: Any) -> Family:
    return replace(
        _LLAMA,
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    )


def _phi3(network: Any) -> Family:
    return replace(
        _LLAMA,
        qkv="qkv_proj",
        gate_up="mlp.gate_up_proj",
        activation="mlp.activation_fn",
        windows="always",
    )


def _phi(network: Any) -> Family:
    """Both branches read the same normed input."""
    normed = bool(network.config.qk_layernorm)
    return replace(
        _UNGATED,
        o="dense",
        q_norm="q_layernorm" if normed else None,
        k_norm="k_layernorm" if normed else None,
        up="mlp.fc1",
        down="mlp.fc2",
        activation="mlp.activation_fn",
        parallel=True,
        norms={"attention_in": "input_layernorm", "ffn_in": "input_layernorm"},
        final_norm="final_layernorm",
    )


def _stablelm(network: Any) -> Family:
    """A parallel layer has one norm for both branches."""
    _refuse(network, "qk_layernorm")
    if not network.config.use_parallel_residual:
        return _LLAMA
    shared = {"attention_in": "input_layernorm", "ffn_in": "input_layernorm"}
    return replace(_LLAMA, parallel=True, norms=shared)


def _starcoder2(network: Any) -> Family:
    return replace(_UNGATED, up="mlp.c_fc", down="mlp.c_proj", windows="always")


def _opt(network: Any) -> Family:
    decoder = network.model.decoder
    before = bool(network.config.do_layer_norm_before)
    places = ("attention_in", "ffn_in") if before else ("attention_sum", "ffn_sum")
    return Family(
        body="model.decoder",
        positions="embed_positions",
        project_in="project_in" if decoder.project_in is not None else None,
        project_out="project_out" if decoder.project_out is not None else None,
        final_norm="final_layer_norm" if decoder.final_layer_norm is not None else None,
        rope=None,
        o="out_proj",
        gate=None,
        up="fc1",
        down="fc2",
        activation="activation_fn",
        norms=dict(zip(places, ("self_attn_layer_norm", "final_layer_norm"), strict=True)),
    )


def _gpt2(network: Any) -> Family:
    return Family(
        body="transformer",
        embedding="wte",
        positions="wpe",
        layers="h",
        final_norm="ln_f",
        rope=None,
        attention="attn",
        qkv="c_attn",
        o="c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        activation="mlp.act",
        norms={"attention_in": "ln_1", "ffn_in": "ln_2"},
    )


def _gpt_neox(network: Any) -> Family:
    return Family(
        body="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        qkv="query_key_value",
        heads_take_turns=True,
        o="dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        activation="mlp.act",
        parallel=bool(network.config.use_parallel_residual),
    )


def _of_experts(family: Family, network: Any, normalizes: bool = True, **changes: Any) -> Family:
    """A family whose layers all have experts, in place of their feed-forward blocks.

    normalizes: whether shares are always made to add up to 1, else the configuration says.
    """
    dense = getattr(network.config, "mlp_only_layers", None)
    if dense or getattr(network.config, "decoder_sparse_step", 1) != 1:
        raise NotDescribedError("layers of which only some have experts are not described")
    of_chosen = normalizes or network.config.norm_topk_prob
    found = {"experts": "mlp.experts", "activation": "mlp.experts.act_fn", **changes}
    return replace(family, shares="of_chosen" if of_chosen else "of_all", **found)


def _olmoe(network: Any) -> Family:
    """Like OLMo 2 in its attention only."""
    if network.config.clip_qkv is not None:
        raise NotDescribedError("queries, keys and values that are clipped are not described")
    normed = replace(_LLAMA, q_norm="q_norm", k_norm="k_norm", norms_over_heads=False)
    return _of_experts(normed, network, normalizes=False)


def _gpt_oss(network: Any) -> Family:
    return _of_experts(
        replace(_LLAMA, windows="by layer type"),
        network,
        router="mlp.router",
        bounded=True,
        sinks="sinks",
    )


def _granite_moe(network: Any) -> Family:
    block = "block_sparse_moe"
    return _of_experts(
        _granite(network),
        network,
        experts=f"{block}.experts",
        router=f"{block}.router",
        activation=f"{block}.experts.act_fn",
    )


FAMILIES: Mapping[str, Callable[[Any], Family]] = {
    "LlamaForCausalLM": lambda _: _LLAMA,
    "MistralForCausalLM": lambda _: replace(_LLAMA, windows="always"),
    "Qwen2ForCausalLM": lambda _: _QWEN2,
    "Qwen3ForCausalLM": lambda _: _QWEN3,
    "SmolLM3ForCausalLM": lambda _: _QWEN2,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "GraniteForCausalLM": _granite,
    "Olmo2ForCausalLM": lambda _: _OLMO2,
    "Olmo3ForCausalLM": lambda _: replace(_OLMO2, windows="by layer type"),
    "PhiForCausalLM": _phi,
    "Phi3ForCausalLM": _phi3,
    "StableLmForCausalLM": _stablelm,
    "Starcoder2ForCausalLM": _starcoder2,
    "OPTForCausalLM": _opt,
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _gpt_neox,
    "MixtralForCausalLM": lambda n: _of_experts(replace(_LLAMA, windows="always"), n),
    "Qwen3MoeForCausalLM": lambda n: _of_experts(_QWEN3_MOE, n, normalizes=False),
    "OlmoeForCausalLM": _olmoe,
    "GptOssForCausalLM": _gpt_oss,
    "GraniteMoeForCausalLM": _granite_moe,
}


def family_of(network: Any) -> Family:
    """Return how `network` is put together; raises NotDescribedError for an unknown class."""
    name = type(network).__name__
    if name not in FAMILIES:
        raise NotDescribedError(f"the architecture {name} is not described")
    return FAMILIES[name](network)


def _refuse(network: Any, flag: str) -> None:
    if getattr(network.config, flag, False):
        raise NotDescribedError(f"{type(network).__name__} with {flag} is not described")
