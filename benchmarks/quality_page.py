"""The page that the quality comparison writes: how it was made, its tables, how to read them."""

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from comparison import OURS, Row, table
from measuring import Bench, Plan
from peers.catalogue import PEERS, RTN
from peers.environment import pinned, requirements
from peers.llamacpp import build

PACKAGES = ("cvxq", "torch", "transformers")
ROOT = Path(__file__).resolve().parent.parent
READING = """\
## How to read the tables

KL is that of the original's next-token distribution to the quantized model's. `bits per weight`
counts the quantized matrices with all their side information. ± is the standard deviation over
the calibration seeds ({seeds}); rows without it are of one run. `ratio` is cvxq's KL divided by
the lowest among the peers' rows that it stands against: those of as many bits or up to 3 % more.

The peers are favoured. Each of their rows is the best of its recipes on this very text, by the
first seed; the other seeds are for rows that no peer's row of fewer bits beats. cvxq runs with its
defaults but for the options that a row names, and a conversion sees none of these texts. (Its
developers have: scales of rows were added after an early version lost to GPTQ on stories260K's
first text.) Bits and bytes of the peers are counted as if packed tightly. Files of peers other than
llama.cpp keep embeddings and head in 16 bits, as their users do; llama.cpp's are counted without
their vocabulary, in place of which everyone is charged the model's own. In table B, cvxq's rows are
of the first seed.

Where peers differ in the matrices they can pack, there is one table A for each set, and cvxq
quantizes that very set.

Seconds are wall clock, whatever else the machine does: where more jobs than processors are stated
above, they say little. Those of the peers leave out starting Python and importing their packages;
cvxq's count everything, sampling the sequences and measuring included, which one seed's rows have
in common."""
NOTES = {
    "rtn": "RTN is `cvxq convert --method rtn`, with 8-bit scales and offsets along the input.",
    "hqq": "HQQ runs with its default solver, groups along inputs and along outputs.",
    "gptq": """\
LLM Compressor wants groups that divide the rows, and gets the nearest such size where 32, 64 or
128 do not.""",
    "gptqmodel": """\
GPTQModel is asked for groups of 64 by the first seed only. It leaves matrices in 16 bits that have
a side which is no multiple of 32.""",
    "gguf": """\
llama.cpp's types come from its own `llama-imatrix` and `llama-quantize`, by the first seed only.
"alone" is one type for all matrices (`--pure`), the other rows are its mixtures, in table A with
embeddings in 16 bits. Its K- and I-quants need rows that are multiples of 256, its other types
(IQ4_NL, Q4_0, Q5_0) multiples of 32.""",
    "autoround": """\
AutoRound takes minutes per result, and is asked for groups of 128 by the first seed only. It leaves
matrices in 16 bits that have a side which is no multiple of 32.""",
}


@dataclass(frozen=True)
class Tables:
    """Rows about one model.

    partial: of table A, one list per set of matrices; whole: of table B; unmet: file bytes that
    cvxq was asked for and failed to make.
    """

    partial: list[list[Row]]
    whole: list[Row]
    unmet: list[int]


def processor() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(plan: Plan, folder: Path) -> str:
    """What ran, with versions."""
    named = [f"{name} {version(name)}" for name in PACKAGES]
    for peer in plan.peers:
        if peer.key == "gguf":
            named.append(f"llama.cpp as in {peer.package} {build(folder / 'llama.cpp').version}")
        elif peer != RTN:
            named.append(
                f"{peer.package} {pinned(peer.package, requirements(peer.key).read_text())}"
            )
    return ", ".join(named)


def section(bench: Bench, plan: Plan, tables: Tables) -> str:
    """What was measured on one model."""
    second = bench.texts[1].name if len(bench.texts) > 1 else None
    texts = []
    for text in bench.texts:
        original = bench.original_perplexity(text)
        texts.append(
            f"{text.name}: {original.tokens:,} tokens, on which the original's perplexity is "
            f"{original.perplexity:.3f} ± {original.standard_error:.3f}"
        )
    sampling = plan.samplings[0]
    lines = [
        f"## {bench.name}",
        "",
        f"{bench.parameters:,} parameters, {bench.count(bench.shapes):,} of them in the linear "
        f"layers of the blocks. Evaluated in windows of {bench.context} on {'; and '.join(texts)}. "
        f"Calibration: {sampling.count} sequences of {sampling.length} tokens sampled from the "
        f"original. Of cvxq's seconds, {bench.measuring_seconds(plan.samplings):.0f} are for the "
        "measurement that the rows of a seed share.",
    ]
    for rows in tables.partial:
        missing = sorted(bench.shapes.keys() - rows[0].matrices)
        title = "the linear layers of the blocks, everything else in 16 bits"
        lines += ["", f"### A: {title}", ""]
        if missing:
            kinds = sorted({name.split(".")[-2] for name in missing})
            lines += [f"Without {', '.join(kinds)}, which the peers below leave in 16 bits.", ""]
        lines += [table(rows, "rate", bench.parameters, second)]
    if any(row.method == OURS for row in tables.whole):
        lines += ["", "### B: the whole file, every byte counted", ""]
        lines += [table(tables.whole, "file_bytes", bench.parameters, second)]
    for size in tables.unmet:
        lines += ["", f"`cvxq convert --size {size}B` failed."]
    return "\n".join(lines)


def shown(word: str) -> str:
    """A word of the command line, for a page that is not about where somebody keeps their files."""
    path = Path(word)
    if "/" not in word or not path.exists():
        return path.name if "/" in word else word
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def document(plan: Plan, folder: Path, sections: Sequence[str]) -> str:
    """The whole page: how it was made, the sections of the models, how to read them."""
    seeds = ", ".join(str(sampling.seed) for sampling in plan.samplings)
    absent = [peer.label for peer in PEERS if peer not in plan.peers]
    load = f"{os.getloadavg()[2]:.0f} jobs at a time on {os.cpu_count()} processors"
    return "\n".join(
        [
            "# Quality against peers",
            "",
            f"Made on {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} by",
            "",
            f"    python {shlex.join(['benchmarks/quality.py', *map(shown, sys.argv[1:])])}",
            "",
            f"on {processor()}, threads: {torch.get_num_threads()}, Python "
            f"{platform.python_version()}, {load}; {versions(plan, folder)}.",
            "",
            *(line for section in sections for line in (section, "")),
            READING.format(seeds=seeds),
            "",
            *(f"- {NOTES[peer.key]}".replace("\n", "\n  ") for peer in plan.peers),
            *([f"- Not in this run: {', '.join(absent)}."] if absent else []),
            "",
        ]
    )
