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

# Sources all of whose functions but those that ask need this of an x86 processor.
SPECIAL = {
    "isa_avx512.c": "avx512f",
    "repack_avx512.c": "avx512f",
    "wide_bf16.c": "avx512_bf16",
}


def kernel_sources() -> list[str]:
    """The matrix kernels; the decoder on top of them has tests of its own."""
    return sorted(str(path) for path in NATIVE.glob("*.c") if not path.name.startswith("decoder"))


def processor_flags() -> set[str]:
    """What Linux says this processor has; where nothing says so, all that is asked for."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set(SPECIAL.values())


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
    """Addresses, leaks and undefined behaviour, on every instruction set of this machine.

    Compiling takes nearly all of the time: without optimization, and plainly what cannot run here.
    """
    command = [*sanitizing(tmp_path, "address,undefined"), "-O0", "-DONE_INPUT"]
    driver = str(tmp_path / "driver")
    flags = processor_flags()
    absent = [name for name, flag in SPECIAL.items() if flag not in flags]
    sources = [source for source in kernel_sources() if Path(source).name not in absent]
    plain = [str(tmp_path / f"{name}.o") for name in absent]
    plainly = [compiler("cc"), *FLAGS, "-DONE_INPUT", f"-I{NATIVE}", "-c"]
    for name, made in zip(absent, plain, strict=True):
        run([*plainly, str(NATIVE / name), "-o", made])
    run([*command, *sources, *plain, str(DRIVER), "-lm", "-o", driver])
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
