"""Rows of the quality comparison, the tables they make, and the claims they must bear out."""

from collections.abc import Sequence
from dataclasses import dataclass

GPTQ_CLAIM_BITS = 3.3  # up to this rate (to one decimal) cvxq must be closer than GPTQ
HEADER = (
    "method",
    "bits per weight",
    "file bytes",
    "bits per parameter",
    "perplexity",
    "KL, nats per token",
    "seconds",
    "peak MB",
)


@dataclass(frozen=True)
class Cost:
    """What one command took: wall-clock seconds and peak resident memory in bytes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One quantized model against the original.

    method: "RTN", "GPTQ" or "cvxq"; cell: rows of one cell are compared, (bits of a peer's codes,
    its group size); setting: a peer's own; rate: bits per weight of the quantized matrices, their
    side information included; kl, kl_error: KL(original ‖ quantized) in nats per token and its
    standard error.
    """

    method: str
    cell: tuple[int, int]
    setting: str
    rate: float
    file_bytes: int
    perplexity: float
    perplexity_error: float
    kl: float
    kl_error: float
    cost: Cost

    @property
    def label(self) -> str:
        """The method with what a reader must know to repeat it."""
        if self.method == "cvxq":
            return "cvxq"
        bits, group = self.cell
        return f"{self.method}, {bits} bits, group {group}" + f", {self.setting}" * bool(
            self.setting
        )


def table(rows: Sequence[Row], parameters: int) -> str:
    """Markdown table, one line per row, in the order given; `parameters` is the model's count."""
    lines = [HEADER, ("---", *["--:"] * (len(HEADER) - 1))]
    for row in rows:
        lines.append(
            (
                f"**{row.label}**" if row.method == "cvxq" else row.label,
                f"{row.rate:.3f}",
                f"{row.file_bytes:,}",
                f"{8 * row.file_bytes / parameters:.3f}",
                f"{row.perplexity:.3f} ± {row.perplexity_error:.3f}",
                f"{row.kl:.5f} ± {row.kl_error:.5f}",
                f"{row.cost.seconds:.0f}",
                f"{row.cost.peak_bytes / 1e6:.0f}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def failed_sizes(rows: Sequence[Row]) -> list[str]:
    """Sentences about files of table B that are larger than the one cvxq was asked not to exceed.

    The file to compare with is GPTQ's, or RTN's where the cell has no GPTQ.
    """
    failed = []
    for cell in sorted({row.cell for row in rows}):
        found = {row.method: row for row in rows if row.cell == cell}
        ours, other = found["cvxq"], found.get("GPTQ", found["RTN"])
        if ours.file_bytes > other.file_bytes:
            failed.append(
                f"{cell[0]} bits, group {cell[1]}: cvxq's file takes {ours.file_bytes:,} bytes, "
                f"{other.method}'s {other.file_bytes:,}"
            )
    return failed


def failed_claims(rows: Sequence[Row]) -> list[str]:
    """Sentences about the claims that table A's rows contradict.

    In every cell cvxq must take no more bits than GPTQ, have a lower KL than RTN, and than GPTQ
    where that takes at most 3.3 bits per weight.
    """
    failed = []
    for cell in sorted({row.cell for row in rows}):
        found = {row.method: row for row in rows if row.cell == cell}
        ours = found["cvxq"]
        where = f"{cell[0]} bits, group {cell[1]}"
        for name in sorted(found.keys() - {"cvxq"}):
            other = found[name]
            if name == "GPTQ" and ours.rate > other.rate:
                failed.append(f"{where}: cvxq takes {ours.rate:.4f} bits, GPTQ {other.rate:.4f}")
            if name == "GPTQ" and round(other.rate, 1) > GPTQ_CLAIM_BITS:
                continue
            if not ours.kl < other.kl:
                failed.append(
                    f"{where}: cvxq's KL is {ours.kl:.5f} at {ours.rate:.3f} bits, "
                    f"{name}'s {other.kl:.5f} at {other.rate:.3f}"
                )
    return failed
