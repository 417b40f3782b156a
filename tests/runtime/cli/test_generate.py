"""`cvxq generate`: where prompts come from, sampling, streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq as runtime
import pytest
from click.testing import Result

Cvxq = Callable[..., Result]


def test_text_goes_to_stdout_and_speed_to_stderr(
    cvxq: Cvxq, model_file: Path, stderr_lines: Callable[[Result], list[str]]
) -> None:
    result = cvxq("generate", model_file, "Once upon", "--max-tokens", 12, "--temperature", 0)
    assert result.exit_code == 0
    with runtime.load(model_file) as model:
        settings = runtime.SamplingSettings(temperature=0, max_tokens=12)
        expected = model.generate("Once upon", settings)
    assert expected.text
    assert result.stdout == expected.text + "\n"
    assert "9 prompt tokens" in result.stderr
    assert f"{len(expected.ids)} tokens in" in result.stderr
    assert "tokens/s" in result.stderr
    assert len(stderr_lines(result)) == 1


def test_prompts_from_argument_file_and_stdin_agree(
    cvxq: Cvxq, model_file: Path, tmp_path: Path
) -> None:
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text("A b\n", encoding="utf-8")
    windows_file = tmp_path / "windows.txt"
    windows_file.write_bytes(b"\xef\xbb\xbfA b\r\n")
    options = ("--max-tokens", 8, "--seed", 3)
    texts = {
        cvxq("generate", model_file, "A b", *options).stdout,
        cvxq("generate", model_file, "--file", prompt_file, *options).stdout,
        cvxq("generate", model_file, "--file", windows_file, *options).stdout,
        cvxq("generate", model_file, *options, input="A b\n").stdout,
        cvxq("generate", model_file, *options, input=b"\xef\xbb\xbfA b\r\n").stdout,
        cvxq("generate", model_file, "-", *options, input="A b").stdout,
    }
    assert len(texts) == 1


def test_sampling_options_reach_the_sampler(cvxq: Cvxq, model_file: Path) -> None:
    def text(*options: object) -> str:
        result = cvxq("generate", model_file, "Once", "--max-tokens", 16, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    greedy = text("--temperature", 0)
    assert text("--temperature", 5, "--seed", 1) == text("--temperature", 5, "--seed", 1)
    assert text("--temperature", 5, "--seed", 1) != text("--temperature", 5, "--seed", 2)
    assert text("--temperature", 5, "--seed", 1, "--top-k", 1) == greedy
    assert text("--temperature", 5, "--seed", 1, "--top-p", 1e-6) == greedy
    assert text("--temperature", 5, "--seed", 1, "--min-p", 0.999999) == greedy
    assert text("--temperature", 0, "--repetition-penalty", 50) != greedy


def test_stop_texts_end_the_answer_unseen(cvxq: Cvxq, model_file: Path) -> None:
    whole = cvxq("generate", model_file, "Once", "--max-tokens", 16, "--seed", 1).stdout
    stop = whole[5]
    result = cvxq(
        "generate", model_file, "Once", "--max-tokens", 16, "--seed", 1, "--stop", stop,
        "--stop", "never occurs",
    )  # fmt: skip
    assert result.stdout == whole[: whole.index(stop)] + "\n"
    assert "stop text" in result.stderr


def test_weights_and_threads_do_not_change_the_text(cvxq: Cvxq, model_file: Path) -> None:
    import torch

    common = ("generate", model_file, "Once upon", "--max-tokens", 8, "--temperature", 0)
    dense = cvxq(*common, "--weights", "dense", "--threads", 2).stdout
    assert torch.get_num_threads() == 2
    assert cvxq(*common, "--weights", "packed", "--threads", 1).stdout == dense
    assert cvxq(*common, "--weights", "packed", "--threads", 3).stdout == dense


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["x", "--temperature", -1], "temperature is -1.0, allowed: 0 or more"),
        (["x", "--temperature", "hot"], "'hot' is not a valid float"),
        (["x", "--top-p", 0], "top_p is 0.0"),
        (["x", "--max-tokens", 0], "max_tokens is 0, allowed: 1 or more"),
        (["x", "--stop", ""], "stop is"),
        (["x", "--weights", "wet"], "'wet' is not one of"),
        (["x", "--threads", 0], "0 is not in the range"),
        (["x", "--file", "prompt.txt"], "exclude each other"),
        (["x" * 65], "context holds 64"),
    ],
)
def test_bad_options_name_themselves(
    fails: Callable[..., str], model_file: Path, options: list[object], found: str
) -> None:
    assert found in fails(2, "generate", model_file, *options)


def test_prompt_that_is_missing_or_not_text(
    fails: Callable[..., str], model_file: Path, tmp_path: Path
) -> None:
    assert "does not exist" in fails(3, "generate", model_file, "--file", tmp_path / "none.txt")
    assert "is a folder" in fails(3, "generate", model_file, "--file", tmp_path)
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"ab\xff")
    assert "byte 2 is not UTF-8" in fails(3, "generate", model_file, "--file", broken)
    assert "stdin: byte 0 is not UTF-8" in fails(3, "generate", model_file, input=b"\xff")


def test_file_without_tokenizer_says_so(
    fails: Callable[..., str], make_file: Callable[..., Any]
) -> None:
    path = make_file("llama").path
    assert "has no tokenizer" in fails(3, "generate", path, "Once")


def test_a_full_context_ends_the_text_or_shifts(
    cvxq: Cvxq, model_file: Path, stderr_lines: Callable[[Result], list[str]]
) -> None:
    common = ("generate", model_file, "Once upon", "--max-tokens", 90, "--temperature", 2)
    common = (*common, "--seed", 1, "--top-k", 40)
    ended = cvxq(*common)
    assert ended.exit_code == 0
    speed, full = stderr_lines(ended)
    assert "context full" in speed
    assert full.startswith("the context of 64 tokens is full")
    assert "--context" in full
    assert "--shift" in full
    shifted = cvxq(*common, "--shift")
    assert shifted.exit_code == 0
    assert stderr_lines(shifted)[0].count("90 tokens in") == len(stderr_lines(shifted)) == 1
    assert shifted.stdout.startswith(ended.stdout.removesuffix("\n"))


def test_the_context_can_be_chosen(
    cvxq: Cvxq,
    fails: Callable[..., str],
    model_file: Path,
    stderr_lines: Callable[[Result], list[str]],
) -> None:
    common = ("generate", model_file, "Once upon", "--max-tokens", 90, "--temperature", 2)
    common = (*common, "--seed", 1, "--top-k", 40)
    short = cvxq(*common, "--context", 16)
    assert "the context of 16 tokens is full" in stderr_lines(short)[-1]
    long = cvxq(*common, "--context", 120)
    assert long.exit_code == 0
    assert "--context 120 is more than the 64 tokens" in stderr_lines(long)[0]
    assert "90 tokens in" in stderr_lines(long)[1]
    assert "holds 8" in fails(2, *common, "--context", 8)
    assert "allowed: 2 to 16777216" in fails(2, *common, "--context", 1 << 40)
    assert "1 is not in the range" in fails(2, *common, "--context", 1)
