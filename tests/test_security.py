"""Every sentence of SECURITY.md's table names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_claim_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    sources = "\n".join(path.read_text("utf-8") for path in files)
    known = {*re.findall(r"^def (test_\w+)", sources, re.MULTILINE), *(p.name for p in files)}
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(test_\w+(?:\.py)?)`", row)
        assert named, row
    for name in re.findall(r"`(test_\w+(?:\.py)?)`", text):
        assert name in known, name
