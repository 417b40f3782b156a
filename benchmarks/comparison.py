"""Rows of the quality comparison, the tables they make, and the claims they must bear out.

Rates differ from peer to peer, so cvxq is asked for the rates where a peer is best: those of the
rows that no row of fewer bits beats (`front`), without those that are nearly equal (`spaced`).
Every peer's row is then compared with cvxq's of the highest rate that does not exceed its own.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

CLAIMED_RATES = (2.2, 4.5)  # bits per weight between which cvxq must be closer than every peer
SIGMAS = 2.0
SPACING = 1.03  # peers' rates or sizes closer than this share one row of cvxq's
ASKED_RATES = (2.0, 4.6)  # between which cvxq is asked for peers' rates
OURS = "cvxq"
Size = TypeVar("Size", int, float)


@dataclass(frozen=True)
class Run:
    """One quantized model against the original.

    rate: bits per weight of the quantized matrices, their side information included; file_bytes:
    the whole file; kl: KL(original ‖ quantized) in nats per token, on the text and on the second
    text (NaN without one); kl_error: its standard error over tokens; seconds: wall clock.
    """

    rate: float
    file_bytes: int
    kl: float
    kl_error: float
    perplexity: float
    second_kl: float
    second_perplexity: float
    seconds: float


@dataclass(frozen=True)
class Spread:
    """Mean of a figure over the seeds, and its sample standard deviation: 0 for a single seed."""

    mean: float
    sigma: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Spread of one value per seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)

    def below(self, other: "Spread") -> bool:
        """Whether this is smaller by more than SIGMAS of the difference."""
        return other.mean - self.mean > SIGMAS * math.hypot(self.sigma, other.sigma)


@dataclass(frozen=True)
class Row:
    """A method at one of its cells, one run per seed (one alone where seeds do not matter).

    name: the peer's cell; of cvxq's own rows, the options beyond the defaults. matrices: names of
    those quantized; only rows that agree in them can be compared by rate.
    """

    method: str
    name: str
    matrices: frozenset[str]
    runs: tuple[Run, ...]

    def spread(self, figure: str) -> Spread:
        """Spread of one of the fields of Run."""
        return Spread.of([getattr(run, figure) for run in self.runs])

    @property
    def rate(self) -> float:
        """Bits per weight, the most that any seed took."""
        return max(run.rate for run in self.runs)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file, the most that any seed took."""
        return max(run.file_bytes for run in self.runs)

    @property
    def kl(self) -> Spread:
        """KL on the text."""
        return self.spread("kl")

    @property
    def label(self) -> str:
        """The method with what a reader must know to repeat it."""
        if self.method != OURS:
            return f"{self.method}, {self.name}"
        return f"**{OURS}**" + (f" `{self.name}`" if self.name else "")


def front(rows: Sequence[Row], size: str) -> list[Row]:
    """The rows that no row of at most their `size` ("rate" or "file_bytes") beats, by size."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (getattr(row, size), row.kl.mean)):
        if not best or row.kl.mean < best[-1].kl.mean:
            best.append(row)
    return best


def spaced(sizes: Iterable[Size]) -> list[Size]:
    """Those of the rates or bytes that are more than SPACING above the last one taken."""
    taken: list[Size] = []
    for size in sorted(sizes):
        if not taken or size > SPACING * taken[-1]:
            taken.append(size)
    return taken


def opponents(rows: Sequence[Row], size: str) -> list[tuple[Row, list[Row]]]:
    """Every peer's row with cvxq's largest that are no larger, one for each set of options."""
    found: list[tuple[Row, list[Row]]] = []
    for row in (row for row in rows if row.method != OURS):
        fair = [
            other
            for other in rows
            if other.method == OURS
            and other.matrices == row.matrices
            and getattr(other, size) <= getattr(row, size)
        ]
        largest = {o.name: o for o in sorted(fair, key=lambda other: getattr(other, size))}
        found.append((row, list(largest.values())))
    return found


def failed_claims(rows: Sequence[Row]) -> list[str]:
    """Sentences about the claims that table A's rows contradict.

    Against every peer's row within CLAIMED_RATES, cvxq at no higher rate must have a KL that is
    lower, and a perplexity that is not higher, by more than SIGMAS standard deviations over seeds.
    Where some of cvxq's rows are tuned, the better one stands for it.
    """
    failed = []
    for row, fair in opponents(rows, "rate"):
        if not CLAIMED_RATES[0] <= round(row.rate, 2) <= CLAIMED_RATES[1]:
            continue
        where = f"{row.method}, {row.name} ({row.rate:.3f} bits)"
        if not fair:
            failed.append(f"{where}: no result of cvxq at that rate or below")
            continue
        ours = min(fair, key=lambda other: other.kl.mean)
        if not ours.kl.below(row.kl):
            failed.append(
                f"{where}: cvxq's KL {ours.kl.mean:.5f} ± {ours.kl.sigma:.5f} at {ours.rate:.3f} "
                f"bits is not below {row.kl.mean:.5f} ± {row.kl.sigma:.5f} by {SIGMAS:.0f} σ"
            )
        theirs, mine = row.spread("perplexity"), ours.spread("perplexity")
        if theirs.below(mine):
            failed.append(
                f"{where}: cvxq's perplexity {mine.mean:.3f} ± {mine.sigma:.3f} is above "
                f"{theirs.mean:.3f} ± {theirs.sigma:.3f} by more than {SIGMAS:.0f} σ"
            )
    return failed


def table(rows: Sequence[Row], size: str, parameters: int, second: str | None) -> str:
    """Markdown table in the order of `size`; cvxq's rows show the ratio to the best peer.

    parameters: of the model; second: name of the second text, None without one.
    """
    header = ["method"]
    header += ["bits per weight"] if size == "rate" else ["file bytes", "bits per parameter"]
    header += ["KL, nats per token", "ratio", "perplexity"]
    header += [f"KL on {second}", f"perplexity on {second}"] if second else []
    header += ["seconds"]
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    for row in sorted(rows, key=lambda row: (getattr(row, size), row.method == OURS)):
        bytes_ = [f"{row.file_bytes:,}", f"{8 * row.file_bytes / parameters:.3f}"]
        line = [row.label, *([f"{row.rate:.3f}"] if size == "rate" else bytes_)]
        line += [_show(row, "kl", 5), _ratio(row, rows, size), _show(row, "perplexity", 3)]
        line += [_show(row, "second_kl", 5), _show(row, "second_perplexity", 3)] * bool(second)
        lines.append([*line, f"{row.spread('seconds').mean:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best_opponent(ours: Row, rows: Sequence[Row], size: str) -> Row | None:
    """The peer's row of the lowest KL among those up to SPACING above cvxq's row `ours`."""
    most = SPACING * getattr(ours, size)
    met = (row for row, fair in opponents(rows, size) if any(other is ours for other in fair))
    against = [row for row in met if getattr(row, size) <= most]
    return min(against, key=lambda row: row.kl.mean, default=None)


def _ratio(row: Row, rows: Sequence[Row], size: str) -> str:
    best = best_opponent(row, rows, size) if row.method == OURS else None
    return "" if best is None else f"{row.kl.mean / best.kl.mean:.2f}"


def _show(row: Row, figure: str, digits: int) -> str:
    spread = row.spread(figure)
    alone = len(row.runs) == 1
    return f"{spread.mean:.{digits}f}" + ("" if alone else f" ± {spread.sigma:.{digits}f}")
