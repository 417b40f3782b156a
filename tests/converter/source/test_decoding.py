"""Records of many families against their networks, through an executor written from the schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from cvxq_converter.errors import NotDescribedError
from cvxq_converter.source.decoding import describe
from cvxq_converter.source.matrices import find_matrices
from cvxq_format.decoder_record import DecoderRecord, Rows, read_record
from cvxq_format.model_config import attention_options
from torch import nn
from transformers.pytorch_utils import Conv1D

VOCABULARY, LENGTH = 96, 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LIKE = {**SIZES, "num_key_value_heads": 2}
OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 16,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 8}
GEMMA3 = {
    **GEMMA2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_theta": 10000.0,
    "rope_local_base_freq": 100.0,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}


def _stablelm(**more: Any) -> Any:
    settings: dict[str, Any] = {"partial_rotary_factor": 0.5, "use_qkv_bias": True}
    return t.StableLmConfig(**LIKE, **settings, **more)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**LIKE, tie_word_embeddings=False, rope_theta=500.0),
    "llama-tied": lambda: t.LlamaConfig(**LIKE, tie_word_embeddings=True),
    "llama-biases": lambda: t.LlamaConfig(**LIKE, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: t.LlamaConfig(
        **LIKE, rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
    "llama-dynamic": lambda: t.LlamaConfig(
        **LIKE, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "llama-llama3": lambda: t.LlamaConfig(**LIKE, rope_scaling=LLAMA3),
    "llama-yarn": lambda: t.LlamaConfig(**LIKE, rope_scaling=YARN),
    "mistral": lambda: t.MistralConfig(**LIKE, sliding_window=8),
    "mistral-no-window": lambda: t.MistralConfig(**LIKE, sliding_window=None, head_dim=12),
    "qwen2": lambda: t.Qwen2Config(**LIKE, tie_word_embeddings=True),
    "qwen2-window": lambda: t.Qwen2Config(**LIKE, **WINDOWS),
    "qwen3": lambda: t.Qwen3Config(**LIKE, head_dim=12, tie_word_embeddings=False),
    "smollm3": lambda: t.SmolLM3Config(**LIKE, no_rope_layers=[1, 0, 1]),
    "gemma": lambda: t.GemmaConfig(**LIKE, head_dim=16),
    "gemma2": lambda: t.Gemma2Config(
        **LIKE, **GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: t.Gemma3TextConfig(**LIKE, **GEMMA3),
    "granite": lambda: t.GraniteConfig(**LIKE, **GRANITE),
    "olmo2": lambda: t.Olmo2Config(**LIKE),
    "olmo3": lambda: t.Olmo3Config(**LIKE, sliding_window=8),
    "phi": lambda: t.PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "phi-normed": lambda: t.PhiConfig(**SIZES, qk_layernorm=True),
    "phi3": lambda: t.Phi3Config(**LIKE, sliding_window=8),
    "phi3-long": lambda: t.Phi3Config(
        **LIKE, rope_scaling=LONG, original_max_position_embeddings=16
    ),
    "stablelm": _stablelm,
    "stablelm-parallel": lambda: _stablelm(use_parallel_residual=True),
    "starcoder2": lambda: t.Starcoder2Config(**LIKE, sliding_window=8, use_bias=True),
    "opt": lambda: t.OPTConfig(**OPT),
    "opt-post-norm": lambda: t.OPTConfig(
        **{**OPT, "word_embed_proj_dim": 32}, do_layer_norm_before=False
    ),
    "opt-bare": lambda: t.OPTConfig(
        **OPT, activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False
    ),
    "gpt2": lambda: t.GPT2Config(**GPT2),
    "gpt2-layer-scales": lambda: t.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt-neox": lambda: t.GPTNeoXConfig(**SIZES, rotary_pct=0.5, rotary_emb_base=300),
    "gpt-neox-sequential": lambda: t.GPTNeoXConfig(**SIZES, use_parallel_residual=False),
}


def network_of(config: Any, seed: int = 0) -> Any:
    """Network with random weights and biases, large enough for every path to matter."""
    torch.manual_seed(seed)
    chosen = attention_options(config.to_dict())
    network = t.AutoModelForCausalLM.from_config(config, **chosen).eval().float()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.requires_grad_(False)


def names_of(network: Any) -> dict[str, str]:
    """Names as in a file, unlike those of the network."""
    named = network.named_parameters(remove_duplicate=False)
    return {name: f"file.{name}" for name, _ in named}


def tensors_of(network: Any, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """What the file holds: matrices as (N, K)."""
    flipped = {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, Conv1D)}
    return {
        names[name]: parameter.T if name in flipped else parameter
        for name, parameter in network.named_parameters(remove_duplicate=False)
    }


def described(kind: str) -> tuple[Any, DecoderRecord]:
    network = network_of(CONFIGS[kind]())
    return network, describe(network, names_of(network))


Execute = Callable[..., torch.Tensor]


def check_logits(
    execute: Execute, network: Any, record: DecoderRecord, tensors: dict[str, torch.Tensor]
) -> None:
    for length in (LENGTH, 12):
        ids = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))
        expected = network(ids[None]).logits[0].double()
        found = execute(record, tensors, ids)
        assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_record_says_what_the_network_computes(execute: Execute, kind: str) -> None:
    network, record = described(kind)
    check_logits(execute, network, record, tensors_of(network, names_of(network)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_record_survives_json(kind: str) -> None:
    _, record = described(kind)
    assert read_record(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-neox"])
def test_added_biases_have_their_place(execute: Execute, kind: str) -> None:
    network = network_of(CONFIGS[kind]())
    names = names_of(network)
    tensors = tensors_of(network, names)
    added = {}
    for matrix in find_matrices(network, names):
        if matrix.bias_name is not None and not matrix.has_bias:
            assert matrix.input_module_name is not None
            bias = torch.randn(len(matrix.weight))
            network.get_submodule(matrix.input_module_name).bias = nn.Parameter(bias)
            added[matrix.bias_name] = bias
    assert added
    record = describe(network, names, added)
    check_logits(execute, network.requires_grad_(False), record, {**tensors, **added})


def test_an_added_bias_of_nothing_is_not_described() -> None:
    network = network_of(CONFIGS["llama"]())
    with pytest.raises(NotDescribedError, match=r"the tensor nothing\.bias has no place"):
        describe(network, names_of(network), ["nothing.bias"])


def test_unknown_fields_change_nothing() -> None:
    plain, odd = CONFIGS["llama"](), CONFIGS["llama"]()
    odd.foo, odd._model_name_or_path, odd.sliding_window = 1, "somewhere", 3
    first, second = network_of(plain), network_of(odd)
    assert describe(first, names_of(first)) == describe(second, names_of(second))


def test_a_record_is_the_same_after_a_long_text() -> None:
    for kind in ("phi3-long", "llama-dynamic"):
        network, record = described(kind)
        network(torch.zeros(1, 80, dtype=torch.int64))
        assert describe(network, names_of(network)) == record


def test_a_switch_has_both_sets_of_frequencies() -> None:
    _, record = described("phi3-long")
    (rope,) = record.ropes
    assert rope.switch == 16
    assert rope.inverse_frequencies != rope.long_inverse_frequencies


def test_layers_of_gemma_3_turn_by_their_type() -> None:
    _, record = described("gemma3")
    assert [(y.attention.window, y.attention.rope) for y in record.layers] == [
        (8, 0),
        (8, 0),
        (None, 1),
    ]
    assert len(record.ropes) == 2


def test_the_scale_of_embeddings_is_rounded_as_in_the_network() -> None:
    network = network_of(CONFIGS["gemma2"]()).bfloat16()
    assert describe(network, names_of(network)).embedding_scale == 5.65625


def test_fused_heads_take_turns() -> None:
    _, record = described("gpt-neox")
    assert record.layers[0].attention.k.rows == Rows(8, 8, 24)


def test_every_end_is_listed() -> None:
    network = network_of(CONFIGS["llama"]())
    network.generation_config.eos_token_id = [5, 2]
    network.config.eos_token_id = 7
    assert describe(network, names_of(network)).end_tokens == (2, 5, 7)


def test_what_is_unknown_is_not_described() -> None:
    bloom = network_of(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(NotDescribedError, match="architecture BloomForCausalLM is not described"):
        describe(bloom, names_of(bloom))
    normed = network_of(_stablelm(qk_layernorm=True))
    with pytest.raises(NotDescribedError, match="with qk_layernorm is not described"):
        describe(normed, names_of(normed))
    quick = network_of(t.LlamaConfig(**LIKE, hidden_act="quick_gelu"))
    with pytest.raises(NotDescribedError, match="activation QuickGELUActivation"):
        describe(quick, names_of(quick))
