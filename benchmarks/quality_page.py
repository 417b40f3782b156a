"""The page that the quality comparison writes: how it was made, its tables, how to read them."""

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from comparison import OURS, Row, table
from measuring import Bench, Plan
from peers.catalogue import RTN
from peers.environment import pinned, requirements
from peers.llamacpp import build

PACKAGES = ("cvxq", "torch", "transformers")
READING = """\
## How to read the tables

KL is that of the original's next-token distribution to the quantized model's. `bits per weight`
counts the quantized matrices with all their side information. ± is the standard deviation over
the calibration seeds ({seeds}); methods without calibration have none. `ratio` is cvxq's KL
divided by the lowest among the peers' rows that it stands against, those of as many bits or a
little more. Each peer's row is the best of its recipes on this very text. Bits and bytes of the
peers are counted as if packed tightly; files of peers other than llama.cpp keep embeddings and
head in 16 bits, as their users do, and llama.cpp's are counted without their vocabulary, in place
of which everyone is charged the model's own. In table B, cvxq's rows are of the first seed.

Not every peer can pack every matrix. AutoRound and GPTQModel leave those in 16 bits that have a
side which is no multiple of 32; llama.cpp's K- and I-quants need rows that are multiples of 256,
its other types (IQ4_NL, Q4_0, Q5_0) multiples of 32. Where peers differ in the matrices they
quantize, there is one table A for each set, and cvxq quantizes that very set. LLM Compressor wants
groups that divide the rows, and gets the nearest such size where 32, 64 or 128 do not.

Seconds are wall clock; those of the peers leave out starting Python and importing their packages,
which takes some of them longer than the work; cvxq's count everything, sampling the
calibration sequences included. RTN is `cvxq convert --method rtn`, with 8-bit scales and offsets
along the input."""


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


def section(bench: Bench, plan: Plan, groups: list[list[Row]], whole: list[Row]) -> str:
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
        "original.",
    ]
    for rows in groups:
        missing = sorted(bench.shapes.keys() - rows[0].matrices)
        title = "the linear layers of the blocks, everything else in 16 bits"
        lines += ["", f"### A: {title}", ""]
        if missing:
            kinds = sorted({name.split(".")[-2] for name in missing})
            lines += [f"Without {', '.join(kinds)}, which the peers below leave in 16 bits.", ""]
        lines += [table(rows, "rate", bench.parameters, second)]
    if any(row.method == OURS for row in whole):
        lines += ["", "### B: the whole file, every byte counted", ""]
        lines += [table(whole, "file_bytes", bench.parameters, second)]
    return "\n".join(lines)


def document(plan: Plan, folder: Path, sections: Sequence[str]) -> str:
    """The whole page: how it was made, the sections of the models, how to read them."""
    # names instead of paths: a page is not about where somebody keeps their models
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    seeds = ", ".join(str(sampling.seed) for sampling in plan.samplings)
    return "\n".join(
        [
            "# Quality against peers",
            "",
            f"Made on {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} by",
            "",
            f"    python {shlex.join(['benchmarks/quality.py', *words])}",
            "",
            f"on {processor()}, {torch.get_num_threads()} threads, Python "
            f"{platform.python_version()}; {versions(plan, folder)}.",
            "",
            *(line for section in sections for line in (section, "")),
            READING.format(seeds=seeds),
            "",
        ]
    )
