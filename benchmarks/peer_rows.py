"""Rows of the peers: every cell by the first seed, those that matter by the other seeds, too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from comparison import ASKED_RATES, Row, front
from measuring import Bench, Plan, Programs, Sampling
from peers.catalogue import RTN, Peer, Settings, cells
from peers.environment import peer_python
from peers.llamacpp import build


@dataclass(frozen=True, eq=False)
class Entry:
    """A peer's row with what it takes to make it again; whole: of table B, embeddings included."""

    peer: Peer
    settings: Settings
    row: Row
    whole: bool


def programs(peer: Peer, folder: Path) -> Programs:
    """What the peer runs with, made in `folder` where it is missing."""
    tools = build(folder / "llama.cpp").tools if peer.key == "gguf" else None
    return Programs(peer_python(folder, peer.key), tools)


def first_entries(bench: Bench, peer: Peer, plan: Plan, folder: Path) -> list[Entry]:
    """Every cell of a peer by the first seed: of its settings the one with the lowest KL."""
    chosen = cells(peer, bench.shapes.values(), plan.bits, plan.groups)
    asked = [(c, label, settings) for c in chosen for label, settings in c.settings.items()]
    ids = bench.sequences(plan.samplings[0]) if peer.calibrates else None
    jobs = [settings for _, _, settings in asked]
    folders = bench.ask(peer, programs(peer, folder), jobs, ids)
    best: dict[str, Entry] = {}
    for (cell, label, settings), result in zip(asked, folders, strict=True):
        matrices, run = bench.measure_peer(result)
        name = f"{cell.name}, {label}" if label else cell.name
        entry = Entry(peer, settings, Row(peer.label, name, matrices, (run,)), cell.whole)
        key = f"{cell.name} {cell.whole}"
        if key not in best or run.kl < best[key].row.kl.mean:
            best[key] = entry
    return list(best.values())


def rtn_entries(bench: Bench, plan: Plan) -> list[Entry]:
    """Round-to-nearest, which cvxq's own command makes."""
    entries = []
    keep = [word for name in bench.embedding for word in ("--keep", name)]
    for cell in cells(RTN, bench.shapes.values(), plan.bits, plan.groups):
        [settings] = cell.settings.values()
        flags = ["--method", "rtn", "--bits", str(settings["bits"])]
        flags += ["--group-size", str(settings["group"])]
        for whole, extra in ((False, keep), (True, [])):
            name = f"rtn-{'b' if whole else 'a'}-{settings['bits']}-{settings['group']}"
            run = bench.convert(name, None, *flags, *extra)
            names = frozenset([*bench.shapes, *(bench.embedding if whole else [])])
            entries.append(Entry(RTN, settings, Row(RTN.label, cell.name, names, (run,)), whole))
    return entries


def with_all_seeds(bench: Bench, entries: Sequence[Entry], plan: Plan, folder: Path) -> list[Entry]:
    """The entries, with runs of all seeds for those of ASKED_RATES that no smaller row beats.

    The others are beaten at no higher rate by another peer: their spread decides nothing.
    """
    partial = [
        entry.row
        for entry in entries
        if not entry.whole and ASKED_RATES[0] <= entry.row.rate <= ASKED_RATES[1]
    ]
    leading: list[Row] = []
    for matrices in {row.matrices for row in partial}:
        leading += front([row for row in partial if row.matrices == matrices], "rate")
    chosen = [e for e in entries if e.row in leading and e.peer.calibrates and not e.peer.once]
    rows = {id(entry): entry.row for entry in entries}
    for peer in {entry.peer.key: entry.peer for entry in chosen}.values():
        theirs = [entry for entry in chosen if entry.peer == peer]
        for sampling in plan.samplings[1:]:
            for entry, row in zip(theirs, _again(bench, theirs, sampling, folder), strict=True):
                before = rows[id(entry)]
                rows[id(entry)] = replace(before, runs=(*before.runs, *row.runs))
    return [replace(entry, row=rows[id(entry)]) for entry in entries]


def _again(bench: Bench, entries: Sequence[Entry], sampling: Sampling, folder: Path) -> list[Row]:
    """The rows of one peer's entries, made from another sampling."""
    peer = entries[0].peer
    jobs = [entry.settings for entry in entries]
    folders = bench.ask(peer, programs(peer, folder), jobs, bench.sequences(sampling))
    runs = [bench.measure_peer(result)[1] for result in folders]
    return [replace(entry.row, runs=(run,)) for entry, run in zip(entries, runs, strict=True)]
