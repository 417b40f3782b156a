"""vLLM runs files and exported folders, and finds what cvxq finds.

    python -m pytest -m vllm tests/runtime

docs/serving.md says how to make an environment with vLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cvxq
import pytest
import torch
from cvxq.export import export
from cvxq.transformers import compute_exactly
from torch import nn

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.usefixtures("one_thread"),
]
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}  # which vLLM can attend with
PROMPTS = [[(7 * i + 3 * j) % 96 for i in range(20 + j)] for j in range(3)]
TOKENS = 12
TOLERANCE = 1e-5  # of log-probabilities: float32 sums in another order
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama-tied", {"add_biases": True}),
    ("llama", {}),
    ("gpt2", {}),
    ("qwen2", {"add_biases": True}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi3", {}),
)
CLASSES = {
    "llama-tied": "LlamaForCausalLM",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

MakeFile = Callable[..., Any]


def run_vllm(models: list[Path], eager: bool = True, ranks: int = 1) -> list[Any]:
    order = {
        "models": [*map(str, models)],
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "context": 64,
        "eager": eager,
        "ranks": ranks,
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_vllm.py"), json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def scores(network: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, by a network of transformers."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        logits = network(input_ids=given).logits[0].double().log_softmax(-1)
    found: torch.Tensor = logits[:-1].gather(1, given[0, 1:, None])[:, 0]
    return found


def continued(network: Any, ids: list[int]) -> list[int]:
    """Continue a text greedily, reading all of it for every token."""
    ids = [*ids]
    for _ in range(TOKENS):
        with torch.inference_mode():
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-TOKENS:]


def check(made: Any, found: Any) -> None:
    """Compare with the file's own network, which multiplies exactly as it lies packed."""
    assert isinstance(found, list), found
    with cvxq.load(made.path) as model:
        compute_exactly(model.network)
        for ids, answer in zip(PROMPTS, found, strict=True):
            expected = scores(model.network, ids)
            assert expected.std() > 0.1  # else equality would say nothing
            differences = torch.tensor(answer["log_probabilities"]).double() - expected
            assert differences.abs().max() <= TOLERANCE
            assert answer["ids"] == continued(model.network, ids)


@pytest.fixture
def made(make_file: MakeFile) -> Callable[..., list[Any]]:
    """Return a function that makes files of kinds."""

    def make(kinds: tuple[tuple[str, dict[str, Any]], ...]) -> list[Any]:
        files = []
        for kind, options in kinds:
            config = {"architectures": [CLASSES[kind]]}
            files.append(make_file(kind, f"{kind}.cvxq", config=config, sizes=SIZES, **options))
        return files

    return make


def test_files_and_folders(made: Any, tmp_path: Path) -> None:
    files = made(KINDS)
    folder = tmp_path / "folder"
    export(files[0].path, folder)
    *found, of_folder = run_vllm([*(file.path for file in files), folder])
    for file, answers in zip(files, found, strict=True):
        check(file, answers)
    assert of_folder == found[0]


def test_each_added_bias_counts(made: Any) -> None:
    (file,) = made(KINDS[:1])
    ((first, *_),) = run_vllm([file.path])
    found = torch.tensor(first["log_probabilities"]).double()
    biased = [module for module in file.network.modules() if isinstance(module, nn.Linear)]
    assert len(biased) == 14 + 1
    for module in biased:
        if module is not file.network.lm_head:
            kept = module.bias
            module.bias = None
            assert (found - scores(file.network, PROMPTS[0])).abs().max() > 100 * TOLERANCE
            module.bias = kept


def test_compiled(made: Any) -> None:
    files = made(KINDS[:1])
    check(files[0], run_vllm([files[0].path], eager=False)[0])


@pytest.mark.parametrize("eager", [True, False])
def test_two_ranks(eager: bool, made: Any) -> None:
    files = made((KINDS[0], KINDS[2], KINDS[-1])[: 3 if eager else 1])
    found = run_vllm([file.path for file in files], eager, ranks=2)
    for file, answers in zip(files, found, strict=True):
        check(file, answers)


def test_what_vllm_cannot_run_is_said(made: Any) -> None:
    (file,) = made((("mixtral", {}),))
    assert "a mixture of experts, which vLLM cannot run" in run_vllm([file.path])[0]
