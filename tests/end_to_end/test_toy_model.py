"""A toy Llama all the way: checkpoint → `.cvxq` → text, and three roads to the same tokens."""

from __future__ import annotations

import json
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cvxq
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from cvxq.cli.application import application
from cvxq.lean.native_decoder import NativeDecoder
from cvxq.sample import SamplingSettings
from cvxq_format import CompandedTensor, Reader, dequantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
PROMPT = "It was a dark and stormy"
CHARACTERS = string.ascii_letters + string.digits + " .,:!?'-\n"


def cvxq_command(*arguments: object) -> Result:
    """Run a command in this process; it must succeed."""
    result = CliRunner().invoke(application, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def save_tokenizer(folder: Path) -> int:
    """Save a tokenizer with one token per character; return how many tokens it has."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {c: i for i, c in enumerate(CHARACTERS, start=3)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return len(vocabulary)


@dataclass(frozen=True)
class Toy:
    """The original's folder, the `.cvxq` file, its report and the original network."""

    folder: Path
    path: Path
    report: dict[str, Any]
    original: LlamaForCausalLM


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["untied", "tied"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A random Llama, saved, converted to 4 bits with the command."""
    folder = tmp_path_factory.mktemp("toy") / "original"
    vocabulary = save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=request.param == "tied",
    )
    torch.manual_seed(1)
    network = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:  # large enough for the text to depend on everything
                parameter.add_(torch.randn_like(parameter) * 0.15)
    network.save_pretrained(folder)
    path, report = folder.parent / "toy.cvxq", folder.parent / "report"
    cvxq_command(
        *("convert", folder, "-o", path, "--bits", 4, "--sequences", 6, "--length", 32),
        *("--group-size", 32, "--threads", 1, "--report", report),
    )
    return Toy(folder, path, json.loads((report / "report.json").read_text("utf-8")), network)


def dequantized(toy: Toy) -> LlamaForCausalLM:
    """The network of transformers with the file's weights, which nothing of the runtime touched."""
    network = LlamaForCausalLM.from_pretrained(toy.folder).float().eval()
    parameters = dict(network.named_parameters())
    with Reader(toy.path) as reader, torch.no_grad():
        for name in reader.names:
            stored = reader.read(name)
            if isinstance(stored, CompandedTensor):
                value = torch.from_numpy(dequantize(stored, reader.codebook(0)))
            elif stored.dtype == "bf16":
                value = torch.from_numpy(stored.data.copy()).view(torch.bfloat16).float()
            else:
                value = torch.from_numpy(stored.data.astype(np.float32))
            if name in reader.added_biases:
                network.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(value)
            else:
                parameters[name].copy_(value)
    return network


def greedy(network: LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    """The most likely tokens one by one, without a cache; stops at the end of a text."""
    text = list(ids)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(network(torch.tensor([text])).logits[0, -1].argmax()))
            if text[-1] == 2:
                break
    return text[len(ids) :]


def test_the_file_is_sound_and_as_small_as_asked(toy: Toy) -> None:
    assert "sound" in cvxq_command("verify", toy.path).output.lower()
    found = json.loads(cvxq_command("inspect", toy.path, "--json").stdout)
    assert 3.98 <= found["rate_bits_per_weight"] <= 4.0
    assert found["rate_bits_per_weight"] == pytest.approx(toy.report["rate_bits_per_weight"])
    assert found["file_bytes"] == toy.path.stat().st_size
    assert toy.report["kl"] < 0.5


def test_packed_and_dense_weights_and_transformers_say_the_same(toy: Toy) -> None:
    expected: list[int] | None = None
    settings = SamplingSettings(temperature=0.0, max_tokens=40)
    for weights in ("packed", "dense"):
        with cvxq.load(toy.path, weights=weights) as model:
            ids = model.encode(PROMPT)
            if expected is None:
                expected = greedy(dequantized(toy), ids, 40)
            fast = model.generate(PROMPT, settings)
            if isinstance(model.decoder, NativeDecoder):
                model.decoder.exact = True  # int8 products may turn a near tie
            generated = model.generate(PROMPT, settings)
        assert list(generated.ids) == expected
        output = cvxq_command(
            *("generate", toy.path, PROMPT, "--temperature", 0, "--max-tokens", 40),
            *("--weights", weights),
        ).stdout
        assert output == fast.text + "\n"
    assert expected is not None
    assert len(set(expected)) > 3  # not one letter for ever


def test_the_text_depends_on_the_weights(toy: Toy) -> None:
    """The comparison above would also hold if every network said the same."""
    ids = [1, *range(3, 20)]
    other = LlamaForCausalLM(toy.original.config).eval()
    assert greedy(other, ids, 20) != greedy(dequantized(toy), ids, 20)


def test_the_file_stays_close_to_the_original(toy: Toy) -> None:
    tokens = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = torch.log_softmax(toy.original(tokens).logits, -1)
        after = torch.log_softmax(dequantized(toy)(tokens).logits, -1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    unrelated = float((before.exp() * (before - before.roll(1, 0))).sum(-1).mean())
    assert kl < 0.25 * unrelated


def test_perplexity_of_the_file_against_the_original(toy: Toy, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    record = json.loads(
        cvxq_command(
            *("perplexity", toy.path, "--text", text, "--context", 64),
            *("--against", toy.folder, "--json"),
        ).stdout
    )
    assert 0 < record["kl"]["mean"] < 1
    change = np.log(record["perplexity"]["mean"] / record["original_perplexity"]["mean"])
    assert change != 0
    assert abs(change) < 1
    assert record["rate_bits_per_weight"] == pytest.approx(toy.report["rate_bits_per_weight"])


@pytest.mark.parametrize("toy", ["untied"], indirect=True)
@pytest.mark.skipif(
    shutil.which("make") is None or not (Path(sys.prefix) / "bin" / "cvxq").exists(),
    reason="needs make, and cvxq installed in this environment",
)
@pytest.mark.slow
def test_make_chat_demo_converts_a_folder_once_and_talks(toy: Toy, tmp_path: Path) -> None:
    file = tmp_path / "toy.cvxq"
    words = ["make", "-o", "environment", "chat-demo", f"VENV={sys.prefix}"]
    words += [f"MODEL={toy.folder}/", f"CHAT_FILE={file}"]

    def talk() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=ROOT, input="hello\n", capture_output=True, text=True, check=True
        )

    first = talk()
    assert "cvxq convert" in first.stdout
    made = file.read_bytes()
    second = talk()
    assert "cvxq convert" not in second.stdout
    assert second.stdout.splitlines()[1:]  # the answer
    assert file.read_bytes() == made
