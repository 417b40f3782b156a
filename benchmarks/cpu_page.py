"""docs/cpu.md: what was measured on the CPU, what was aimed at, and why some of it falls short."""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cpu_kernel import WIDTH_DEPTHS, WIDTHS, Product, product_line

GB = 1e9
CACHE_BLOCK = 64  # tokens for which the decoder holds keys and values at once
READ_TOKENS = 128 + 64 + 1


@dataclass(frozen=True)
class Sample:
    """One run of a model: tokens/s, peak memory, seconds to load, seconds beside products."""

    decode: float
    prefill: float
    resident_bytes: int
    load_seconds: float
    overhead_seconds: float | None = None


@dataclass(frozen=True)
class Round:
    """Each model of a group run once; bandwidth in bytes/s, of plain loads."""

    group: str
    date: str
    bandwidth: float
    samples: dict[str, Sample]


@dataclass(frozen=True)
class Model:
    """A measured file: its size, the model's weights, its depths in words, its config.json."""

    name: str
    file_bytes: int
    weights: int
    histogram: str
    config: dict[str, Any]

    @property
    def bits(self) -> float:
        return 8 * self.file_bytes / self.weights

    @property
    def is_ours(self) -> bool:
        return self.name.endswith(".cvxq")

    @property
    def label(self) -> str:
        stem = self.name.rpartition(".")[0].replace("-", " ")
        return f"{stem} bits" if self.is_ours else f"llama.cpp {stem}"

    @property
    def cache_bytes(self) -> int:
        """Keys and values in float32 of the tokens that a run reads, in whole blocks."""
        c = self.config
        wide = c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"]
        tokens = -(-READ_TOKENS // CACHE_BLOCK) * CACHE_BLOCK
        return int(8 * c["num_hidden_layers"] * wide * tokens)


KERNEL_COLUMNS = (
    "depth",
    "bits held per weight",
    "GB/s",
    "Gweights/s",
    "share of reading",
    "repacked per core, GB/s",
)
MODEL_COLUMNS = (
    "model",
    "bits per weight",
    "file, MB",
    "decode, tokens/s",
    "GB/s",
    "share of reading",
    "prefill, tokens/s",
    "resident, MB",
    "load, s",
    "rounds",
)

KERNEL_READING = """\
Bits held per weight count everything that a product reads: codes padded to whole units, a byte for
each group's scale, four bytes per row. The share is a median over passes ± their deviation, each
beside plain loads in the same second, which read eight pages at a time in turn: one after the other
they reach two thirds of that. Bounds: with all in the second caches, the same products reach 16 to
19 GB/s at 2 bits, 21 to 25 at 3, 24 to 29 at 4 and 18 to 19 at 8, not far above what memory
delivers or below it, and neither hides the other altogether. At depths 1 to 4 a product needs 2.3
to 2.7 vector instructions per 64 weights, at 7 and 8 some ten. To these come the rounding of the
inputs for every cluster of 64 rows and the fetching of every line ahead, a tenth of all
instructions at 2 bits: per byte of codes both are dearest there."""

MODEL_READING = """\
Figures are medians over rounds ± their deviation; rounds in which other processes took more than
15 % of the processors were thrown away. Speeds of different tables should not be
compared: other tenants of this machine take bandwidth and clock, up to two thirds of both. GB/s
are bytes of the file times tokens/s, an upper bound of what is read (one row of the embeddings
is). llama.cpp is built with one line added: GCC 12's `_tile_loadconfig` claims to read eight
bytes of its argument, so the compiler drops the stores that set up the tiles of AMX, and every
prefill of a type that uses them crashes. Mended, that path is llama.cpp's fastest (`--repack 0`,
which avoids it, was slower in prefill and no faster in decoding), and it is what the table
shows."""


WIDTH_READING = """\
Time per weight, beside that of matrices as tall whose width is the next multiple of 64 or 256:
wanted are 5 % at most. With mixed depths the columns of each depth are padded to eight, and every
depth has a beginning and an end; narrower matrices have fewer columns to share that."""


BOUNDS = """\
What bounds the rest, from profiles of the model at 3.2 bits:

- Decoding waits for memory, and at 2 and 3 bits as much for instructions: the share of reading is
  that of the products alone, less 3 % for attention and what lies between products.
- Of the time beside products and attention, two sums with norms take 7 µs per layer, the
  activation 5.5 µs, rotation and the new key and value 4.5 µs. Little of it is arithmetic: 100 kB
  per layer pass from one core's cache to the other's, or were evicted since the last token; on
  one thread it is no less. It is 1 to 3 % of a token.
- Loading: about a third of the processors' time is Python's and numpy's, for depths and scales of
  every group, and goes with the number of weights: files of few bits per weight take longer per
  byte. Next come repacking, pages that the system clears, and checksums.
- Repacking at 2 bits: per column of 64 codes the bookkeeping (where its planes begin, its scale's
  place) costs more than the 16 bytes of codes, and clearing new pages about as much.
- Prefill: the matrix unit's inner loop reaches 0.67 of 1.15 T products/s on a core where all is
  in the second cache; at 128 tokens it takes 60 % of the time, expanding weights 15 %, putting
  inputs and results in order 15 %."""


def page(
    rounds: Sequence[Round],
    products: dict[str, list[Product]],
    widths: dict[str, list[float]],
    models: Sequence[Model],
    machine: str,
    peer: str,
    missing: Sequence[str],
) -> str:
    """The document.

    peer: version of llama-cpp-python whose llama.cpp was built; missing: files not measured.
    """
    dates = sorted({round_.date for round_ in rounds}) or ["no date"]
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    bandwidths = [round_.bandwidth / GB for round_ in rounds]
    lines = [
        "# Speed on the CPU",
        "",
        f"Made by `python {' '.join(['benchmarks/cpu.py', *sys.argv[1:]])}` from rounds measured",
        f"on {when}; {machine}.",
    ]
    if bandwidths:
        lines.append(
            f"Plain loads from memory reached {min(bandwidths):.1f} to {max(bandwidths):.1f} GB/s."
        )
    if products:
        lines += ["", "## Products alone", "", *head(KERNEL_COLUMNS)]
        lines += [product_line(depth, several) for depth, several in products.items()]
        lines += ["", KERNEL_READING]
    if widths:
        lines += ["", *width_lines(widths)]
    if rounds:
        lines += ["", f"## Whole models, beside llama.cpp (of llama-cpp-python {peer})", ""]
        lines += ["128 tokens of prompt, 64 generated.", ""]
        by_name = {model.name: model for model in models}
        for group in sorted({round_.group for round_ in rounds}):
            mine = [round_ for round_ in rounds if round_.group == group]
            lines += [*head(MODEL_COLUMNS)]
            lines += [model_line(by_name[name], mine) for name in names_in(mine)]
            lines.append("")
        if missing:
            lines += [f"Not measured yet: {', '.join(missing)}.", ""]
        lines += [MODEL_READING, "", "Share of the weights at each depth:", ""]
        lines += [f"- {m.label}: {m.histogram}" for m in models if m.histogram]
        lines += ["", "## What was aimed at", "", *kernel_claims(products)]
        lines += [*claims(rounds, by_name), "", BOUNDS]
    return "\n".join(lines) + "\n"


def width_lines(widths: dict[str, list[float]]) -> list[str]:
    """What measure_widths found, as a table and how to read it."""
    columns = ["width", "next", *(f"depth {depth}" for depth in WIDTH_DEPTHS)]
    rows = [width_line(index, widths) for index in range(len(WIDTHS))]
    return [*head(columns), *rows, "", WIDTH_READING]


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]


