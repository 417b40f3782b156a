"""What touches transformers, on the oldest versions that pyproject.toml allows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("transformers", "huggingface_hub", "safetensors", "tokenizers")
OLD_NEEDS = ("httpx",)  # of these versions, but not of those in constraints.txt
TESTS = (
    "tests/converter/source",
    "tests/runtime/lean/test_native_decoder.py",
    "tests/end_to_end/test_toy_model.py",
    "tests/end_to_end/test_convolutions.py",
    "tests/end_to_end/test_experts.py::test_packed_experts_compute_what_transformers_does_with_the_files_weights",
)


def floors() -> list[str]:
    """The oldest allowed version of each of PACKAGES, as pip spells it."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = [re.search(rf'"{name}>=([\d.]+)', text) for name in PACKAGES]
    assert all(found)
    return [f"{name}=={m[1]}" for name, m in zip(PACKAGES, found, strict=True) if m]


@pytest.mark.slow
def test_the_oldest_versions_that_are_allowed_will_do(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    for wanted in (["--no-deps", *floors()], OLD_NEEDS):
        installed = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
        if installed.returncode:
            pytest.skip(f"pip could not install {', '.join(wanted)}")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command += TESTS
    options = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path}}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-4000:]
    shown = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True,
        text=True,
        check=True,
        **options,  # type: ignore[call-overload]
    )
    assert shown.stdout.startswith(floors()[0].removeprefix("transformers=="))
