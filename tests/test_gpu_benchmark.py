"""The GPU measurements go through on a CPU with tiny shapes: the script is ready for a device."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return run(*options): what a dry run prints; here, where what it loads is loaded already."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module("gpu")

    def dry(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--dry-run", *options])
        status = script.main()
        printed, said = capfd.readouterr()
        assert status == 0, said
        assert "A dry run with tiny shapes: none of these figures means anything." in printed
        return printed

    return dry


@pytest.mark.slow
def test_decoding(run: Callable[..., str]) -> None:
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
def test_conversion(run: Callable[..., str]) -> None:
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


@pytest.fixture
def bring_up(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu_bring_up")


def test_a_stage_says_what_it_found(bring_up: ModuleType, tmp_path: Path) -> None:
    """What fails says what that means; what builds on it is left out, the rest goes on."""

    def stage(name: str, code: str, **more: Any) -> Any:
        command = (sys.executable, "-c", code)
        return bring_up.Stage(name, command, 1, f"shows {name}", f"means {name}", **more)

    stages = [
        stage("a", "print('fine')"),
        stage("b", "print('why'); raise SystemExit(3)"),
        stage("c", "", after=("b",)),
        stage("d", "", after=("c",)),
        stage("e", "", tool="no-such-tool"),
        stage("f", "import sys; assert sys.argv[1] == 'x.cvxq'"),
    ]
    stages[-1] = replace(stages[-1], command=(*stages[-1].command, "{file}"))
    said: list[str] = []
    assert not bring_up.bring_up(stages, tmp_path, Path("x.cvxq"), False, said.append)
    assert re.fullmatch(r"1/6 a: passed in \d+ s: shows a\.", said[0])
    assert said[1] == "    why"
    log = tmp_path / "2-b.txt"
    assert re.fullmatch(
        rf"2/6 b: failed with status 3 after \d+ s\. It means: means b\. All of it: {log}", said[2]
    )
    assert said[3:6] == [
        "3/6 c: left out, since b failed.",
        "4/6 d: left out, since c failed.",
        "5/6 e: left out, there is no no-such-tool here.",
    ]
    assert said[6].startswith("6/6 f: passed")


def test_a_stage_that_hangs_is_stopped(bring_up: ModuleType, tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    slow = bring_up.Stage("slow", command, 0.005, "", "it hung")
    said: list[str] = []
    assert not bring_up.bring_up([slow], tmp_path, None, False, said.append)
    assert "stopped at its limit of 0.005 minutes" in said[-1]


def test_stages_fit_a_device_and_name_what_there_is(bring_up: ModuleType) -> None:
    names = [stage.name for stage in bring_up.STAGES]
    for index, stage in enumerate(bring_up.STAGES):
        assert stage.minutes < 10
        assert set(stage.after) <= set(names[:index])
        paths = [word for word in stage.command if word.startswith(("tests/", "/"))]
        assert all((SCRIPT.parents[1] / path).exists() for path in paths)
