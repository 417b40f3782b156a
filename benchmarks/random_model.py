"""Models of random weights, for measuring speed: python benchmarks/random_model.py FOLDER

Every matrix is Gaussian noise whose rows and columns are scaled by powers of two with exponents
drawn from a normal distribution.  SIGMA of both was tuned once so that bits given by the size of
the weights alone, 3.3 on average, spread their depths as on a trained model, roughly 0: 1 %, 1:
4 %, 2: 15 %, 3: 37 %, 4: 36 %, 5: 6 %, 6: 1 %; with equal scales speeds would say nothing about
mixed depths.  Conversions for it have to calibrate, if only a little: without, all groups get one
depth.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cvxq_format import MAX_DEPTH, CompandedTensor, Reader, depth_histogram
from safetensors.torch import save_file

SIGMA = 0.7  # standard deviation of log2 of a row's scale, and of a column's
SHARD_WEIGHTS = 1 << 30  # in one file, at least one layer's


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; or with experts, of ffn units each, of a Qwen3-MoE."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    context: int
    experts: int = 0
    chosen: int = 0
    head_size: int = 0  # where it is not hidden / heads

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden // self.heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the matrices of one layer."""
        queries, keys = self.head_dim * self.heads, self.head_dim * self.kv_heads
        found = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
        }
        if self.experts:
            found["mlp.gate"] = (self.experts, self.hidden)
        for block in [f"mlp.experts.{e}" for e in range(self.experts)] or ["mlp"]:
            found[f"{block}.gate_proj"] = (self.ffn, self.hidden)
            found[f"{block}.up_proj"] = (self.ffn, self.hidden)
            found[f"{block}.down_proj"] = (self.hidden, self.ffn)
        return found

    def norms(self) -> dict[str, int]:
        """Sizes of the norms of one layer."""
        found = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), self.hidden)
        if self.experts:
            found |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.head_dim)
        return found

    def config(self, dtype: torch.dtype) -> dict[str, object]:
        """The config.json of such a model."""
        of_experts = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.head_dim,
            "moe_intermediate_size": self.ffn,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": str(dtype).removeprefix("torch."),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **(of_experts if self.experts else {}),
        }


SHAPES = {
    "7b": Shape(4096, 32, 32, 32, 11008, 32000, 4096),  # Llama-2-7B
    "1.1b": Shape(2048, 22, 32, 4, 5632, 32000, 2048),  # TinyLlama
    "30b-a3b": Shape(2048, 48, 32, 4, 768, 151936, 40960, 128, 8, 128),  # Qwen3-30B-A3B
}


def make_model(
    folder: Path,
    shape: str | Shape,
    seed: int = 0,
    sigma: float = SIGMA,
    dtype: torch.dtype = torch.float16,
) -> dict[str, int]:
    """Write a checkpoint of random weights to `folder`, a few layers at a time.

    shape: a name of SHAPES, or the sizes.  Returns its sizes as in `Shape`.
    """
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes.config(dtype), indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    def matrix(size: tuple[int, int]) -> torch.Tensor:
        return _matrix(size, sigma, generator).to(dtype)

    ends = (sizes.vocabulary, sizes.hidden)
    outer = {"model.embed_tokens.weight": matrix(ends), "lm_head.weight": matrix(ends)}
    outer["model.norm.weight"] = torch.ones(sizes.hidden, dtype=dtype)
    save(outer, "model-ends.safetensors")
    step = max(1, SHARD_WEIGHTS // sum(n * k for n, k in sizes.matrices().values()))
    for first in range(0, sizes.layers, step):
        shard = {}
        for layer in range(first, min(first + step, sizes.layers)):
            for module, size in sizes.matrices().items():
                name = f"model.layers.{layer}.{module}.weight"
                shard[name] = matrix(size)
            for norm, width in sizes.norms().items():
                name = f"model.layers.{layer}.{norm}.weight"
                shard[name] = torch.ones(width, dtype=dtype)
        save(shard, f"model-{first:02d}.safetensors")
    total = sum((folder / name).stat().st_size for name in set(index.values()))
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing) + "\n")
    return asdict(sizes)


def _matrix(shape: tuple[int, int], sigma: float, generator: torch.Generator) -> torch.Tensor:
    """Return a random (N, K) matrix whose products keep the size of their input."""
    outputs, inputs = shape
    rows = torch.randn(outputs, 1, generator=generator)
    columns = torch.randn(1, inputs, generator=generator)
    weights = torch.randn(shape, generator=generator)
    scales = torch.exp2(sigma * rows) * torch.exp2(sigma * columns)
    return weights.mul_(scales) / inputs**0.5


def depth_shares(path: Path) -> np.ndarray:
    """Return the share of the quantized weights of a `.cvxq` file at each depth, (9,)."""
    counts = np.zeros(MAX_DEPTH + 1)
    with Reader(path, check=False) as reader:
        for name in reader.names:
            value = reader.read(name)
            if isinstance(value, CompandedTensor):
                counts += depth_histogram(value.depths, value.cluster_rows())
    return counts / counts.sum()


def histogram_line(path: Path) -> str:
    """Return the shares of a file's depths in one line."""
    shares = enumerate(depth_shares(path))
    return ", ".join(f"{depth}: {share:.1%}" for depth, share in shares if share)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigma", type=float, default=SIGMA)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--experts", type=int, help="fewer than the shape has")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    layers, experts = options.layers or shape.layers, options.experts or shape.experts
    shape = replace(shape, layers=layers, experts=experts)
    dtype = getattr(torch, options.dtype)
    print(json.dumps(make_model(options.folder, shape, options.seed, options.sigma, dtype)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
