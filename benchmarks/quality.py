"""Compare cvxq with round-to-nearest and GPTQ on one model: what is lost, and what it takes.

    python benchmarks/quality.py --output docs/quality.md            # demo model, all of it
    python benchmarks/quality.py --model FOLDER --text FILE --bits 3 --group 64 --check

Table A fixes the set of matrices: everyone quantizes the linear layers of the blocks, embeddings
and head stay in 16 bits, and cvxq is asked for the rate of GPTQ's result. Table B fixes the file:
cvxq quantizes every matrix and is asked for the size of GPTQ's file, or less.

The peer is favoured where a choice had to be made. Its bits are counted as if packed tightly,
without padding, names or alignment; of its settings (`GPTQ_SETTINGS`) the one with the lowest KL
on the evaluation text itself is taken, cell by cell; it calibrates on the sequences that cvxq
samples from the original, and only cvxq's seconds include the sampling. Seconds and memory are
those of the whole command, imports included. One evaluator measures everything, on the
dequantized weights in float32.

The peer gets its own virtual environment in the --peers folder, once. --without-peer leaves GPTQ
out; cvxq is then asked for RTN's rates and sizes.
"""

import argparse
import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from comparison import Row, failed_claims, failed_sizes, table
from measuring import Bench, BenchmarkError, Sampling, check_same_sequences
from peers.environment import SetupError, peer_python

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cvxq", "torch", "transformers")
GPTQ_SETTINGS = {
    "asymmetric": ("--shrink", "0.2"),
    "asymmetric, deep clipping": ("--shrink", "0.6"),
    "symmetric, deep clipping": ("--shrink", "0.6", "--symmetric"),
}
READING = """\
KL is that of the original's next-token distribution to the quantized model's. `bits per weight`
counts the quantized matrices with all their side information, `bits per parameter` the whole file.
Standard errors are over tokens and mostly common to the rows: the differences between rows are much
better known than each of them.
Seconds and peak memory are of the whole command; cvxq's include sampling the calibration
sequences. RTN stores 8-bit scales and offsets along the input."""
READING_PEER = """\
GPTQ's rows are the best of its settings on this very text
({settings}).
Its bits and bytes are counted as if packed tightly, with 16-bit scales and zero points as deep as
the codes; it leaves the embeddings and the head in 16 bits in both tables, as its users do. At the
same group size RTN takes slightly fewer bits than GPTQ."""


def run(
    bench: Bench, cells: Sequence[tuple[int, int]], python: Path | None
) -> tuple[list[Row], list[Row], dict[str, str]]:
    """Rows of table A and of table B, and the versions of the peer's packages.

    cells: bits of the peers' codes and their group sizes; python: the peer's interpreter, or None
    to go without GPTQ.
    """
    keep = [word for name in bench.kept for word in ("--keep", name)]
    ids = bench.save_sequences()
    table_a: list[Row] = []
    table_b: list[Row] = []
    versions: dict[str, str] = {}
    for cell in cells:
        name = f"{cell[0]}-{cell[1]}"
        rtn = ["--method", "rtn", "--bits", str(cell[0]), "--group-size", str(cell[1])]
        plain_a = bench.convert("RTN", cell, f"rtn-a-{name}", *rtn, *keep)
        plain_b = bench.convert("RTN", cell, f"rtn-b-{name}", *rtn)
        theirs: list[Row] = []
        if python is not None:
            for setting, flags in GPTQ_SETTINGS.items():
                row, versions = bench.gptq(python, cell, setting, flags, ids)
                theirs.append(row)
            theirs = [min(theirs, key=lambda row: row.kl)]
        rate = theirs[0].rate if theirs else plain_a.rate
        size = theirs[0].file_bytes if theirs else plain_b.file_bytes
        ours_a = bench.convert("cvxq", cell, f"cvxq-a-{name}", "--bits", repr(rate), *keep)
        ours_b = bench.convert("cvxq", cell, f"cvxq-b-{name}", "--size", f"{size}B")
        check_same_sequences(bench.work / f"cvxq-a-{name}.cvxq", ids)
        table_a += [plain_a, *theirs, ours_a]
        table_b += [plain_b, *theirs, ours_b]
    return table_a, table_b, versions


def processor() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def document(
    bench: Bench, tables: tuple[list[Row], list[Row]], versions: dict[str, str], text: str
) -> str:
    """The whole page: how it was made, both tables, how to read them."""
    original = bench.original_perplexity()
    named = [f"{name} {version(name)}" for name in PACKAGES]
    peers = [f"{name} {number}" for name, number in versions.items()]
    sampling = bench.sampling
    reading = READING
    if peers:
        reading += "\n" + READING_PEER.format(settings="; ".join(GPTQ_SETTINGS))
    return "\n".join(
        [
            "# Quality against peers",
            "",
            f"Made on {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} by",
            "",
            f"    python {shlex.join(['benchmarks/quality.py', *sys.argv[1:]])}",
            "",
            f"on {processor()}, {torch.get_num_threads()} threads, Python "
            f"{platform.python_version()}; {', '.join(named)}"
            + (f"; GPTQ in its own environment: {', '.join(peers)}" if peers else "")
            + f". Model: {bench.parameters:,} parameters, {sum(bench.quantized.values()):,} of "
            f"them in the matrices of table A. Evaluated on {text}: {original.tokens:,} tokens, "
            f"windows of {bench.context}; the original's perplexity is "
            f"{original.perplexity:.3f} ± {original.standard_error:.3f}. Calibration: "
            f"{sampling.count} sequences of {sampling.length} tokens sampled from the original, "
            f"seed {sampling.seed}.",
            "",
            "## A: the linear layers of the blocks, everything else in 16 bits",
            "",
            table(tables[0], bench.parameters),
            "",
            "## B: the whole file, every byte counted",
            "",
            table(tables[1], bench.parameters),
            "",
            reading,
            "",
        ]
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="HF folder")
    parser.add_argument("--text", type=Path, default=ROOT / "demo" / "evaluation.txt")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of peers' codes")
    parser.add_argument("--group", type=int, nargs="+", default=[64, 128], help="of the peers")
    parser.add_argument("--context", type=int, default=2048, help="window, at most the model's")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path.home() / ".cache" / "cvxq-peers",
        help="folder for the peer's environment and for what is made on the way",
    )
    parser.add_argument("--without-peer", action="store_true", help="no GPTQ")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 unless cvxq's KL in table A is below RTN's everywhere and GPTQ's up to "
        "3.3 bits, at no higher rate or size",
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    sampling = Sampling(options.sequences, options.length, options.seed)
    folder = options.peers.expanduser().absolute()
    try:
        python = None if options.without_peer else peer_python(folder)
        bench = Bench(options.model, options.text, options.context, sampling, folder / "work")
        cells = [(bits, group) for bits in options.bits for group in options.group]
        table_a, table_b, versions = run(bench, cells, python)
        page = document(bench, (table_a, table_b), versions, options.text.name)
        if options.output is not None:
            options.output.write_text(page, encoding="utf-8")
    except (BenchmarkError, SetupError, OSError, ValueError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    print(page)
    failed = failed_claims(table_a) + failed_sizes(table_b) if options.check else []
    for sentence in failed:
        print(f"quality: {sentence}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
