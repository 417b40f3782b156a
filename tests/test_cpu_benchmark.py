"""The CPU benchmark on tiny files, beside programs that only pretend to be llama.cpp."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import cpu_load  # noqa: E402
from cpu_kernel import WIDTHS, measure_widths  # noqa: E402
from cpu_page import Sample, page  # noqa: E402
from cpu_real import models, real_page  # noqa: E402
from cpu_runs import Amount  # noqa: E402
from cvxq_kernels import cpu  # noqa: E402
from peers.llamacpp import LlamaCpp  # noqa: E402

LITTLE = Amount(prompt=4, tokens=2)
BENCH = f"""#!{sys.executable}
import json
print(json.dumps([
    {{"n_gen": 0, "avg_ts": 100.0, "avg_ns": 1, "samples_ns": [1]}},
    {{"n_gen": 2, "avg_ts": 12.5, "avg_ns": 1, "samples_ns": [1]}},
]))
"""
QUANTIZE = f"""#!{sys.executable}
import shutil, sys
assert sys.argv[1] == "--allow-requantize", sys.argv
shutil.copy(sys.argv[2], sys.argv[3])
"""


@pytest.fixture(autouse=True)
def native() -> None:
    if not cpu.is_available():
        pytest.skip(cpu.why_not())


@pytest.fixture
def peer(tmp_path: Path) -> LlamaCpp:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("llama-bench", BENCH), ("llama-quantize", QUANTIZE)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return LlamaCpp("0.0", tools, tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder as --real takes it, with the GGUF file of its one model."""
    folder = tmp_path / "files"
    folder.mkdir()
    for rate in ("3.2", "4.25"):
        shutil.copy(ROOT / "tests" / "golden" / "llama-3-bits.cvxq", folder / f"tiny-{rate}.cvxq")
    (folder / "tiny.gguf").write_bytes(bytes(100))
    return folder


def test_real_models_stand_beside_their_published_and_smaller_files(
    files: Path, tmp_path: Path, peer: LlamaCpp
) -> None:
    text = real_page(files, files, 1, 1, LITTLE, peer, "a machine", tmp_path)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    labels = [row[0] for row in rows if row]
    assert labels[2:4] == ["tiny, 3.2 bits", "tiny, 4.25 bits"]
    aims = [[cell.partition("wanted ")[2][:3] for cell in row[2:]] for row in rows if len(row) == 4]
    assert aims[2:] == [["2.5", "1.5"], ["2.0", "1.5"]]
    assert labels[6:] == [
        "cvxq 3.2 bits",
        "cvxq 4.25 bits",
        "llama.cpp as published",
        *(f"llama.cpp {kind}" for kind in ("Q2_K", "Q3_K_M", "Q4_K_M")),
    ]
    assert rows[-1][1:4] == ["100", "12.5 ± 0.0", "100 ± 0"]


def test_a_folder_without_rates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no NAME-RATE\.cvxq"):
        models(tmp_path)


def test_decoding_beside_busy_processes(
    files: Path, peer: LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(path: Path, threads: int, amount: Amount) -> Sample:
        return Sample(10.0 * threads, 1.0, 1, 1.0)

    monkeypatch.setattr(cpu_load, "SETTLING", 0)
    monkeypatch.setattr(cpu_load, "measure_ours", measured)
    ours = files / "tiny-3.2.cvxq"
    text = cpu_load.load_page(ours, files / "tiny.gguf", 2, 1, LITTLE, peer, "a machine")
    for load in ("alone", "one busy process", "one for each processor"):
        assert f"| {load} |" in text
        assert f"- {load}: 2 threads decode 2.00 times as fast as one" in text
    assert "llama.cpp, 2 threads" in text
    alone = cpu_load.load_page(ours, None, 2, 1, LITTLE, None, "a machine")
    assert "llama.cpp" not in alone


def test_widths_have_rows() -> None:
    shares = measure_widths(1, passes=1, rows=64, packed_bytes=1)
    text = page([], {}, shares, [], "a machine", "0.0", [])
    for width, multiple in WIDTHS:
        assert f"| {width} | {multiple} |" in text
