"""What is said, and what still runs, where an extra is not installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq
import pytest
from click.testing import Result
from cvxq import evaluate
from cvxq.errors import MissingExtraError, UnsupportedModelError
from cvxq.extras import PACKAGES, need
from cvxq_kernels import cpu

ROOT = Path(__file__).resolve().parents[3]
MakeFile = Callable[..., Any]
Remove = Callable[[], None]
ABSENT = sorted({name for names in PACKAGES.values() for name in names} | {"triton"})
UNUSED = (*ABSENT, "cvxq_converter", "huggingface_hub", "safetensors")

# Runs commands in a process in which no package of an extra can be found; prints what they did.
WITHOUT_EXTRAS = f"""
import json, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        return None if name in {ABSENT!r} else super().find_spec(name, *arguments)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]

from click.testing import CliRunner
from cvxq.cli.application import application

results = [CliRunner().invoke(application, words, "ab\\n") for words in json.load(sys.stdin)]
outcomes = [[result.exit_code, result.stdout, result.stderr] for result in results]
print(json.dumps([outcomes, sorted(set(sys.modules) & set({UNUSED!r}))]))
"""


@pytest.fixture
def remove_extras(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which no package of an extra is there."""

    def remove() -> None:
        for name in ABSENT:
            monkeypatch.setitem(sys.modules, name, None)

    return remove


def listed(extra: str) -> set[str]:
    """Names that the distributions that pyproject.toml lists under an extra are imported by."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(rf"^{extra} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert found is not None, extra
    return {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', found[1])}


@pytest.mark.parametrize("extra", PACKAGES)
def test_an_extra_brings_what_is_looked_for(extra: str) -> None:
    assert set(PACKAGES[extra]) <= listed(extra)


def test_no_dependency_is_heavy() -> None:
    assert not set(ABSENT) & listed("dependencies")


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    need("convert", "this")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError) as caught:
        need("convert", "this")
    assert str(caught.value) == ("this needs gguf, not installed here: pip install 'cvxq[convert]'")
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedModelError, match="this needs torch, transformers and gguf, "):
        need("convert", "this")


@pytest.mark.parametrize(
    ("options", "why"), [({}, ": it has no decoder.json"), ({"weights": "dense"}, "")]
)
def test_a_model_that_needs_transformers_says_so(
    options: dict[str, Any], why: str, make_file: MakeFile, remove_extras: Remove
) -> None:
    path = make_file("llama", with_record=bool(options)).path
    remove_extras()
    with pytest.raises(MissingExtraError) as caught:
        cvxq.load(path, **options)
    assert str(caught.value) == (
        f"{path} runs through transformers{why}; that needs torch, transformers, gguf and "
        "sentencepiece, not installed here: pip install 'cvxq[convert]'"
    )


def test_a_tokenizer_that_needs_transformers_says_so(
    make_file: MakeFile, remove_extras: Remove
) -> None:
    path = make_file("llama", files={"tokenizer.model": b"pieces"}).path
    remove_extras()
    with (
        cvxq.load(path) as model,
        pytest.raises(MissingExtraError, match=r"tokenizer of .* \(tokenizer.model\) needs torch"),
    ):
        model.encode("a")


def test_a_gpu_needs_torch(remove_extras: Remove) -> None:
    remove_extras()
    with pytest.raises(MissingExtraError, match=r"'cuda:1' needs torch, .*'cvxq\[cuda\]'"):
        cvxq.load("none.cvxq", device="cuda:1")


@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
def test_files_with_a_record_run_without_any_extra(chat_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night. " * 8)
    greedy = ("--max-tokens", "4", "--temperature", "0")
    file = str(chat_file)
    commands = [
        ["generate", file, "ab", *greedy],
        ["chat", file, *greedy],
        ["verify", file],
        ["inspect", file],
        ["bench", file, "--repeats", "1", "--tokens", "4", "--threads", "1"],
        ["perplexity", file, "--text", str(text), "--json"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=True,
    )
    outcomes, loaded = json.loads(done.stdout)
    assert loaded == []
    for code, _, stderr in outcomes:
        assert code == 0, stderr
        assert "through transformers" not in stderr
    generated, chat, verified, inspected, bench, perplexity = (out for _, out, _ in outcomes)
    with cvxq.load(chat_file) as model:
        settings = cvxq.SamplingSettings(temperature=0, max_tokens=4)
        assert generated == model.generate("ab", settings).text + "\n"
        windows = evaluate.windows(evaluate.token_ids(model.tokenizer, text.read_text()), 64)
        expected = evaluate.perplexity(model.decoder, windows)  # type: ignore[arg-type]
    assert json.loads(perplexity)["perplexity"]["mean"] == expected.perplexity
    assert chat
    assert "sound" in verified
    assert "bits per weight all-in" in inspected
    assert json.loads(bench.splitlines()[-1])["path"] == "lean"


@pytest.mark.parametrize(
    ("words", "who", "extra"),
    [
        (["convert", "FOLDER", "-o", "OUT", "--bits", "3"], "convert", "convert"),
        (["measure", "FOLDER", "-o", "OUT"], "measure", "convert"),
        (["perplexity", "FOLDER", "--text", "TEXT"], "FOLDER, a checkpoint,", "convert"),
        (
            ["perplexity", "FILE", "--text", "TEXT", "--against", "FOLDER"],
            "FOLDER, a checkpoint,",
            "convert",
        ),
        (["generate", "FILE", "a", "--device", "cuda"], "device 'cuda'", "cuda"),
        (["plan", "TEXT", "--plot", "OUT.png"], "plan --plot", "plot"),
        (["serve", "FILE"], "serve", "serve"),
    ],
)
def test_a_command_without_its_extra_says_which_to_install(
    words: list[str],
    who: str,
    extra: str,
    cvxq: Callable[..., Result],
    chat_file: Path,
    tmp_path: Path,
    remove_extras: Remove,
) -> None:
    (tmp_path / "TEXT").write_text("It was a dark night. " * 8)
    places = {"FILE": chat_file, **{n: tmp_path / n for n in ("FOLDER", "OUT", "TEXT")}}
    remove_extras()
    result = cvxq(*(places.get(word, word) for word in words))
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 5
    assert line.startswith(f"cvxq: {who.replace('FOLDER', str(places['FOLDER']))} needs ")
    assert line.endswith(f", not installed here: pip install 'cvxq[{extra}]'")
    assert not places["OUT"].exists()
