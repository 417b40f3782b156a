"""Nothing asks for modules that not every system has, unless it can do without them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    *("format_spec/cvxq_format", "kernels/cvxq_kernels"),
    *("runtime/cvxq", "converter/cvxq_converter"),
]
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def unguarded(path: Path) -> list[str]:
    """Imports of a file that fail without such a module, in its body or in a function's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(node)
        for tried in ast.walk(tree)
        if isinstance(tried, ast.Try)
        for node in ast.walk(tried)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if POSIX.intersection(names) and id(node) not in guarded and not for_one_system(tree, node):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {names[0]}")
    return found


def for_one_system(tree: ast.AST, wanted: ast.AST) -> bool:
    """Whether a node stands behind `if sys.platform == …`."""
    return any(
        isinstance(node, ast.If)
        and "sys.platform" in ast.unparse(node.test)
        and any(inner is wanted for inner in ast.walk(node))
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_posix_are_asked_for_with_care(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    assert not [line for path in files for line in unguarded(path)]
