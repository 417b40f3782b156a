"""Which of transformers' causal language models a conversion runs by blocks, and which as a whole.

    python benchmarks/architectures.py [NAME …]      # all: some minutes

A tiny network of random weights is made of each architecture's configuration, saved, opened as a
conversion opens it, and measured twice: as the conversion would, and in one piece in memory. The
table, in docs/architectures.md, says what came out:

- **by blocks**: block by block, every statistic the same bits, or "close" to 1e-4 of the largest;
- **in one piece**: the blocks share more than their outputs, or there is no list of them;
- **refused**: the converter said why in one line;
- **not tried**: no tiny network could be made of the configuration without more knowledge of it.

Exits with 1 if blocks gave something else than the whole.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cvxq_converter.errors import ConversionError
from cvxq_converter.measure.statistics import measure_statistics
from cvxq_converter.measure.sums import MatrixStatistics
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.blocks import Streamed
from cvxq_converter.source.checkpoint import open_source
from cvxq_converter.source.loaded import load_model
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

OPTIONS = ConversionOptions.of(bits=4.0)
SECONDS = 60  # of the processor, for one architecture
CLOSE = 1e-4
VOCABULARY = 99
SEQUENCES = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))

# What a configuration may call its sizes; those that it does not have are left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim", "dense_intermediate_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_config_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "d_kv"), 16),
    **dict.fromkeys(("query_pre_attn_scalar", "index_head_dim", "mamba_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size",), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "n_groups"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "index_topk", "chunk_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "rotary_dim"), 8),
    **dict.fromkeys(("altup_num_inputs", "num_kv_shared_layers"), 2),
    "mamba_n_groups": 1,
    "laurel_rank": 4,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {  # attention through a narrow copy of keys and values
    "num_key_value_heads": 4,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
}
_WIDE_HEADS = {
    **_COMMON,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}},
    "sliding_window": 16,
}
# Configurations whose sizes hang together in ways of their own.
BY_HAND: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        **_COMMON,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        **dict.fromkeys(("d_model", "max_seq_len"), 64),
        **dict.fromkeys(("n_heads", "n_layers"), 4),
        "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {**_COMMON, **_EXPERTS, **_LATENT, "topk_method": "greedy"},
    "dots1": {**_COMMON, **_EXPERTS, "head_dim": 16},
    "dots3_note_text": {
        **_COMMON,
        **_EXPERTS,
        **_LATENT,
        "head_dim": 32,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "shared_experts_intermediate_size": 32,
        "sliding_window": 16,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": 4,
        "swa_head_dim": 32,
        **{f"swa_{size}": value for size, value in _LATENT.items()},
    },
    "emu3": {"text_config": _COMMON},
    "falcon_h1": {
        **_COMMON,
        "head_dim": 16,
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "gemma4_text": {
        **_WIDE_HEADS,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gemma4_unified_text": _WIDE_HEADS,
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 64,
        "window_size": 8,
    },
    "hunyuan_v1_dense": {**_COMMON, "head_dim": 16},
    "hunyuan_v1_moe": {**_COMMON, "head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {
        **_COMMON,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "ministral": {**_COMMON, "head_dim": 16},
    "mllama": {"text_config": {**_COMMON, "cross_attention_layers": []}},
    "nemotron": {**_COMMON, "head_dim": 16, "partial_rotary_factor": 0.5},
    "prophetnet": {
        **dict.fromkeys(("hidden_size", "max_position_embeddings"), 64),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
        **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 4),
        **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
        "vocab_size": VOCABULARY,
        "is_decoder": True,
        "add_cross_attention": False,
    },
    "qwen4_exp_text": {
        **_COMMON,
        **dict.fromkeys(("head_dim", "indexer_head_dim", "linear_key_head_dim"), 16),
        **dict.fromkeys(("hc_count", "linear_num_key_heads", "indexer_n_heads"), 2),
        **dict.fromkeys(("num_experts", "linear_num_value_heads", "indexer_compress_ratio"), 4),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
        **dict.fromkeys(("hc_lowrank", "indexer_budget"), 8),
        "linear_value_head_dim": 16,
        "num_experts_per_tok": 2,
        "indexer_kv_heads": 1,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
    },
    "reformer": {
        **dict.fromkeys(("hidden_size", "max_position_embeddings"), 64),
        **dict.fromkeys(("local_attn_chunk_length", "lsh_attn_chunk_length"), 8),
        "vocab_size": VOCABULARY,
        "attention_head_size": 16,
        "num_attention_heads": 4,
        "feed_forward_size": 96,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds": False,
        "num_buckets": 2,
        "hash_seed": 0,
        "is_decoder": True,
    },
    "xlnet": {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 4, "n_head": 4, "d_inner": 96},
    "xlstm": {
        **dict.fromkeys(("hidden_size", "embedding_dim"), 64),
        **dict.fromkeys(("num_hidden_layers", "num_blocks", "num_heads"), 4),
        "vocab_size": VOCABULARY,
        "chunk_size": 8,
    },
    "xmod": {**_COMMON, "is_decoder": True, "default_language": "en_XX"},
    "zaya": {
        **_COMMON,
        **dict.fromkeys(("head_dim", "router_hidden_size"), 16),
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid"] * 4,
    },
    "zamba2": {
        **_COMMON,
        "num_hidden_layers": 6,
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "hybrid", "mamba"] * 2,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 4],
        "adapter_rank": 8,
    },
}


@dataclass(frozen=True)
class Verdict:
    """What became of an architecture. word: one of the four of the table, or "WRONG"."""

    word: str
    detail: str = ""


def names() -> list[str]:
    """The types of all causal language models that the installed transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(name: str) -> Any:
    """A configuration of a few thousand weights; whatever exception its class raises."""
    kind = CONFIG_MAPPING[name]
    if name in BY_HAND:
        return kind(**BY_HAND[name])
    usual = kind().get_text_config()
    if usual.model_type in BY_HAND:
        return type(usual)(**BY_HAND[usual.model_type])
    sizes = {
        field: value
        for field, value in SIZES.items()
        if getattr(usual, field, None) is not None or (field in _TOKENS and hasattr(usual, field))
    }
    if not getattr(usual, "num_kv_shared_layers", 0):
        sizes.pop("num_kv_shared_layers", None)
    if getattr(usual, "num_key_value_heads", None) == getattr(usual, "num_attention_heads", 0):
        sizes["num_key_value_heads"] = 4
    types = getattr(usual, "layer_types", None)
    if isinstance(types, list):
        kinds = list(dict.fromkeys(types))
        sizes["layer_types"] = (kinds * 4)[:4]
    error: Exception | None = None
    for left_out in ((), ("head_dim",), ("layer_types",), ("layer_types", "head_dim")):
        try:
            return type(usual)(**{k: v for k, v in sizes.items() if k not in left_out})
        except Exception as raised:  # whatever an architecture's code thinks of such sizes
            error = raised
    assert error is not None
    raise error


