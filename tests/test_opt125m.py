"""The OPT-125M command runs through all its steps on a tiny model, and says what is wrong."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "opt125m.py"


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = spec_from_file_location("opt125m", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["opt125m"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(command: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["opt125m.py", *words])
    code = command.main()
    assert isinstance(code, int)
    return code


@pytest.mark.slow
def test_smoke_run_gives_four_rows_at_the_rates_asked(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert call(command, monkeypatch, "--smoke", "--bits", "4", "--out", str(tmp_path)) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    original, all_in, codes_only, every = record["rows"]
    assert original["rate_all_in"] == 16
    # A matrix of 64 × 64 weights moves by whole groups: 2 % is a few of them.
    assert all_in["rate_all_in"] == pytest.approx(4, rel=0.02)
    assert codes_only["rate_codes"] == pytest.approx(4, rel=0.02)
    assert every["rate_all_in"] == pytest.approx(4, rel=0.02)
    assert every["file_bits_per_parameter"] < all_in["file_bits_per_parameter"]
    assert len(list(tmp_path.glob("*.cvxq"))) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "docs/text.md says how to get WikiText-2"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"the <unk> house", "has <unk> in it"),
    ],
)
def test_a_wrong_text_is_one_line(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: bytes | None,
    message: str,
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert call(command, monkeypatch, "--model", "any/model", "--text", str(text)) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
