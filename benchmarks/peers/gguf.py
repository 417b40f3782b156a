"""llama.cpp's quantization types, made by its own programs and read back by its own package.

A Llama checkpoint becomes a GGUF file in float32, `llama-imatrix` collects the importance matrix
on the calibration sequences, `llama-quantize` quantizes with it, and gguf-py dequantizes.

`llama-imatrix` reads text and tokenizes it. So that it sees the very tokens that everyone else
calibrates on, the file's vocabulary spells token i as the one character U+F0000 + i: a sequence of
tokens is then a text that can be tokenized in one way only. Such characters end before 131,068.

llama.cpp turns neighbouring elements of a head in its rotary embedding, Hugging Face opposite
ones: the rows of the query and key matrices are reordered on the way in and on the way out.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    TokenType,
)
from gguf.quants import dequantize
from safetensors.torch import load_file

from peers.grid import Parts
from peers.worker import Inputs, Result, work

FIRST_CHARACTER = 0xF0000
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
UNQUANTIZED = {
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
}
Config = dict[str, Any]


def read_config(model: Path) -> Config:
    """The model's configuration; ValueError unless it is a Llama without biases."""
    config: Config = json.loads((model / "config.json").read_text())
    biases = config.get("attention_bias") or config.get("mlp_bias")
    if config["model_type"] != "llama" or biases:
        raise ValueError(f"{model}: this benchmark turns Llama models without biases into GGUF")
    return config


def names(config: Config) -> Iterator[tuple[str, str, int]]:
    """GGUF's and the checkpoint's name of every tensor, and its heads if rows are reordered."""
    yield "token_embd.weight", "model.embed_tokens.weight", 0
    yield "output_norm.weight", "model.norm.weight", 0
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", 0
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for block in range(config["num_hidden_layers"]):
        for ours, theirs in BLOCK.items():
            yield (
                f"blk.{block}.{ours}.weight",
                f"model.layers.{block}.{theirs}.weight",
                heads.get(ours, 0),
            )


def to_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows (N, K) so that elements which are turned together become neighbours."""
    outputs, inputs = weight.shape
    halves = weight.reshape(heads, 2, outputs // heads // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)


def from_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo `to_neighbours`."""
    outputs, inputs = weight.shape
    pairs = weight.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def write_original(model: Path, path: Path) -> None:
    """Write the checkpoint as a GGUF file in float32 with one character per token."""
    config = read_config(model)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_file(file)
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([chr(FIRST_CHARACTER + i) for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([TokenType.NORMAL] * config["vocab_size"])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    for ours, theirs, reordered in names(config):
        weight = weights[theirs].float().numpy()
        writer.add_tensor(ours, to_neighbours(weight, reordered) if reordered else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def call(*command: str | Path) -> None:
    """Run one of llama.cpp's programs; its output goes to the log of this process."""
    subprocess.run([str(word) for word in command], check=True)


@cache
def prepare(inputs: Inputs) -> Path:
    """Folder with `original.gguf` and `imatrix.gguf`, made once per process."""
    assert inputs.tools is not None
    folder = Path(tempfile.mkdtemp(prefix="gguf-"))
    write_original(inputs.model, folder / "original.gguf")
    text = "".join(chr(FIRST_CHARACTER + int(token)) for token in inputs.sequences.flatten())
    (folder / "sequences.txt").write_text(text, encoding="utf-8")
    length = str(inputs.sequences.shape[1])
    files: list[str | Path] = ["-m", folder / "original.gguf", "-f", folder / "sequences.txt"]
    command: list[str | Path] = [
        inputs.tools / "llama-imatrix",
        *files,
        "-o",
        folder / "imatrix.gguf",
    ]
    call(*command, "-c", length, "-b", length, "-ub", length, "--no-ppl")
    return folder


def quantize(inputs: Inputs, settings: dict[str, Any]) -> Result:
    """Quantize with `settings`: type, pure (no mixture), whole (embeddings and head, too)."""
    assert inputs.tools is not None
    folder = prepare(inputs)
    out = folder / "quantized.gguf"
    command: list[str | Path] = [inputs.tools / "llama-quantize"]
    command += ["--imatrix", folder / "imatrix.gguf"]
    if settings["pure"]:
        command.append("--pure")
    if not settings["whole"]:
        command += ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    call(*command, folder / "original.gguf", out, settings["type"])
    tensors = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    matrices: dict[str, torch.Tensor] = {}
    bits = 0
    for ours, theirs, reordered in names(read_config(inputs.model)):
        tensor = tensors[ours]
        if tensor.tensor_type in UNQUANTIZED:
            continue
        weight = dequantize(tensor.data, tensor.tensor_type)
        weight = from_neighbours(weight, reordered) if reordered else weight
        matrices[theirs] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
        bits += 8 * int(tensor.n_bytes)
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    return Result(matrices, Parts(codes=bits), total)


if __name__ == "__main__":
    work(quantize, ("gguf", "torch"))
