"""GGUF files, written here as llama.cpp writes them → the network that they were written from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cvxq
import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cvxq.cli import perplexity
from cvxq_converter.errors import ConversionError
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import load_network, load_tokenizer, open_source
from gguf import GGMLQuantizationType
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, HEAD_DIM, LAYERS = 2, 32, 2
MERGES = ["h e", "l l", "Ġ w"]
SPECIALS = ["<|end|>", "<|turn|>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"


def vocabulary() -> list[str]:
    return [*sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES), *SPECIALS]


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        **changes,
    )
    network = LlamaForCausalLM(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, 1 if parameter.ndim == 1 else 0, 0.1)
    return network


def llama_cpp_tensors(network: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The network's tensors as llama.cpp names and orders them."""
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
    }
    parts |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"post_attention_layernorm": "ffn_norm"}
    yield "token_embd.weight", network.model.embed_tokens.weight.detach().numpy()
    yield "output.weight", network.lm_head.weight.detach().numpy()
    yield "output_norm.weight", network.model.norm.weight.detach().numpy()
    for number, layer in enumerate(network.model.layers):
        for module, name in parts.items():
            weight = layer.get_submodule(module).weight.detach().numpy()
            if name in ("attn_q", "attn_k"):  # pairs beside each other, not half a head apart
                halves = weight.reshape(HEADS, 2, HEAD_DIM // 2, -1)
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            yield f"blk.{number}.{name}.weight", weight


def write_gguf(
    path: Path,
    network: Any,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write `network`, its matrices as `kind`, a tokenizer, further settings and tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    config = network.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    names = vocabulary()
    writer.add_token_list(names)
    writer.add_token_types([3 if name in SPECIALS else 1 for name in names])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(names.index("<|end|>"))
    writer.add_eos_token_id(names.index("<|end|>"))
    writer.add_eot_token_id(names.index("<|turn|>"))
    writer.add_chat_template(TEMPLATE)
    for key, value in (settings or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)  # type: ignore[operator]
    for name, weight in llama_cpp_tensors(network):
        stored = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight, stored), raw_dtype=stored)
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        open_source(str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_floats_come_back_as_they_were(tmp_path: Path) -> None:
    network = llama()
    source = open_source(str(write_gguf(tmp_path / "tiny.gguf", network)))
    assert (source.name, source.notices) == ("tiny.gguf", ())
    assert source.parameters == sum(p.numel() for p in network.parameters())
    found = load_network(source, torch.float32)
    assert set(source.tensors) == {name for name, _ in found.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=0, atol=0)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(found(ids).logits, network(ids).logits)


def test_a_quantized_file_becomes_a_container_that_runs(tmp_path: Path) -> None:
    network = llama()
    path = write_gguf(tmp_path / "tiny.gguf", network, GGMLQuantizationType.Q8_0)
    lines: list[str] = []
    options = ConversionOptions.of(bits=8, calibration="none")
    convert(str(path), tmp_path / "tiny.cvxq", options, announce=lines.append)
    text = tmp_path / "text.txt"
    text.write_text("hello world, hello all the world")
    asked = [str(tmp_path / "tiny.cvxq"), "--text", str(text), "--against", str(path), "--json"]
    compared = CliRunner().invoke(perplexity.command, asked)
    assert 0 < json.loads(compared.stdout)["kl"]["mean"] < 1e-3
    itself = [str(path), "--text", str(text), "--against", str(path), "--json"]
    measured = CliRunner().invoke(perplexity.command, itself)
    assert "tiny.gguf: the source was quantized already (Q8_0)" in measured.stderr
    figures = json.loads(measured.stdout)
    assert figures["kl"]["mean"] == 0
    original = json.loads(compared.stdout)["original_perplexity"]
    assert figures["perplexity"] == pytest.approx(original)
    path.unlink()
    assert "tiny.gguf: the source was quantized already (Q8_0)" in lines[0]
    with cvxq.load(tmp_path / "tiny.cvxq") as model:
        ids = model.tokenizer("hello world<|turn|>")["input_ids"]
        names = [vocabulary()[token] for token in ids]
        assert names == ["he", "ll", "o", "Ġw", "o", "r", "l", "d", "<|turn|>"]
        assert model.tokenizer.chat_template == TEMPLATE
        assert model.decoder is not None
        logits = torch.as_tensor(model.decoder.logits(ids))
    expected = network(torch.tensor([ids])).logits[0]
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_tokens_that_end_a_turn_are_carried(tmp_path: Path) -> None:
    source = open_source(str(write_gguf(tmp_path / "tiny.gguf", llama())))
    settings = json.loads(source.carried_file("generation_config.json") or b"")
    assert settings["eos_token_id"] == [vocabulary().index(name) for name in SPECIALS]
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    assert tokenizer.eos_token == "<|end|>"


def test_llama_3_scaling_is_found_again_from_its_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    network = llama(rope_parameters=scaling)
    plain = 5e5 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (plain / network.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() == pytest.approx(32)
    path = write_gguf(tmp_path / "a.gguf", network, tensors={"rope_freqs.weight": factors})
    found = load_network(open_source(str(path)), torch.float32)
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, network.model.rotary_emb.inv_freq)
    factors[0] = 2
    path = write_gguf(tmp_path / "b.gguf", network, tensors={"rope_freqs.weight": factors})
    assert "rope_freqs.weight are not those of Llama 3" in refusal(path)


def test_yarn_is_taken_from_the_settings(tmp_path: Path) -> None:
    start = "llama.rope.scaling"
    settings = {f"{start}.type": "yarn", f"{start}.factor": 4.0}
    settings |= {f"{start}.original_context_length": 64}
    path = write_gguf(tmp_path / "a.gguf", llama(), settings=settings)
    rope = open_source(str(path)).config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == 64


def test_what_transformers_would_drop_is_refused(tmp_path: Path) -> None:
    network = llama()
    path = write_gguf(tmp_path / "a.gguf", network, settings={"llama.attention.scale": 0.5})
    assert "llama.attention.scale is 0.5, which transformers' llama cannot" in refusal(path)
    bias = {"blk.0.attn_q.bias": np.ones(HEADS * HEAD_DIM, np.float32)}
    path = write_gguf(tmp_path / "b.gguf", network, tensors=bias)
    assert "no place for 1 of its tensors (blk.0.attn_q.bias)" in refusal(path)
    path = write_gguf(tmp_path / "c.gguf", network, settings={"split.count": 3})
    assert "one of 3 parts; join them first" in refusal(path)


def test_files_that_are_no_whole_gguf_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", llama())
    assert "drop --revision" in refusal(path, revision="main")
    folder = refusal(tmp_path)
    assert "no config.json" in folder
    assert f"a GGUF file itself, such as {path}" in folder
    path.write_bytes(path.read_bytes()[:200])
    assert "a.gguf: damaged" in refusal(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "Git LFS pointer" in refusal(path)
    path.write_text("text")
    assert "not a GGUF file" in refusal(path)
