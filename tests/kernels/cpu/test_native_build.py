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
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def sanitizing(folder: Path, kinds: str) -> list[str]:
    """The compiler with sanitizers, and its options; skips where it has none."""
    command = [compiler("cc"), f"-fsanitize={kinds}", "-fno-sanitize-recover=all"]
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    built = str(folder / "probe")
    for tried in ([*command, str(probe), "-o", built], [built]):  # some kernels stop the latter
        if subprocess.run(tried, capture_output=True, check=False).returncode:
            pytest.skip(f"no sanitizers for {kinds} with this compiler and system")
    return [*command, *FLAGS, "-O1", "-g", f"-I{NATIVE}"]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Addresses, leaks and undefined behaviour, on every instruction set of this machine."""
    command = sanitizing(tmp_path, "address,undefined")
    driver = str(tmp_path / "driver")
    run([*command, "-DONE_INPUT", *kernel_sources(), str(DRIVER), "-lm", "-o", driver])
    run([driver])


@pytest.mark.parametrize("kinds", ["thread", "address,undefined"])
def test_pool_under_stress(tmp_path: Path, kinds: str) -> None:
    """Every chunk is done once, in turn, and a thread that is stopped holds nobody up."""
    driver = str(tmp_path / "driver")
    names = ("pool.c", "pool_work.c")
    sources = [*(str(NATIVE / name) for name in names), str(DRIVER.with_name("pool_driver.c"))]
    run([*sanitizing(tmp_path, kinds), *sources, "-o", driver])
    run([driver])


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
