"""What is said of a command's memory: all of it, by stage, its children's included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peak

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# A child holds memory in the second stage; a file that is mapped counts for nothing.
COMMAND = """
import mmap, subprocess, sys, tempfile, time
print("load: 0/1, 0 s", file=sys.stderr, flush=True)
with tempfile.TemporaryFile() as file:
    file.truncate(400 << 20)
    mapped = mmap.mmap(file.fileno(), 400 << 20)
    for page in range(0, 400 << 20, 4096):
        mapped[page] = 1
    time.sleep(0.5)
    print("measure: 0/8, 0 s", file=sys.stderr, flush=True)
    hold = "x = bytearray(b'1') * (100 << 20); import time; time.sleep(1)"
    subprocess.run([sys.executable, "-c", hold], check=True)
sys.exit(3)
"""


def test_peaks_are_of_all_processes_by_stage(capfd: pytest.CaptureFixture[str]) -> None:
    found = peak.peaks_of([sys.executable, "-c", COMMAND])
    assert found.code == 3
    size, stage = found.most
    assert stage == "measure"
    assert 100 << 20 < size < 200 << 20
    assert found.stages["load"] < 100 << 20
    assert "measure" in found.line()
    assert capfd.readouterr().err.splitlines() == ["load: 0/1, 0 s", "measure: 0/8, 0 s"]