def width_line(index: int, widths: dict[str, list[float]]) -> str:
    """One row of the table of widths: what is lost to the next multiple."""
    losses = [f"{widths[depth][index] - 1:+.1%}" for depth in WIDTH_DEPTHS]
    return f"| {' | '.join([*map(str, WIDTHS[index]), *losses])} |"


def names_in(rounds: Sequence[Round]) -> list[str]:
    """Every model of some rounds, ours first."""
    names = dict.fromkeys(name for round_ in rounds for name in round_.samples)
    return sorted(names, key=lambda name: not name.endswith(".cvxq"))


def spread(values: Sequence[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.median(values):{form}} ± {deviation:{form}}"


def model_line(model: Model, rounds: Sequence[Round]) -> str:
    """One row of the table of models."""
    mine = [round_ for round_ in rounds if model.name in round_.samples]
    samples = [round_.samples[model.name] for round_ in mine]
    read = [sample.decode * model.file_bytes for sample in samples]
    shares = [speed / round_.bandwidth for speed, round_ in zip(read, mine, strict=True)]
    return (
        f"| {model.label} | {model.bits:.2f} | {model.file_bytes / 1e6:.0f} "
        f"| {spread([s.decode for s in samples], '.1f')} | {statistics.median(read) / GB:.1f} "
        f"| {statistics.median(shares):.0%} | {spread([s.prefill for s in samples], '.0f')} "
        f"| {max(s.resident_bytes for s in samples) / 1e6:.0f} "
        f"| {statistics.median(s.load_seconds for s in samples):.2f} | {len(samples)} |"
    )


def compare(
    rounds: Sequence[Round], ours: str, theirs: str, of: Callable[[Sample], float], wanted: float
) -> tuple[str, str]:
    """How often ours is theirs, in words, and whether that is what was wanted.

    By the medians of both, and as the median of every round's ratio: where noise is shared the
    second is the better figure, where it is not the first.
    """
    both = [r for r in rounds if {ours, theirs} <= {*r.samples}]
    ratios = [of(r.samples[ours]) / of(r.samples[theirs]) for r in both]
    by_medians = middle(both, ours, of) / middle(both, theirs, of)
    found = {by_medians >= wanted, statistics.median(ratios) >= wanted}
    judged = "**undecided**" if len(found) > 1 else verdict(found.pop())
    return f"{by_medians:.2f} (round by round {spread(ratios, '.2f')})", judged


def middle(rounds: Sequence[Round], name: str, of: Callable[[Sample], float]) -> float:
    return statistics.median(of(r.samples[name]) for r in rounds if name in r.samples)


def verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def kernel_claims(products: dict[str, list[Product]]) -> Iterator[str]:
    """A line on the products' share of reading, and on repacking."""
    for depth, wanted in (("2", 0.75), ("3", 0.85), ("4", 0.85)):
        if depth in products:
            share = statistics.median(product.read / product.memory for product in products[depth])
            yield (
                f"- products at {depth} bits read at {share:.0%} of the speed of plain loads "
                f"(wanted {wanted:.0%}): {verdict(share >= wanted)}."
            )
    for depth, several in products.items():
        repack = statistics.median(product.repack for product in several) / GB
        yield (
            f"- one core repacks {repack:.2f} GB/s at depth {depth} (wanted 1.0): "
            f"{verdict(repack >= 1)}."
        )


def claims(rounds: Sequence[Round], models: dict[str, Model]) -> Iterator[str]:
    """A line on every aim that the rounds can judge."""
    bands = (("3", "3.2", 2.9, 3.6, 1.7), ("4", "4.25", 3.9, 4.9, 1.2), ("8", "8", 8.0, 9.0, 1.0))
    for group, rate, low, high, factor in bands:
        mine = [round_ for round_ in rounds if round_.group == group]
        ours = f"cvxq-{rate}.cvxq"
        peers = [
            name for name in names_in(mine) if name != ours and low <= models[name].bits <= high
        ]
        if not peers or ours not in names_in(mine):
            continue
        for what, of, wanted in (
            ("decodes", lambda s: s.decode, factor),
            ("prefills", lambda s: s.prefill, 1.0),
        ):
            theirs = max(peers, key=lambda name: middle(mine, name, of))
            text, judged = compare(mine, ours, theirs, of, wanted)
            yield (
                f"- {rate} bits {what} {text} times as fast as {models[theirs].label}, the fastest "
                f"from {low} to {high} bits (wanted {wanted}): {judged}."
            )
    for group, ours, theirs, text in (
        ("2", "cvxq-2.2.cvxq", "cvxq-3.2.cvxq", "2.2 bits decodes {} times as fast as 3.2 bits"),
        (
            "demo",
            "demo-3.cvxq",
            "demo-F16.gguf",
            "the demo model at 3 bits decodes {} times as "
            "fast as llama.cpp runs it in F16, on one thread or several",
        ),
    ):
        mine = [round_ for round_ in rounds if round_.group == group]
        if {ours, theirs} <= {*names_in(mine)}:
            words, judged = compare(mine, ours, theirs, lambda s: s.decode, 1.0)
            yield f"- {text.format(words)} (wanted more than 1): {judged}."
    for model in models.values():
        samples = [r.samples[model.name] for r in rounds if model.name in r.samples]
        if model.is_ours:
            yield own_claims(model, samples)


def own_claims(model: Model, samples: Sequence[Sample]) -> str:
    """Memory, loading and overhead of one of our models."""
    beyond = max(s.resident_bytes for s in samples) - model.file_bytes - model.cache_bytes
    load = statistics.median(s.load_seconds for s in samples) / model.file_bytes * GB
    overhead = [1e6 * s.overhead_seconds for s in samples if s.overhead_seconds is not None]
    parts = [
        f"memory beyond file and cache {beyond / 1e6:.0f} MB (at most 350): "
        f"{verdict(beyond <= 350e6)}"
    ]
    if model.file_bytes > 100e6:  # a small file's load is Python's
        parts.append(f"loads in {load:.2f} s per GB (at most 1.5): {verdict(load <= 1.5)}")
        parts.append(
            f"{spread(overhead, '.1f')} µs per layer beside products and attention "
            f"(at most 15): {verdict(statistics.median(overhead) <= 15)}"
        )
    return f"- {model.label}: {'; '.join(parts)}."
