"""What users install: the wheel in fresh environments, the sdist where there is no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import cvxq
import pytest
from cvxq_kernels import cpu

ROOT = Path(__file__).resolve().parents[3]
MINORS = (10, 11, 12, 13)  # of Python 3
GREEDY = ("--max-tokens", "4", "--temperature", "0")
START_SECONDS = 1.5  # until text comes: a quarter of a second on an idle machine
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CC"))}


def run(
    *command: object, env: dict[str, str] = ENVIRONMENT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command away from the project's folders."""
    done = subprocess.run(
        list(map(str, command)),
        env=env,
        cwd=ROOT.root,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def interpreter(minor: int) -> str | None:
    """Return a Python 3.`minor` of this machine that can make virtual environments."""
    versions = Path.home() / ".pyenv" / "versions"
    found = [sys.executable, shutil.which(f"python3.{minor}")]
    found += map(str, sorted(versions.glob(f"3.{minor}.*/bin/python")))
    ask = "import sys, venv; print(*sys.version_info[:2])"
    for python in filter(None, found):
        if run(python, "-c", ask, check=False).stdout.split() == ["3", str(minor)]:
            return python
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel that is built from it."""
    pytest.importorskip("build", reason="build is not installed: refresh the environment")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel."""
    (found,) = built.glob("*.whl")
    return found


def metadata(wheel: Path, field: str) -> list[str]:
    """Return the values of a field of a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    return re.findall(rf"^{field}: (.*)$", text, re.MULTILINE)


@pytest.mark.slow
def test_the_wheel_is_small_and_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"cvxq-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    assert sizes["cvxq_kernels/cpu/_native.so"] < 2_000_000
    assert not [name for name in sizes if name.endswith((".c", ".h", ".inc"))]
    assert metadata(wheel, "Requires-Python") == [f">=3.{MINORS[0]}"]
    named = [f"Programming Language :: Python :: 3.{minor}" for minor in MINORS]
    assert set(named) <= set(metadata(wheel, "Classifier"))


@pytest.mark.slow
@pytest.mark.parametrize("minor", MINORS)
def test_the_wheel_runs_in_a_fresh_environment(
    minor: int, wheel: Path, chat_file: Path, tmp_path: Path
) -> None:
    found = interpreter(minor)
    if found is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    run(found, "-m", "venv", "--without-pip", tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python")
    install = (*pip, "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    if run(*install, "-c", ROOT / "constraints.txt", wheel, check=False).returncode:
        run(*install, "--no-deps", "--no-index", wheel)
        pytest.skip("pip could not install what the wheel needs")
    run(*pip, "check")
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    run(binaries / "python", "-m", "compileall", "-q", *site.glob("cvxq*"))
    heavy = [name for name in ("torch", "transformers", "triton") if (site / name).exists()]
    assert not heavy

    assert re.fullmatch(r"cvxq \d+\.\d+\.\d+\S*\n", run(binaries / "cvxq", "--version").stdout)
    assert "bits per weight all-in" in run(binaries / "cvxq", "inspect", chat_file).stdout
    done = run(binaries / "cvxq", "generate", chat_file, "ab", *GREEDY)
    with cvxq.load(chat_file) as model:
        settings = cvxq.SamplingSettings(temperature=0, max_tokens=4)
        assert done.stdout == model.generate("ab", settings).text + "\n"
    assert "transformers" not in done.stderr
    generate = (binaries / "cvxq", "generate", chat_file, "ab", "--max-tokens", 1)
    assert any(seconds(lambda: run(*generate)) < START_SECONDS for _ in range(3))


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@pytest.mark.slow
@pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())
def test_the_sdist_installs_without_a_compiler(
    built: Path, chat_file: Path, tmp_path: Path
) -> None:
    (sdist,) = built.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "site")
    no_compiler = {**ENVIRONMENT, "CC": "no-such-compiler"}
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", sdist, env=no_compiler)
    assert not [*(tmp_path / "site").rglob("_native*.so")]
    done = run(
        *(sys.executable, "-m", "cvxq.cli", "generate", chat_file, "ab", *GREEDY),
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "site")},
    )
    notice, _ = done.stderr.splitlines()  # the other line tells the speed
    assert re.search("runs through transformers: .* missing from .*: install a C compiler", notice)
