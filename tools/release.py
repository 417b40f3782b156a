"""Build a release: wheel and sdist, twice and compared, what is inside, and a tag.

    python tools/release.py [--dry-run]

The version is pyproject.toml's, and has a dated section in CHANGELOG.md. Everything is built from
the last commit, in copies of the repository, at that commit's time, so that anyone can build the
same bytes. dist/ then holds the files, an SBOM (CycloneDX) and their SHA-256. `make release` runs
`make check` first; the tag is not pushed. --dry-run stops before the tag.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class ReleaseError(Exception):
    """Why there is no release, in one line."""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command and return what it printed; ReleaseError if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ReleaseError(f"{' '.join(words)} failed: {' '.join(last)}")
    return done.stdout.strip()


def version_of(pyproject: str) -> str:
    """Return the version that a pyproject.toml states."""
    found = re.search(r'^version = "([^"]+)"$', pyproject, re.MULTILINE)
    if found is None:
        raise ReleaseError("pyproject.toml states no version")
    return found[1]


def check_changes(changelog: str, version: str) -> None:
    """Raise ReleaseError unless a change log has a dated section for the version."""
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        raise ReleaseError(
            f"CHANGELOG.md has no section '## {version} (YYYY-MM-DD)'; date the one of this release"
        )


def build(folder: Path, seconds: str) -> dict[str, bytes]:
    """Build sdist and wheel from a fresh copy of the last commit; return them by name."""
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, folder)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=folder, SOURCE_DATE_EPOCH=seconds)
    dist = folder / "dist"
    if platform.system() == "Linux":  # named after the oldest C library that it runs with
        for wheel in list(dist.glob("*-linux_*.whl")):
            run("auditwheel", "repair", "-w", dist, wheel, cwd=folder, SOURCE_DATE_EPOCH=seconds)
            wheel.unlink()
    return {path.name: path.read_bytes() for path in sorted(dist.iterdir())}


def differing(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    """Return the wheels of two builds that are not the same, byte for byte."""
    names = {name for name in {*first, *second} if name.endswith(".whl")}
    return sorted(name for name in names if first.get(name) != second.get(name))


def all_pins(hashes: str, constraints: str) -> str:
    """Return the requirements that are pinned by hash, and those by version alone after them."""
    hashed = set(re.findall(r"^([\w.-]+)==", hashes, re.MULTILINE))
    lines = re.findall(r"^([\w.-]+)(==.+)$", constraints, re.MULTILINE)
    return hashes + "".join(f"{name}{rest}\n" for name, rest in lines if name not in hashed)


def release(is_dry: bool) -> None:
    """Check, build, compare, describe and tag."""
    version = version_of((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tag = f"v{version}"
    if run("git", "status", "--porcelain"):
        raise ReleaseError("there are changes that are not committed; commit them first")
    if run("git", "tag", "--list", tag):
        raise ReleaseError(f"{tag} exists; state another version in pyproject.toml")
    check_changes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    seconds = run("git", "log", "-1", "--format=%ct")
    with tempfile.TemporaryDirectory(prefix="cvxq-release-") as folder:
        first = build(Path(folder, "first"), seconds)
        second = build(Path(folder, "second"), seconds)
    if changed := differing(first, second):
        raise ReleaseError(f"two builds of {changed[0]} differ; it cannot be built again")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    for name, data in first.items():
        (dist / name).write_bytes(data)
    bom = dist / f"cvxq-{version}.cdx.json"
    described = ("--pyproject", "pyproject.toml", "--output-reproducible", "-o", bom)
    pins = [(ROOT / name).read_text(encoding="utf-8") for name in ("hashes.txt", "constraints.txt")]
    with tempfile.TemporaryDirectory(prefix="cvxq-release-") as folder:
        listed = Path(folder, "requirements.txt")
        listed.write_text(all_pins(*pins), encoding="utf-8")
        run("cyclonedx-py", "requirements", listed, *described)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(dist.iterdir())
    ]
    (dist / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    print("".join(lines), end="")
    if is_dry:
        print(f"{tag} is not tagged: a dry run")
        return
    run("git", "tag", "--annotate", tag, "--message", f"cvxq {version}")
    print(f"{tag} is tagged; push it with: git push origin {tag}")


def main() -> int:
    """Release as the command line says; one line where that fails."""
    parser = argparse.ArgumentParser(description="Build a release from the last commit.")
    parser.add_argument("--dry-run", action="store_true", help="everything but the tag")
    try:
        release(parser.parse_args().dry_run)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
