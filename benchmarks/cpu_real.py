"""Real models' files beside GGUF files of the same models: as published, and smaller ones of it."""

import re
import statistics
from pathlib import Path

from cpu_page import Sample, head, spread
from cpu_runs import Amount, measure_ours, measure_theirs, run, say
from peers.llamacpp import LlamaCpp

KINDS = ("Q2_K", "Q3_K_M", "Q4_K_M")  # that llama-quantize makes of a published file
AIMS = {"decoding": ((4.0, 2.0), (0.0, 2.5)), "prefill": ((0.0, 1.5),)}  # from these bits on
COLUMNS = ("file", "bytes", "decode, tokens/s", "prefill, tokens/s", "resident, MB", "load, s")


def models(folder: Path) -> dict[str, list[Path]]:
    """Name of each model → its files NAME-RATE.cvxq, the smallest rate first."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob("*.cvxq"):
        if match := re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)", path.stem):
            found.setdefault(match[1], []).append(path)
    if not found:
        raise SystemExit(f"cpu: {folder} holds no NAME-RATE.cvxq, such as model-4.25.cvxq")
    return {
        name: sorted(found[name], key=lambda path: float(path.stem.rpartition("-")[2]))
        for name in sorted(found)
    }


def requantized(published: Path, work: Path, peer: LlamaCpp) -> list[Path]:
    """A file of each of KINDS, made of the published one unless `work` holds it."""
    made = []
    for kind in KINDS:
        path = work / f"{published.stem}-{kind}.gguf"
        if not path.exists():
            say(f"making {path.name}")
            part = path.with_suffix(".part")
            run([peer.tool("llama-quantize"), "--allow-requantize", published, part, kind])
            part.rename(path)
        made.append(path)
    return made


def peers_of(name: str, folder: Path | None, work: Path, peer: LlamaCpp | None) -> list[Path]:
    """The GGUF files to measure beside a model's own."""
    if folder is None or peer is None:
        return []
    published = folder / f"{name}.gguf"
    if not published.exists():
        say(f"{name} has no peer: {published} is missing")
        return []
    return [published, *requantized(published, work, peer)]


def measure(
    files: list[Path], threads: int, rounds: int, amount: Amount, peer: LlamaCpp | None
) -> dict[Path, list[Sample]]:
    """Every file once in every round, in reverse in every other one."""
    samples: dict[Path, list[Sample]] = {path: [] for path in files}
    for turn in range(rounds):
        for path in files if turn % 2 == 0 else reversed(files):
            if path.suffix == ".cvxq":
                samples[path].append(measure_ours(path, threads, amount))
            elif peer is not None:
                samples[path].append(measure_theirs(path, threads, peer, amount))
    return samples


def line(path: Path, name: str, samples: list[Sample]) -> str:
    """One row: medians ± deviations, the most memory."""
    kind = path.stem.removeprefix(name).removeprefix("-")
    is_ours = path.suffix == ".cvxq"
    label = f"cvxq {kind} bits" if is_ours else f"llama.cpp {kind or 'as published'}"
    return (
        f"| {label} | {path.stat().st_size:,} | {spread([s.decode for s in samples], '.1f')} "
        f"| {spread([s.prefill for s in samples], '.0f')} "
        f"| {max(s.resident_bytes for s in samples) / 1e6:.0f} "
        f"| {statistics.median(s.load_seconds for s in samples):.2f} |"
    )


def beside(ours: Path, theirs: Path, samples: dict[Path, list[Sample]]) -> str:
    """One row of a file beside another: shares of bytes, of both speeds, and what was aimed at."""

    def share(speed: str) -> float:
        one, other = (
            statistics.median(getattr(sample, speed) for sample in samples[path])
            for path in (ours, theirs)
        )
        return one / other

    name, _, rate = ours.stem.rpartition("-")
    cells = [f"{name}, {rate} bits", f"{ours.stat().st_size / theirs.stat().st_size:.2f}"]
    for part, value in (("decoding", share("decode")), ("prefill", share("prefill"))):
        aim = next(aim for bits, aim in AIMS[part] if float(rate) >= bits)
        cells.append(f"{value:.2f}, wanted {aim}: {'met' if value >= aim else '**missed**'}")
    return f"| {' | '.join(cells)} |"


def real_page(
    folder: Path,
    gguf: Path | None,
    threads: int,
    rounds: int,
    amount: Amount,
    peer: LlamaCpp | None,
    machine: str,
    work: Path,
) -> str:
    """The document: every file beside llama.cpp's Q4_K_M, then a table for every model."""
    peer_text = f", llama.cpp of llama-cpp-python {peer.version}" if peer else ""
    shares, tables = [], []
    for name, ours in models(folder).items():
        say(f"measuring {name}")
        peers = peers_of(name, gguf, work, peer)
        samples = measure([*ours, *peers], threads, rounds, amount, peer)
        shares += [beside(path, peers[-1], samples) for path in ours if peers]
        rows = [line(path, name, samples[path]) for path in [*ours, *peers]]
        tables.append("\n".join([f"## {name}", "", *head(COLUMNS), *rows]))
    parts = [
        "# Speed of real models on the CPU",
        f"{machine}, {threads} threads{peer_text}. {amount.prompt} tokens of prompt, "
        f"{amount.tokens} generated; medians of {rounds} rounds ± their deviation.",
    ]
    if shares:
        columns = (f"cvxq beside llama.cpp's {KINDS[-1]}", "file", "decode", "prefill")
        parts.append("\n".join([*head(columns), *shares]))
    return "\n\n".join([*parts, *tables]) + "\n"
