"""Make or refresh the virtual environment that the Makefile's targets run in.

    python3 tools/make_environment.py [--venv .venv] [--torch-index URL]

Needs nothing but Python's standard library. The environment is stamped with a digest of
pyproject.toml, setup.py, the native sources, constraints.txt, hashes.txt and this file: an
unchanged one is left as it is, a changed one is filled again, one whose set-up never finished is
made anew. What pip prints goes to VENV/setup.log; what went wrong comes out as one line.

Packages come from the sources pip is configured with, and from no other unless --torch-index
names one. PyTorch is the one package with a choice. On Linux the usual index holds its CUDA build,
which brings several GB of libraries; without an NVIDIA GPU the CPU build is asked for first, from
pip's own sources, then from the index named, and only if neither has it does the CUDA build (which
works without a GPU, too) take its place.

This file must stay readable to Python 3.6, so that an old Python gets a sentence and not a
syntax error; hence the quoted annotations.
"""

import argparse
import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NATIVE = "kernels/cvxq_kernels/cpu/native"  # compiled when the package is installed
OLDEST_PYTHON = (3, 10)
GB = 10**9
DISK_CPU = 3 * GB  # environment and pip's copies, PyTorch's CPU build; measured 2.1 GB
DISK_CUDA = 12 * GB
DISK_TEMPORARY = 1 * GB  # where pip unpacks the largest wheel
NETWORK_SIGNS = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "Connection refused",
    "Connection reset",
    "timed out",
)
DISK_SIGNS = ("No space left on device", "Disk quota exceeded")


class SetupError(Exception):
    """Why the environment could not be made: one line, with what to do next."""


def check_python(version: "tuple[Any, ...]") -> None:
    if version[:2] < OLDEST_PYTHON:
        raise SetupError(
            f"Python {dotted(version)} is too old: cvxq needs {dotted(OLDEST_PYTHON)} or newer; "
            "name another one, for example: make test PYTHON=python3.12"
        )


def dotted(version: "tuple[Any, ...]") -> str:
    return ".".join(str(part) for part in version)


def check_modules(available: "Callable[[str], Any]" = importlib.util.find_spec) -> None:
    """Debian's Python without python3-venv has `venv` but not `ensurepip`, which it needs."""
    missing = [name for name in ("venv", "ensurepip") if available(name) is None]
    if missing:
        raise SetupError(
            "this Python cannot make virtual environments (no module {}): install it, "
            "on Debian and Ubuntu with: apt install python3-venv".format(" and ".join(missing))
        )


def check_disk(
    folder: Path, needed: int, usage: "Callable[[Path], Any]" = shutil.disk_usage
) -> None:
    """`needed` bytes must be free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    free = usage(folder).free
    if free < needed:
        raise SetupError(
            f"the disk is too full: {free / GB:.1f} GB free at {folder}, "
            f"the environment needs {needed / GB:.0f} GB; "
            "free some space, or put it elsewhere: make test VENV=/other/disk/venv"
        )


def explain(log: str) -> str:
    """The one line that says why pip failed, from what it printed."""
    if is_disk_failure(log):
        return "the disk is full: pip ran out of space; free some (3 GB are needed) and try again"
    if is_network_failure(log):
        return (
            "the package index cannot be reached: connect to the network "
            "(or set pip's index, proxy or certificate) and try again"
        )
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    return "pip failed: " + (errors[-1][len("ERROR:") :].strip() if errors else "no reason given")


def is_network_failure(log: str) -> bool:
    return any(sign in log for sign in NETWORK_SIGNS)


def is_disk_failure(log: str) -> bool:
    return any(sign in log for sign in DISK_SIGNS)


def fingerprint(venv: Path) -> str:
    """Digest of all that decides what the environment holds."""
    digest = hashlib.sha256(f"{sys.version} {venv.resolve()}".encode())
    names = ("pyproject.toml", "setup.py", "constraints.txt", "hashes.txt")
    listed = [*(ROOT / name for name in names), Path(__file__)]
    for file in listed + sorted((ROOT / NATIVE).glob("*.[chi]*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def pinned(package: str, constraints: str) -> str:
    """The version of `package` in the text of a constraints file, the first one listed."""
    found = re.search(rf"^{re.escape(package)}==([^\s;]+)", constraints, re.MULTILINE)
    if found is None:
        raise SetupError(f"constraints.txt does not pin {package}: add a line for it")
    return found.group(1)


def has_gpu() -> bool:
    """Whether NVIDIA's driver answers and lists a device."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        answer = subprocess.run([command, "-L"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and b"GPU" in answer.stdout


