"""A tiny runnable `.cvxq` file with a tokenizer of single characters, and its original folder."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cvxq.cli.application import application

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


@pytest.fixture(autouse=True)
def in_one_thread(one_thread: None) -> None:
    """Let every test of the command line compute in one thread."""


def tokenizer_files(
    folder: Path, template: str | None = None, special: Sequence[str] = ()
) -> dict[str, bytes]:
    """Files of a tokenizer with one token per character and `special` ones after them.

    Without these they are fewer than the tiny vocabulary of 96.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_letters + string.digits + " .,:!?'-<|>\n/[]"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {c: i for i, c in enumerate(characters, start=3)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if template is not None:
        settings["chat_template"] = template
    return {
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the tokenizer without a chat template."""
    return tokenizer_files(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the tokenizer with a chat template."""
    return tokenizer_files(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture
def special_file(make_file: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of files with a template and special tokens: special_file(template, [...])."""

    def make(template: str, special: Sequence[str], **changes: Any) -> Path:
        files = tokenizer_files(tmp_path, template, special)
        path: Path = make_file("llama", name="special.cvxq", files=files, **changes).path
        return path

    return make


@pytest.fixture
def recite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has every model say given texts, one after the other, for ever."""
    import cvxq
    from cvxq.lean.session import LeanSession
    from cvxq.session import Session

    def say(file: Path, *texts: str) -> None:
        with cvxq.load(file) as model:
            scripts = [
                model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
            ]
        turns = itertools.cycle(scripts)

        def draw(self: Session, ids: Sequence[int], *_: object) -> Iterator[int]:
            return iter([*next(turns), 2])  # </s>

        for kind in (Session, LeanSession):
            monkeypatch.setattr(kind, "draw", draw)

    return say


@pytest.fixture
def model_file(make_file: Callable[..., Any], plain_tokenizer: dict[str, bytes]) -> Path:
    """A Llama of some ten thousand parameters, context 64, that can be run on text."""
    path: Path = make_file("llama", files=plain_tokenizer, add_biases=True).path
    return path


@pytest.fixture
def chat_file(make_file: Callable[..., Any], chat_tokenizer: dict[str, bytes]) -> Path:
    """The same with a chat template."""
    path: Path = make_file("llama-tied", name="chat.cvxq", files=chat_tokenizer).path
    return path


@pytest.fixture
def original_folder(
    make_file: Callable[..., Any], plain_tokenizer: dict[str, bytes], tmp_path: Path
) -> tuple[Path, Path]:
    """A `.cvxq` file and a checkpoint folder with the same dequantized weights."""
    made = make_file("llama", name="same.cvxq", files=plain_tokenizer)
    folder = tmp_path / "original"
    made.network.save_pretrained(folder)
    for name, data in plain_tokenizer.items():
        (folder / name).write_bytes(data)
    return made.path, folder


@pytest.fixture
def cvxq() -> Callable[..., Result]:
    """Return a function that runs a command in this process: cvxq("verify", path, input=…)."""

    def run(*arguments: object, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(application, [str(a) for a in arguments], input=input)

    return run


@pytest.fixture
def stderr_lines() -> Callable[[Result], list[str]]:
    """Return a function that gives the lines on stderr, without the notice of a missing library."""

    def lines(result: Result) -> list[str]:
        notice = "runs through transformers: the native library is missing"
        return [line for line in result.stderr.splitlines() if notice not in line]

    return lines


@pytest.fixture
def fails(
    cvxq: Callable[..., Result], stderr_lines: Callable[[Result], list[str]]
) -> Callable[..., str]:
    """Return a function that asserts one line on stderr and an exit code, and gives the line."""

    def check(code: int, *arguments: object, input: str | bytes | None = None) -> str:
        result = cvxq(*arguments, input=input)
        lines = stderr_lines(result)
        assert result.exit_code == code, result.stderr
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("cvxq: ")
        return lines[0].removeprefix("cvxq: ")

    return check
