"""Building the native code in other ways: with sanitizers, for another processor."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NATIVE = ROOT / "kernels" / "cvxq_kernels" / "cpu" / "native"
DRIVER = Path(__file__).with_name("driver.c")
FLAGS = ["-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wno-psabi"]


def kernel_sources() -> list[str]:
    """The matrix kernels; the decoder on top of them has tests of its own."""
    return sorted(str(path) for path in NATIVE.glob("*.c") if not path.name.startswith("decoder"))


def compiler(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Addresses, leaks and undefined behaviour, on every instruction set of this machine."""
    cc = compiler("cc")
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probing = [cc, *checks, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(probing, capture_output=True, check=False).returncode:
        pytest.skip("this compiler has no sanitizers")
    driver = tmp_path / "driver"
    sources = [*kernel_sources(), str(DRIVER)]
    run(
        [
            cc,
            *FLAGS,
            "-O1",
            "-g",
            "-DONE_INPUT",
            *checks,
            f"-I{NATIVE}",
            *sources,
            "-lm",
            "-o",
            str(driver),
        ]
    )
    run([str(driver)])


@pytest.mark.slow
def test_another_processor(tmp_path: Path) -> None:
    """The kernels compile for 64-bit Arm without a warning and, under emulation, are right."""
    if platform.machine() in {"aarch64", "arm64"}:
        pytest.skip("this is that processor: the other tests run on it")
    cc = compiler("aarch64-linux-gnu-gcc")
    driver = tmp_path / "driver"
    sources = [*kernel_sources(), str(DRIVER)]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    built = [cc, *FLAGS, *warnings, "-O2", "-static", f"-I{NATIVE}", *sources, "-lm"]
    run([*built, "-o", str(driver)])
    run([compiler("qemu-aarch64-static"), str(driver)])
