"""Make the golden conversions: one tiny seeded network, converted in a few ways.

    python tests/golden/make_golden.py

writes the figures of every case to tests/golden/expected.json and the file of the first one to
tests/golden/llama-3-bits.cvxq. Run it only when a change of the converter's output is meant, and
say so in the change log. The network's weights come from a generator of numpy whose stream is
fixed, not from torch, so that they are the same everywhere.

Without calibration a conversion involves few floating-point sums, but their order may still differ
between processors and versions of torch; self-calibration samples tokens and multiplies matrices.
So nothing but the input is compared bit by bit: the rest are figures with tolerances, in
test_golden.py.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_format import CompandedTensor, Reader, dequantize
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
FILE = HERE / "llama-3-bits.cvxq"

COMMON: dict[str, Any] = {"group_size": 16, "partitions": 2, "seed": 0}
CASES: dict[str, dict[str, Any]] = {
    "llama-3-bits": {"bits": 3.0, "calibration": "none"},
    "llama-compander-free-depths": {
        "bits": 4.5,
        "calibration": "none",
        "levels": "compander",
        "separable_depths": False,
    },
    "llama-self-calibrated": {"bits": 4.0, "sequences": 4, "length": 24},
    "llama-rtn-4-bits": {"bits": 4, "method": "rtn"},
}


def build_network() -> LlamaForCausalLM:
    """A Llama of 20 thousand weights, Gaussian in groups of different spread."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    network = LlamaForCausalLM(config).eval()
    rng = np.random.Generator(np.random.PCG64(20240902))
    with torch.no_grad():
        for _, parameter in sorted(network.named_parameters()):
            if parameter.ndim == 2:
                rows, columns = parameter.shape
                values = rng.standard_normal((rows, columns)) * 0.2
                values *= np.exp2(rng.standard_normal((rows, 1)) * 0.5)
                values *= np.exp2(rng.standard_normal(columns) * 0.5)
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return network


def convert_case(name: str, folder: Path) -> dict[str, Any]:
    """Convert the network saved in `folder/model` as the case says; return its figures."""
    path = folder / f"{name}.cvxq"
    options = ConversionOptions.of(**{**COMMON, **CASES[name]})
    report = convert(str(folder / "model"), path, options)
    return {**report.for_file(), "file_bytes": path.stat().st_size, **figures_of(path)}


def figures_of(path: Path) -> dict[str, Any]:
    """Figures that follow from the decoded matrices of a file."""
    original = dict(build_network().named_parameters())
    error = energy = 0.0
    depths: dict[str, float] = {}
    with Reader(path) as reader:
        for name in reader.names:
            tensor = reader.read(name)
            if isinstance(tensor, CompandedTensor):
                weight = original[name].detach().double().numpy()
                decoded = dequantize(tensor, reader.codebook(0)).astype(np.float64)
                error += float(((decoded - weight) ** 2).sum())
                energy += float((weight**2).sum())
                depths[name] = round(float(tensor.depths.mean()), 6)
        levels = [float(x) for x in reader.codebook(0).levels[2]]
    return {"relative_error": error / energy, "mean_depths": depths, "levels_of_depth_3": levels}


def digest_of_network() -> str:
    """SHA-256 of the weights, little-endian, in the order of their names."""
    digest = hashlib.sha256()
    for _, parameter in sorted(build_network().named_parameters()):
        digest.update(parameter.detach().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def main() -> None:
    """Write the expected figures and the golden file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_network().save_pretrained(folder / "model")
        expected: dict[str, Any] = {"network_sha256": digest_of_network()}
        expected |= {case: convert_case(case, folder) for case in CASES}
        FILE.write_bytes((folder / FILE.name).read_bytes())
    expected["llama-3-bits"]["file_sha256"] = hashlib.sha256(FILE.read_bytes()).hexdigest()
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
