"""Finding the library, doing without it, and what importing it brings along."""

import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from cvxq_kernels import cpu
from cvxq_kernels.cpu import loader
from cvxq_kernels.cpu.loader import native

ROOT = Path(__file__).resolve().parents[3]
NATIVE = ROOT / "kernels" / "cvxq_kernels" / "cpu" / "native"


def test_missing_library_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    loader._load.cache_clear()
    try:
        assert not cpu.is_available()
        assert re.fullmatch(r".* missing from .*: install a C compiler .*", cpu.why_not())
        with pytest.raises(RuntimeError, match="install a C compiler"):
            native()
        (tmp_path / f"_native{loader.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
        loader._load.cache_clear()
        assert re.fullmatch(r"the compiled CPU kernels cannot be loaded .*", cpu.why_not())
    finally:
        loader._load.cache_clear()


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, cvxq_kernels.cpu as cpu; cpu.Pool(1); "
        "sys.exit(bool({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_packed_weight_comes_when_asked_for() -> None:
    import cvxq_kernels

    assert cvxq_kernels.PackedWeight.__module__ == "cvxq_kernels.packed"
    with pytest.raises(AttributeError, match="no attribute 'Packed'"):
        cvxq_kernels.Packed  # noqa: B018


def test_declared_functions_are_those_of_the_header() -> None:
    header = (NATIVE / "cvxq.h").read_text()
    declared = set(re.findall(r"CVXQ_API [^;]*?\b(cvxq_\w+)\(", header))
    assert set(loader._FUNCTIONS) == declared


@pytest.mark.parametrize("size", [0, 1, 63, 64, 79, 80, 1000, 65536 + 7])
def test_checksums_are_those_of_zlib(size: int) -> None:
    data = np.random.default_rng(size).bytes(size + 3)
    assert cpu.crc32(data) == zlib.crc32(data)
    assert cpu.crc32(memoryview(data)[3:]) == zlib.crc32(data[3:])


def test_unknown_instruction_set_is_refused() -> None:
    before = cpu.isa()
    assert not cpu.force_isa("mmx")
    assert cpu.isa() == before


def test_waiting_threads_sleep() -> None:
    """Nobody spins for long after a product."""
    pool = cpu.Pool(4)
    weight = cpu.Matrix.from_dense(np.ones((256, 64), np.float32), pool=pool)
    weight.matmul(np.ones((1, 64), np.float32))
    before = time.process_time()
    time.sleep(0.3)
    spent = time.process_time() - before
    assert spent < 0.1, f"{spent:.2f} s of processor time in 0.3 s of waiting"
    del weight
    pool.close()