def torch_choices(
    version: str, system: str, gpu: bool, index: "str | None" = None
) -> "list[tuple[str, list[str]]]":
    """What to ask pip for, best first: a name to print and pip's arguments.

    index: where the CPU build is looked for besides pip's own sources, or None.
    """
    plain = (f"PyTorch {version}", ["torch==" + version])
    if system != "Linux" or gpu:
        return [plain]
    wanted = f"torch=={version}+cpu"
    name = f"PyTorch {version}, CPU build"
    choices = [(name, ["--retries", "2", wanted])]
    if index is not None:
        # A network that swallows packets must not cost minutes before the next choice is tried.
        there = ["--index-url", index, "--retries", "1", "--timeout", "15"]
        choices.append((name + ", from the index named", [*there, wanted]))
    last = f"PyTorch {version} with CUDA (several GB; no CPU build within reach: see --torch-index)"
    return [*choices, (last, plain[1])]


class Environment:
    """A virtual environment in the making; what pip prints goes to its log."""

    def __init__(self, venv: Path):
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.stamp = venv / "setup.stamp"
        self.log = venv / "setup.log"

    def is_current(self) -> bool:
        return (
            self.python.exists()
            and self.stamp.exists()
            and self.stamp.read_text() == fingerprint(self.venv)
        )

    def create(self) -> None:
        """An empty environment; one left unfinished by an earlier run is cleared."""
        is_ours = (self.venv / "pyvenv.cfg").exists()
        if self.venv.exists() and not is_ours and any(self.venv.iterdir()):
            raise SetupError(f"{self.venv} exists and is no virtual environment: move it away")
        if is_ours and self.stamp.exists() and self.python.exists():
            self.stamp.unlink()  # complete, only out of date: pip brings it up to date
            return
        clear = [sys.executable, "-m", "venv", "--clear", str(self.venv)]
        made = subprocess.run(clear, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            said = (made.stdout + made.stderr).strip()
            reason = explain(said) if is_disk_failure(said) else said[-300:]
            raise SetupError(
                "no virtual environment at {}: {}".format(self.venv, " ".join(reason.split()))
            )

    def pip(self, *arguments: str) -> "tuple[bool, str]":
        """Install; returns success and what pip printed."""
        # Modules are compiled when first imported: most of PyTorch and transformers never is.
        install = [str(self.python), "-m", "pip", "install", "--no-input", "--no-compile"]
        install += ["--disable-pip-version-check", "--progress-bar", "off", *arguments]
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            done = subprocess.run(install, stdout=log, stderr=log, cwd=str(ROOT), check=False)
        return done.returncode == 0, self.log.read_bytes()[start:].decode("utf-8", "replace")

    def fail(self, printed: str) -> SetupError:
        return SetupError(f"{explain(printed)} (all of it: {self.log})")

    def has_torch(self, version: str) -> bool:
        ask = "import importlib.metadata as m; print(m.version('torch'))"
        answer = subprocess.run(
            [str(self.python), "-c", ask], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip().split("+")[0] == version

    def install_torch(self, version: str, gpu: bool, index: "str | None" = None) -> None:
        if self.has_torch(version):
            return
        choices = torch_choices(version, platform.system(), gpu, index)
        for number, (name, arguments) in enumerate(choices):
            is_last = number == len(choices) - 1
            if is_last and platform.system() == "Linux":
                check_disk(self.venv, DISK_CUDA)
            say(name)
            ok, printed = self.pip("--no-deps", *arguments)
            if ok:
                return
            is_offline = is_network_failure(printed) and "--index-url" not in arguments
            if is_last or is_offline or is_disk_failure(printed):
                raise self.fail(printed)

    def install_project(self, constraints: Path, hashes: Path, extras: str) -> None:
        # Everything but torch and triton by the hashes of its files, then what is still missing.
        pinned_files = ["--no-deps", "--require-hashes", "-r", str(hashes)]
        project = ["--no-build-isolation", "--editable", f".[{extras}]", "-c", str(constraints)]
        for arguments in (pinned_files, project):
            ok, printed = self.pip(*arguments)
            if not ok:
                raise self.fail(printed)


def say(text: str) -> None:
    print("environment: " + text, flush=True)


def set_up(venv: Path, torch_index: "str | None" = None) -> None:
    environment = Environment(venv)
    if environment.is_current():
        return
    started = time.monotonic()
    check_modules()
    check_disk(venv, DISK_CPU)
    check_disk(Path(tempfile.gettempdir()), DISK_TEMPORARY)
    say(f"filling {venv} (Python {platform.python_version()}); log: {environment.log}")
    environment.create()
    constraints = ROOT / "constraints.txt"
    version = pinned("torch", constraints.read_text())
    environment.install_torch(version, has_gpu(), torch_index)
    say("cvxq and what it needs")
    environment.install_project(constraints, ROOT / "hashes.txt", "dev")
    environment.stamp.write_text(fingerprint(venv))
    say(f"ready after {time.monotonic() - started:.0f} s")


def main() -> int:
    try:
        check_python(tuple(sys.version_info[:3]))
        parser = argparse.ArgumentParser(description="Make or refresh the virtual environment.")
        parser.add_argument("--venv", default=".venv", help="its folder (default: .venv)")
        parser.add_argument("--torch-index", help="where else to look for PyTorch's CPU build")
        options = parser.parse_args()
        set_up(Path(options.venv).expanduser().absolute(), options.torch_index or None)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next run starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