def save_tiny(name: str, folder: Path) -> None:
    """Save a tiny network of random weights."""
    torch.manual_seed(0)
    config = tiny_config(name)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # some are left unset, or zero
            if not parameter.isfinite().all() or (parameter.ndim > 1 and parameter.std() < 1e-3):
                parameter.normal_(0, 0.05)
        logits = network(input_ids=SEQUENCES[:1], use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite")
    network.save_pretrained(folder)


def judge(name: str) -> Verdict:
    """Try one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tiny(name, Path(folder))
        except Exception as error:  # see tiny_config
            return Verdict("not tried", _one_line(error))
        try:
            loaded = load_model(open_source(folder), OPTIONS)
            matrices, streamed = loaded.matrices, loaded.streamed
            found = measure_statistics(streamed, matrices, SEQUENCES)
            with loaded.whole() as network:
                whole = measure_statistics(Streamed(network, []), matrices, SEQUENCES)
        except ConversionError as error:
            return Verdict("refused", str(error).removeprefix(f"{Path(folder).name}: "))
        except Exception as error:
            return Verdict("WRONG", _one_line(error))
        if not streamed.blocks:
            return Verdict("in one piece")
        error_found = largest_difference(found, whole)
        if error_found > CLOSE:
            return Verdict("WRONG", f"{error_found:.1g} of the largest")
        return Verdict("by blocks", "" if error_found == 0 else "close")


def largest_difference(
    ours: Mapping[str, MatrixStatistics], theirs: Mapping[str, MatrixStatistics]
) -> float:
    """The largest difference of any statistic, as a share of the largest of its kind."""
    worst = 0.0
    for name, expected in theirs.items():
        for field in fields(expected):
            a, b = (np.asarray(getattr(s, field.name), float) for s in (ours[name], expected))
            if a.ndim and a.size:
                error, top = np.abs(a - b).max(), np.abs(b).max()
                worst = max(worst, float(error / top) if top else float(error))
    return worst


def _one_line(error: BaseException) -> str:
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0]:.120}"


class TooLongError(BaseException):
    """Nobody may take this for an error of their own."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TooLongError when the processor has spent some time."""

    def ring(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def page(verdicts: Mapping[str, Verdict]) -> str:
    """The table, in Markdown."""
    counts = Counter(verdict.word for verdict in verdicts.values())
    total = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    lines = [
        "# How each architecture is converted",
        "",
        "What `python benchmarks/architectures.py` says of tiny random networks of",
        f"{len(verdicts)} of the {len(names())} causal language models of",
        f"transformers {transformers.__version__}: {total}.",
        "[What the words mean](../benchmarks/architectures.py).",
        "",
        "| model type | converted | |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {v.word} | {v.detail} |" for name, v in verdicts.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Judge those named, or all, and print the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    verdicts = {}
    for name in sys.argv[1:] or names():
        started = time.perf_counter()
        try:
            with limited(SECONDS):
                verdicts[name] = judge(name)
        except TooLongError:
            verdicts[name] = Verdict("not tried", f"takes more than {SECONDS} s")
        seconds = time.perf_counter() - started
        print(f"{name}: {verdicts[name]} {seconds:.1f} s", file=sys.stderr, flush=True)
    print(page(verdicts), end="")
    return int(any(verdict.word == "WRONG" for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
