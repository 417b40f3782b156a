"""Tiny networks of many architectures, and `.cvxq` files made of them without the converter."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cvxq.experts import unstack
from cvxq_converter.source.decoding import NotDescribedError, describe
from cvxq_format import Codebook, CompandedTensor, Writer, decoder_record, dequantize
from cvxq_format.model_config import attention_options
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCABULARY = 96

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Rotary settings as version 4 of transformers spells them; version 5 reads both."""
    return {"rope_type": kind, **settings}


def tiny_config(kind: str) -> Any:
    """Config of a network with some ten thousand parameters."""
    import transformers as t

    like = _LLAMA_LIKE
    plain = {key: value for key, value in like.items() if key != "num_key_value_heads"}
    gpt2 = {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    opt = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    make: dict[str, Callable[[], Any]] = {
        "opt": lambda: t.OPTConfig(**opt),
        "llama": lambda: t.LlamaConfig(**like, tie_word_embeddings=False, rope_theta=500.0),
        "llama-tied": lambda: t.LlamaConfig(**like, tie_word_embeddings=True),
        "mistral": lambda: t.MistralConfig(**like, sliding_window=8, tie_word_embeddings=False),
        "qwen2": lambda: t.Qwen2Config(**like, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**like, head_dim=12, tie_word_embeddings=False),
        "gemma": lambda: t.GemmaConfig(**like, head_dim=16, tie_word_embeddings=True),
        "gemma3": lambda: t.Gemma3TextConfig(
            **like,
            head_dim=16,
            query_pre_attn_scalar=12,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_local_base_freq=50.0,
        ),
        "phi3": lambda: t.Phi3Config(**like, sliding_window=None, tie_word_embeddings=False),
        "phi3-longrope": lambda: t.Phi3Config(
            **like,
            sliding_window=12,
            original_max_position_embeddings=32,
            rope_scaling=_rope(
                "longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[2.0, 3.0, 4.0, 5.0],
            ),
        ),
        "olmo2": lambda: t.Olmo2Config(**like, tie_word_embeddings=False),
        "olmo3": lambda: t.Olmo3Config(
            **like,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=False,
        ),
        "phi-normed": lambda: t.PhiConfig(**plain, partial_rotary_factor=0.5, qk_layernorm=True),
        "starcoder2": lambda: t.Starcoder2Config(**like, sliding_window=8, use_bias=True),
        "phi": lambda: t.PhiConfig(**plain, partial_rotary_factor=0.5, tie_word_embeddings=False),
        "gpt-neox": lambda: t.GPTNeoXConfig(**plain, rotary_pct=0.5, rotary_emb_base=300),
        "gpt2": lambda: t.GPT2Config(**gpt2),
        "opt-post-norm": lambda: t.OPTConfig(
            **{**opt, "word_embed_proj_dim": 32}, do_layer_norm_before=False
        ),
        "opt-gelu": lambda: t.OPTConfig(**opt, activation_function="gelu", enable_bias=False),
        "llama-biases": lambda: t.LlamaConfig(**like, attention_bias=True, mlp_bias=True),
        "llama-linear": lambda: t.LlamaConfig(**like, rope_scaling=_rope("linear", factor=2.0)),
        "llama-dynamic": lambda: t.LlamaConfig(**like, rope_scaling=_rope("dynamic", factor=2.0)),
        "llama-llama3": lambda: t.LlamaConfig(
            **like,
            rope_scaling=_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        "llama-yarn": lambda: t.LlamaConfig(
            **like, rope_scaling=_rope("yarn", factor=4.0, original_max_position_embeddings=16)
        ),
        "qwen2-window": lambda: t.Qwen2Config(
            **like, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "smollm3": lambda: t.SmolLM3Config(**like, no_rope_layers=[1, 0]),
        "granite": lambda: t.GraniteConfig(
            **like,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
            logits_scaling=2.0,
        ),
        "stablelm": lambda: t.StableLmConfig(
            **like, partial_rotary_factor=0.5, use_qkv_bias=True, tie_word_embeddings=False
        ),
        "mixtral": lambda: t.MixtralConfig(**like, num_local_experts=4),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(
            **like, head_dim=12, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48
        ),
        "olmoe": lambda: t.OlmoeConfig(**like, num_experts=5, num_experts_per_tok=2),
        "gpt-oss": lambda: t.GptOssConfig(
            **like,
            head_dim=8,
            num_local_experts=5,
            num_experts_per_tok=3,
            sliding_window=8,
            rope_scaling=_rope("default"),
        ),
        "granite-moe": lambda: t.GraniteMoeConfig(
            **like, num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5
        ),
        "gemma2": lambda: t.Gemma2Config(
            **like,
            head_dim=16,
            query_pre_attn_scalar=12,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    }
    return make[kind]()


KINDS = (
    "opt",
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi",
    "gpt-neox",
    "gpt2",
)


def random_network(
    kind: str, seed: int = 0, sizes: dict[str, int] | None = None
) -> PreTrainedModel:
    """Network with random weights and biases, large enough for every path to matter.

    sizes: fields of its configuration in place of the tiny ones.
    """
    torch.manual_seed(seed)
    config = tiny_config(kind)
    for field, value in (sizes or {}).items():
        setattr(config, field, value)
    chosen = attention_options(config.to_dict())
    network = AutoModelForCausalLM.from_config(config, **chosen).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    unstack(network)
    return network.float()


@dataclasses.dataclass
class MadeFile:
    """A `.cvxq` file and the original architecture with the file's weights dequantized."""

    path: Path
    network: PreTrainedModel


def matrices(network: nn.Module) -> dict[str, nn.Module]:
    """Weight names of Linear, Conv1D and Embedding modules; one name for tied ones."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{name}.weight"] = module
    return found


def write_file(
    path: Path,
    network: PreTrainedModel,
    random_companded: Callable[..., CompandedTensor],
    *,
    files: dict[str, bytes] | None = None,
    add_biases: bool = False,
    rename: Callable[[str], str] = lambda name: name,
    leave_out: tuple[str, ...] = (),
    with_record: bool | None = None,
) -> MadeFile:
    """Write `network` with random matrices in place of its own, which it takes over.

    with_record: describe its decoder, if that is known how; None: unless `files` has a config.
    """
    quantized = matrices(network)
    named = list(network.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named)}
    names = {name: rename(first[id(parameter)]) for name, parameter in named}
    blobs = {"config.json": network.config.to_json_string().encode()}
    added = []
    with Writer(path, codebooks=[Codebook.default()]) as writer, torch.no_grad():
        for index, (name, parameter) in enumerate(named):
            own = first[id(parameter)]
            if name in leave_out:
                continue
            if name != own:
                writer.add_alias(rename(name), rename(own))
            elif name in quantized:
                flipped = isinstance(quantized[name], Conv1D)
                shape = tuple(parameter.shape[::-1] if flipped else parameter.shape)
                tensor = random_companded(shape, index, transposed=index % 3 == 1)
                if flipped:
                    tensor = dataclasses.replace(tensor, source_orientation="in_out")
                dense = torch.from_numpy(dequantize(tensor, Codebook.default()))
                parameter.copy_(dense.t() if flipped else dense)
                writer.add_companded(rename(name), tensor)
            else:
                writer.add_raw(rename(name), parameter.numpy())
        if add_biases:
            for name, module in quantized.items():
                if isinstance(module, nn.Linear) and module.bias is None:
                    module.bias = nn.Parameter(torch.randn(module.weight.shape[0]) * 0.1)
                    bias = rename(name.removesuffix("weight") + "bias")
                    writer.add_raw(bias, module.bias.numpy(), added_bias=True)
                    added.append(bias)
        if with_record or (with_record is None and "config.json" not in (files or {})):
            with contextlib.suppress(NotDescribedError):
                record = describe(network, names, added)
                blobs[decoder_record.FILE_NAME] = json.dumps(record.to_json()).encode()
        blobs |= files or {}
        for blob, data in blobs.items():
            writer.add_file(blob, data)
    return MadeFile(path, network)


@pytest.fixture
def make_file(
    tmp_path: Path, random_companded: Callable[..., CompandedTensor]
) -> Callable[..., MadeFile]:
    """Return a function that writes a tiny model of a kind: make_file("opt", files=…).

    config: fields of the configuration that is written; sizes: of the network's own.
    """

    def make(
        kind: str,
        name: str = "model.cvxq",
        config: dict[str, Any] | None = None,
        sizes: dict[str, int] | None = None,
        **options: Any,
    ) -> MadeFile:
        network = random_network(kind, sizes=sizes)
        for field, value in (config or {}).items():
            setattr(network.config, field, value)
        return write_file(tmp_path / name, network, random_companded, **options)

    return make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Run once for each architecture."""
    return str(request.param)


@pytest.fixture(scope="session")
def character_tokenizer() -> Callable[[str | None], Any]:
    """Return a maker of tokenizers: a token per character, special ones, <s> begins a text."""
    from cvxq.lean.fast_codec import FastCodec
    from cvxq.lean.tokenizer import LeanTokenizer
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    special = ("<s>", "</s>", "<|start|>", "<|end|>", "[END]")
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(text, special=True) for text in special])
    begin = core.token_to_id("<s>")
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    codec, names = FastCodec(core), {"bos_token": "<s>", "eos_token": "</s>"}
    return lambda template: LeanTokenizer(codec, names, template)
