"""The imports of every file against CONTRIBUTING.md's table, and no circle between files."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("format_spec", "kernels", "runtime", "converter")
FILES = {
    ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("cvxq*/**/*.py"))
}
ROOMS = ("source", "measure", "allocate", "quantize", "write")
BELOW_ALL_ROOMS = ("errors", "journal", "options", "products", "ranks", "result_file", "stages")
EXTERNAL = ("numpy", "torch", "triton", "transformers", "vllm")


def imported(module: str) -> set[str]:
    """Modules that a file imports, anywhere in it: our files, and packages of `EXTERNAL`."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(up if node.level else []), *([node.module] if node.module else [])])
            found |= {
                f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names
            }
    return {n if n in FILES else n.partition(".")[0] for n in found} & {*FILES, *EXTERNAL}


ARROWS = {module: imported(module) - {module} for module in FILES}


def allowed() -> dict[str, set[str]]:
    """Package, or part of one → what CONTRIBUTING.md lets it import."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text[text.index("| part |") :].split("\n\n")[0].splitlines()[2:]
    rows = [re.findall(r"`([\w.]+)`", line) for line in table]
    return {part: set(others) for part, *others in rows}


def within(module: str, parts: set[str]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_what_the_table_allows(module: str) -> None:
    table = allowed()
    part = max((p for p in table if within(module, {p})), key=len)
    for target in ARROWS[module]:
        assert within(target, table[part] | {part}), f"{module} imports {target}"


def test_no_circle_between_files() -> None:
    ours = {m: {t for t in targets if t in FILES} for m, targets in ARROWS.items()}
    assert len([*TopologicalSorter(ours).static_order()]) >= len(FILES)


def test_a_room_of_the_converter_imports_only_rooms_before_it() -> None:
    for module in FILES:
        room = module.removeprefix("cvxq_converter.").partition(".")[0]
        if not module.startswith("cvxq_converter.") or room not in ROOMS:
            continue
        before = {*ROOMS[: ROOMS.index(room) + 1], *BELOW_ALL_ROOMS}
        for target in ARROWS[module]:
            if target.startswith("cvxq_converter."):
                assert target.split(".")[1] in before, f"{module} imports {target}"
