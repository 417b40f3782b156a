"""A fixed share of the fuzzer's cases, in every run of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.container import Container
from tests.fuzz.corpus import VECTORS
from tests.fuzz.mutations import KINDS, hostile_file, kind_of
from tests.fuzz.remembered import forget
from tests.fuzz.trials import SHARE_OF_COMMANDS, Verdict, look_through, try_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize(("path", "count"), [("files", 1000), ("lean", 2000), ("transformers", 50)])
def test_hostile_files(path: str, count: int) -> None:
    jobs = min(4, len(os.sched_getaffinity(0)))
    options = f"--seed 0 --path {path} --count {count} --jobs {jobs}".split()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_case_is_always_the_same_file() -> None:
    files = [(VECTORS / "worked-example.cvxq").read_bytes()]
    for number in range(50):
        kind, data = hostile_file(1, number, files)
        assert (kind, data) == hostile_file(1, number, files)
        assert kind.partition("+")[0] == kind_of(1, number)
    assert {hostile_file(1, number, files)[0].partition("+")[0] for number in range(600)} == {
        *KINDS
    }


@pytest.mark.parametrize("name", ["worked-example", "files-deflated", "everything-of-1.1"])
def test_a_container_put_together_again_is_sound(name: str, tmp_path: Path) -> None:
    from cvxq_format import verify

    path = tmp_path / "again.cvxq"
    path.write_bytes(Container((VECTORS / f"{name}.cvxq").read_bytes()).seal())
    assert verify(path) == []


def test_what_is_remembered_changes_no_verdict(tmp_path: Path) -> None:
    paths = sorted(VECTORS.glob("*.cvxq"))[:12]
    files = [path.read_bytes() for path in paths]
    numbers = [number for number in range(1, 150) if number % SHARE_OF_COMMANDS]
    path = tmp_path / "case.cvxq"
    judged: dict[bool, list[Verdict]] = {True: [], False: []}
    for number in numbers:
        path.write_bytes(hostile_file(2, number, files)[1])
        judged[True].append(try_files(path, number))
        forget()
        judged[False].append(look_through(path))
    assert judged[True] == judged[False]
    assert {verdict.outcome for verdict in judged[True]} == {"loaded", "refused"}
