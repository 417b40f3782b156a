"""Check that tests without a GPU execute all of the GPU's path but its kernels.

    python tools/check_executed.py [FILE ...]

Runs the tests that use it (or those in FILE ...) under coverage.py, processes that they start
included, and prints how many lines of each file were executed. Ends with status 1 if one was not.
Kernels, which Triton compiles, are counted apart: its interpreter executes the twins of what a
device does, not that.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    ROOT / "runtime/cvxq/lean/cuda",
    ROOT / "kernels/cvxq_kernels/gpu",
    ROOT / "kernels/cvxq_kernels/decode",
)
KERNEL_TESTS = "kernels compiling device layout memory overlap shares workspace"
TESTS = (
    *(f"tests/kernels/gpu/test_{name}.py" for name in KERNEL_TESTS.split()),
    "tests/kernels/decode/test_reference.py",
    "tests/kernels/decode/test_fused.py::test_under_the_interpreter",
    "tests/runtime/lean/cuda",
)

CONFIG = """\
[run]
source =
    {source}
data_file = {data}
parallel = true
patch = subprocess
disable_warnings =
    module-not-imported
    module-not-measured
    no-data-collected
    previously-imported
"""


@dataclass(frozen=True)
class File:
    """Lines of a file that were executed, and lines that could have been; kernels' are apart."""

    path: Path
    executed: frozenset[int]
    missed: frozenset[int]

    @property
    def shown(self) -> str:
        """The path from the root."""
        return os.path.relpath(self.path, ROOT)

    def functions(self) -> Iterator[tuple[str, bool, range]]:
        """Name, whether it is a kernel, and lines of every function; an inner one comes later."""
        yield from _functions(ast.parse(self.path.read_text()), self.path.stem)

    def split(self) -> tuple[File, File]:
        """The file without its kernels, and only they."""
        spans = [span for _, is_kernel, span in self.functions() if is_kernel]
        inside = frozenset(line for span in spans for line in span)
        return (
            File(self.path, self.executed - inside, self.missed - inside),
            File(self.path, self.executed & inside, self.missed & inside),
        )

    def where(self) -> dict[str, list[int]]:
        """The lines that were not executed, by the function they are in, or the module."""
        functions = list(self.functions())
        found: dict[str, list[int]] = {}
        for line in sorted(self.missed):
            names = [self.path.stem, *(name for name, _, span in functions if line in span)]
            found.setdefault(names[-1], []).append(line)
        return found


def _functions(tree: ast.AST, name: str) -> Iterator[tuple[str, bool, range]]:
    for node in ast.iter_child_nodes(tree):
        inner = name
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = f"{name}.{node.name}"
        if isinstance(node, ast.FunctionDef):
            is_kernel = any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
            yield inner, is_kernel, range(node.body[0].lineno, (node.end_lineno or 0) + 1)
        yield from _functions(node, inner)


def run_tests(tests: Sequence[str]) -> tuple[list[File], int]:
    """Run tests; return what they executed, and pytest's status."""
    with tempfile.TemporaryDirectory() as folder:
        config, report = Path(folder) / "config", Path(folder) / "report.json"
        source = "\n    ".join(map(str, FOLDERS))
        config.write_text(CONFIG.format(source=source, data=Path(folder) / "data"))
        coverage, rc = [sys.executable, "-m", "coverage"], f"--rcfile={config}"
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run([*coverage, "run", rc, *pytest], cwd=ROOT, check=False)
        subprocess.run([*coverage, "combine", "-q", rc], cwd=ROOT, check=True)
        subprocess.run([*coverage, "json", "-q", rc, "-o", report], cwd=ROOT, check=True)
        told = json.loads(report.read_text())["files"]
    files = [
        File(ROOT / name, *(frozenset(lines[f"{kind}_lines"]) for kind in ("executed", "missing")))
        for name, lines in sorted(told.items())
    ]
    return files, done.returncode


def judge(files: Sequence[File]) -> Iterator[str]:
    """Yield the functions with lines that nothing executed."""
    for file in files:
        for name, lines in file.where().items():
            yield f"{file.shown}: nothing executes {name}: {', '.join(map(str, lines))}"


def share(files: Sequence[File]) -> str:
    """Lines executed of all files, and what part of all lines they are."""
    executed = sum(len(file.executed) for file in files)
    lines = executed + sum(len(file.missed) for file in files)
    return f"{executed} of {lines} lines executed, {executed / max(lines, 1):.1%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", default=TESTS, metavar="FILE")
    files, status = run_tests(parser.parse_args().tests)
    hosts, kernels = zip(*(file.split() for file in files), strict=True)
    for file in hosts:
        print(f"{len(file.executed):4} of {len(file.executed) + len(file.missed):4} {file.shown}")
    print(f"Outside kernels: {share(hosts)}. In them, by the interpreter: {share(kernels)}.")
    wrong = list(judge(hosts))
    print(*wrong, sep="\n")
    return 1 if wrong or status else 0


if __name__ == "__main__":
    raise SystemExit(main())
