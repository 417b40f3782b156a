"""Compare cvxq with other quantizers on one model or several: what is lost at equal bits.

    python benchmarks/quality.py --output docs/quality-small.md --check            # demo model
    python benchmarks/quality.py --model FOLDER --text FILE --only hqq gguf --seeds 0

Table A fixes the set of matrices and the rate: the linear layers of the blocks are quantized,
embeddings and head stay in 16 bits, and cvxq is asked for the rates at which some peer is better
than every peer of fewer bits, from 2 to 4.6 bits; those within 3 % of one another share one row, at
the lowest of them. Table B fixes the file: cvxq quantizes every matrix and is asked for the size of
three of the peers' files: of those chosen in the same way the smallest, the largest and the middle.

The peers are favoured where a choice had to be made. Their bits are counted as if packed tightly,
without padding, names or alignment; where a peer has several recipes of one rate, the one with
the lowest KL on the evaluation text itself is taken (by the first seed). The other seeds are for
the peers' rows that no peer's row of fewer bits beats, and for all of cvxq's in table A. All
calibrate on the same sequences, which cvxq samples from the original. One evaluator measures
everything, on the dequantized weights in float32. The second text is reported and decides nothing.

Every peer gets its own virtual environment in the --peers folder, once (llama.cpp is compiled,
which takes 10 to 40 minutes). Results are kept there, too, and only made again when what they
depend on has changed; so a change of cvxq costs no more than cvxq's own rows. Those share one
measurement per model and seed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from comparison import ASKED_RATES, OURS, Row, best_opponent, failed_claims, front, spaced
from measuring import Bench, BenchmarkError, Plan, Sampling, say
from peer_rows import Entry, first_entries, rtn_entries, with_all_seeds
from peers.catalogue import PEERS, RTN
from peers.environment import SetupError
from peers.llamacpp import BuildError
from quality_page import Tables, document, section

ROOT = Path(__file__).resolve().parent.parent
TUNED_RATES = (2.28, 3.3, 4.3)  # near which table A has rows of tuned conversions, too


def our_row(
    bench: Bench,
    plan: Plan,
    name: str,
    matrices: frozenset[str],
    samplings: Sequence[Sampling],
    *flags: str,
    variant: str = "",
) -> Row:
    """A row of cvxq: the `matrices` quantized as `flags` ask, once per sampling."""
    kept = [m for m in [*bench.embedding, *bench.shapes] if m not in matrices]
    keep = [word for m in kept for word in ("--keep", m)]
    runs = [
        bench.convert(f"{name}-seed-{s.seed}", s, *flags, *keep, *plan.convert) for s in samplings
    ]
    row = Row(OURS, variant, matrices, tuple(runs))
    kl = f"KL {row.kl.mean:.5f} ± {row.kl.sigma:.5f}"
    say(f"{bench.name}: {' '.join([OURS, variant]).rstrip()} at {row.rate:.3f} bits: {kl}")
    return row


def tables(bench: Bench, plan: Plan, folder: Path) -> Tables:
    """All rows about one model."""
    entries: list[Entry] = []
    for peer in plan.peers:
        rtn = peer == RTN
        entries += rtn_entries(bench, plan) if rtn else first_entries(bench, peer, plan, folder)
    goals = rates_to_meet(entries)  # by the first seed, as the peers' own choices are
    entries = with_all_seeds(bench, entries, plan, folder)
    partial = [entry.row for entry in entries if not entry.whole]
    # Peers that leave embeddings alone enter table B with what they have.
    complete = {entry.peer.key for entry in entries if entry.whole}
    whole = [e.row for e in entries if e.whole or e.peer.key not in complete]
    sets = sorted({row.matrices for row in partial}, key=lambda names: (-len(names), sorted(names)))
    groups: list[list[Row]] = []
    for number, matrices in enumerate(sets):
        rows = [row for row in partial if row.matrices == matrices]
        rates = nearest(goals[matrices], plan.near)
        variants: dict[str, tuple[list[float], list[str]]] = {"": (rates, [])}
        if plan.tune:
            tuning = ["--tune", str(plan.tune)]
            variants[" ".join(tuning)] = (nearest(rates, TUNED_RATES), tuning)
        for variant, (asked, extra) in variants.items():
            for rate in asked:
                name = f"{'tuned' if variant else 'a'}{number}-{rate:.4f}"
                flags = ["--bits", repr(rate), *extra]
                found = our_row(
                    bench, plan, name, matrices, plan.samplings, *flags, variant=variant
                )
                rows.append(found)
        groups.append(rows)
    unmet: list[int] = []
    everything = frozenset([*bench.embedding, *bench.shapes])
    sizes = spaced(row.file_bytes for row in front(whole, "file_bytes"))
    for size in [] if plan.near else sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}):
        flags = ["--size", f"{size}B"]
        try:
            whole.append(our_row(bench, plan, f"b-{size}", everything, plan.samplings[:1], *flags))
        except BenchmarkError as error:
            say(str(error))
            unmet.append(size)
    return Tables(groups, whole, unmet)


def rates_to_meet(entries: Sequence[Entry]) -> dict[frozenset[str], list[float]]:
    """By set of matrices, the rates of table A that cvxq is asked for."""
    rows: dict[frozenset[str], list[Row]] = {}
    for entry in entries:
        if not entry.whole:
            rows.setdefault(entry.row.matrices, []).append(entry.row)
    low, high = ASKED_RATES
    return {
        matrices: spaced(row.rate for row in front(found, "rate") if low <= row.rate <= high)
        for matrices, found in rows.items()
    }


def nearest(rates: Sequence[float], goals: Sequence[float]) -> list[float]:
    """The rates nearest to the goals, or all of them when there are no goals."""
    if not goals:
        return list(rates)
    return sorted({min(rates, key=lambda rate: abs(rate - goal)) for goal in goals})


def ratios(bench: Bench, rows: Sequence[Row]) -> list[str]:
    """One line per row of cvxq: its KL against the best peer's."""
    lines = []
    for row in sorted((row for row in rows if row.method == OURS), key=lambda row: row.rate):
        best = best_opponent(row, rows, "rate")
        if best is not None:
            lines.append(
                f"{bench.name}, {row.label} at {row.rate:.3f} bits: {row.kl.mean:.5f} against "
                f"{best.kl.mean:.5f} of {best.label}: ratio {row.kl.mean / best.kl.mean:.2f}"
            )
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[ROOT / "demo" / "model"], help="HF folders"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[ROOT / "demo" / "evaluation.txt"],
        help="one for each model, or one for all",
    )
    parser.add_argument("--second-text", type=Path, help="reported, never used for a choice")
    parser.add_argument("--windows", type=int, default=8, help="of each text, at most so many")
    parser.add_argument(
        "--only", nargs="+", choices=[peer.key for peer in PEERS], help="these peers alone"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of peers' codes")
    parser.add_argument("--group", type=int, nargs="+", default=[32, 64, 128], help="of the peers")
    parser.add_argument(
        "--near",
        type=float,
        nargs="+",
        default=[],
        help="cvxq only at the rates nearest to these, and no table B",
    )
    parser.add_argument("--context", type=int, default=2048, help="window, at most the model's")
    parser.add_argument("--sequences", type=int, default=48, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--convert", default="", help="further options for `cvxq convert`")
    parser.add_argument(
        "--tune", type=int, default=0, metavar="STEPS", help="also tune rows near three rates"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path.home() / ".cache" / "cvxq-peers",
        help="folder for the peers' environments and for all results",
    )
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 unless cvxq's KL in table A is below every peer's by more than 2σ from "
        "2.2 to 4.5 bits, and its perplexity nowhere above by more than 2σ",
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    folder = options.peers.expanduser().absolute()
    plan = Plan(
        peers=tuple(p for p in PEERS if not options.only or p.key in options.only),
        bits=tuple(options.bits),
        groups=tuple(options.group),
        samplings=tuple(Sampling(options.sequences, options.length, s) for s in options.seeds),
        near=tuple(options.near),
        convert=tuple(shlex.split(options.convert)),
        tune=options.tune,
    )
    sections: list[str] = []
    failed: list[str] = []
    try:
        if len(options.text) not in (1, len(options.model)):
            raise BenchmarkError("--text: give one text for each --model, or one for all of them")
        for number, model in enumerate(options.model):
            texts = [options.text[number % len(options.text)]]
            texts += [options.second_text] if options.second_text else []
            bench = Bench(model, texts, options.context, options.windows, folder / "work")
            found = tables(bench, plan, folder)
            sections.append(section(bench, plan, found))
            for rows in found.partial:
                failed += [f"{bench.name}: {sentence}" for sentence in failed_claims(rows)]
                for line in ratios(bench, rows):
                    say(line)
        page = document(plan, folder, sections)
        if options.output is not None:
            options.output.write_text(page, encoding="utf-8")
    except (BenchmarkError, BuildError, SetupError, OSError, ValueError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    print(page)
    for sentence in failed if options.check else []:
        print(f"quality: {sentence}", file=sys.stderr)
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
