"""How much memory can be had: the least that machine, control groups and limits allow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cvxq_format.memory import available_memory

MACHINE = "MemTotal: 8000000 kB\nMemAvailable:    4000000 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: str, used: int, files: int) -> dict[str, str]:
    """A control group of version 2, a fifth of whose pages of files is active."""
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"anon 1\nfile 9\nactive_file {files // 5}\n"
        f"inactive_file {files - files // 5}\n",
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, {"proc/meminfo": MACHINE})


def test_a_machine_tells_what_is_free(root: Path) -> None:
    assert available_memory(root) == 4_096_000_000


@pytest.mark.parametrize("shown", ["user.slice/run", ""])  # on the host; as a container has it
def test_a_group_of_version_2_may_allow_less(root: Path, shown: str) -> None:
    write(root, {"proc/self/cgroup": "0::/user.slice/run\n"})
    write(root, group(f"sys/fs/cgroup/{shown}", "3000000000\n", 2_500_000_000, 2_000_000_000))
    assert available_memory(root) == 2_500_000_000  # pages of files are given back


def test_the_groups_around_count_and_those_without_a_limit_do_not(root: Path) -> None:
    write(root, {"proc/self/cgroup": "0::/a/b\n"})
    write(root, group("sys/fs/cgroup/a/b", "max\n", 7, 7))
    write(root, group("sys/fs/cgroup/a", "1000\n", 600, 100))
    assert available_memory(root) == 500
    write(root, group("sys/fs/cgroup/a", "500\n", 600, 0))
    assert available_memory(root) == 0


def test_a_group_of_version_1_may_allow_less(root: Path) -> None:
    write(root, {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n"})
    folder = "sys/fs/cgroup/memory/job"
    stat = "inactive_file 5\ntotal_inactive_file 50\ntotal_active_file 100\n"
    usage = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "400", "memory.stat": stat}
    write(root, {f"{folder}/{name}": text for name, text in usage.items()})
    assert available_memory(root) == 750


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of data are Linux's")
def test_a_limit_of_data_is_heeded() -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30));"
        "from cvxq_format.memory import available_memory; print(available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, check=True)
    assert 1 << 28 < int(done.stdout) < 1 << 30
