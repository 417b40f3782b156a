"""What the lean path holds: the file's size once, keys and values, and a fixed amount."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cvxq_format import Codebook, CompandedTensor, Writer
from cvxq_format.decoder_record import (
    FILE_NAME,
    Attention,
    DecoderRecord,
    FeedForward,
    Layer,
    Norm,
    Part,
    Rope,
)
from cvxq_kernels import cpu

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not()),
    pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's"),
]

FIXED_BYTES = 350 << 20  # Python, numpy, the tokenizer's libraries, scratch
LAYERS, HIDDEN, HEADS, FFN, VOCABULARY, CONTEXT = 3, 1024, 16, 2816, 8192, 512
ONES = np.ones(HIDDEN, np.float32)

CHILD = """
import sys, cvxq
from cvxq.bench import peak_memory_bytes
from cvxq.sample import SamplingSettings
from cvxq.generate import generate_tokens
before = peak_memory_bytes()
with cvxq.load(sys.argv[1], threads=2) as model:
    assert model.decoder is not None, model.transformers_reason
    settings = SamplingSettings(temperature=0, max_tokens=int(sys.argv[2]))
    tokens = list(generate_tokens(model.session(), list(range(100)), settings))
assert len(tokens) == int(sys.argv[2])
print(before, peak_memory_bytes())
"""


@pytest.fixture(scope="module")
def large_file(
    tmp_path_factory: pytest.TempPathFactory, random_companded: Callable[..., CompandedTensor]
) -> Path:
    """A Llama of 42 million parameters, enough to see whether a matrix is held twice."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        root = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{root}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{root}.mlp.gate_proj.weight"] = shapes[f"{root}.mlp.up_proj.weight"] = (
            FFN,
            HIDDEN,
        )
        shapes[f"{root}.mlp.down_proj.weight"] = (HIDDEN, FFN)
    path = tmp_path_factory.mktemp("large") / "large.cvxq"
    with Writer(path, codebooks=[Codebook.default()]) as writer:
        for seed, (name, shape) in enumerate(shapes.items()):
            tensor = random_companded(shape, seed, group_size=128, means=False)
            writer.add_companded(name, tensor)
        for layer in range(LAYERS):
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add_raw(f"model.layers.{layer}.{name}.weight", ONES)
        writer.add_raw("model.norm.weight", ONES)
        writer.add_alias("lm_head.weight", "model.embed_tokens.weight")
        writer.add_file(FILE_NAME, json.dumps(record().to_json()).encode())
    return path


def record() -> DecoderRecord:
    """What the decoder of that file computes."""

    def layer(root: str) -> Layer:
        def part(name: str) -> Part:
            return Part(f"{root}.{name}_proj.weight")

        q, k, v, o = (part(f"self_attn.{name}") for name in "qkvo")
        return Layer(
            Attention(q, k, v, o, scale=(HIDDEN // HEADS) ** -0.5, rope=0),
            FeedForward(part("mlp.up"), part("mlp.down"), "silu", part("mlp.gate")),
            attention_in=Norm("rms", 1e-6, f"{root}.input_layernorm.weight"),
            ffn_in=Norm("rms", 1e-6, f"{root}.post_attention_layernorm.weight"),
        )

    width = HIDDEN // HEADS
    return DecoderRecord(
        vocabulary=VOCABULARY,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=width,
        ffn=FFN,
        context=CONTEXT,
        embedding_width=HIDDEN,
        embedding="model.embed_tokens.weight",
        head=Part("lm_head.weight"),
        layers=tuple(layer(f"model.layers.{i}") for i in range(LAYERS)),
        ropes=(Rope(tuple(1e4 ** (-2 * i / width) for i in range(width // 2))),),
        final_norm=Norm("rms", 1e-6, "model.norm.weight"),
    )


@pytest.mark.parametrize("tokens", [1, 150])
def test_resident_memory_is_that_of_the_file(large_file: Path, tokens: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(large_file), str(tokens)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    before, peak = map(int, result.stdout.split())
    file_bytes = large_file.stat().st_size
    cached = -(-(100 + tokens) // 64) * 64 * LAYERS * 2 * HIDDEN * 4
    assert peak <= file_bytes + cached + FIXED_BYTES
    # Stricter: without what Python and its libraries take anyway, there is room for the packed
    # matrices, the largest of them while it is read, and scratch, but not for everything twice.
    assert peak - before <= 1.35 * file_bytes + cached + (40 << 20)
