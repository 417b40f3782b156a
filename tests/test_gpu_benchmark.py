"""The GPU measurements go through on a CPU with tiny shapes: the script is ready for a device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def run(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--dry-run", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "A dry run with tiny shapes: none of these figures means anything." in done.stdout
    return done.stdout


@pytest.mark.slow
def test_decoding() -> None:
    """All ways of decoding have a row with finite speeds; depths are printed beside them."""
    page = run("--part", "decoding")
    rows = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) ± [\d.]+ \| [\d.]+ \| [\d.]+ \| ([\d.]+)%", page, re.M
    )
    names = [name for name, _, _ in rows]
    assert names == [
        *(f"{bits} bits, packed" for bits in (3, 4, 8)),
        "float32, same decoder",
        "float32, transformers",
    ]
    assert all(float(speed) > 0 and float(share) > 0 for _, speed, share in rows)
    for bits in (3, 4, 8):
        shares = re.search(rf"^Depths at {bits} bits: (.*)$", page, re.M)
        assert shares is not None
        mixed = [float(share) for share in re.findall(r": ([\d.]+)%", shares[1])]
        assert sum(mixed) == pytest.approx(100, abs=1)
        if bits < 8:
            assert sum(share > 3 for share in mixed) >= 4
    assert (
        len(re.findall(r"^Goal of \d+% of the bound at [34] bits: (reached|missed)", page, re.M))
        == 2
    )


@pytest.mark.slow
def test_conversion() -> None:
    page = run("--conversion")
    stages = re.findall(r"^\| (\w[\w ,]*) \| ([\d.]+) \|$", page, re.M)
    assert {"load", "calibrate", "measure", "allocate", "quantize", "correct", "write", "all"} <= {
        name for name, _ in stages
    }


def test_without_a_device_it_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        done.stderr == "gpu: there is no CUDA device here; --dry-run shows that the script works\n"
    )
