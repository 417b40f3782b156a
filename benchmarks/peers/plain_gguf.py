"""A Llama checkpoint as a GGUF file in float16 without a vocabulary, to measure speed with.

    python -m peers.plain_gguf MODEL OUTPUT GGUF_PACKAGE     # the last: llama.cpp's gguf-py folder

Rows of the query and key matrices are left in the checkpoint's order: the products are as fast,
what comes out means nothing.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """GGUF's name of a checkpoint's tensor."""
    module = name.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    _, _, layer, rest = module.split(".", maxsplit=3)
    return f"blk.{layer}.{BLOCK[rest]}.weight"


def write(model: Path, output: Path) -> None:
    """Write `model`, a folder of safetensors shards, to `output`."""
    from gguf import GGUFWriter

    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_file_type(1)  # mostly float16
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(name)
                dtype = torch.float32 if tensor.ndim == 1 else torch.float16  # norms are wide
                writer.add_tensor(gguf_name(name), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[3])
    write(Path(sys.argv[1]), Path(sys.argv[2]))
