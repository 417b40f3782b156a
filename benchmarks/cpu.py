"""Decoding and prefill on the CPU, side by side with llama.cpp on the same random weights.

    python benchmarks/cpu.py --prepare              # make what is missing: an hour or two
    python benchmarks/cpu.py                        # measure everything: 20 minutes
    python benchmarks/cpu.py --only 3 --rounds 2    # two rounds more of the models near 3 bits
    python benchmarks/cpu.py --rounds 0 --output docs/cpu.md   # no more rounds; write the page
    python benchmarks/cpu.py --real FILES --gguf GGUFS --output docs/cpu-real.md
    python benchmarks/cpu.py --load model.cvxq --gguf model.gguf   # while others are busy

A Llama of 1.1 billion random weights (`random_model.py`) is converted at several rates without
calibration, and made into llama.cpp's types; the demo model is converted and made into F16. Models
are compared in groups. A round runs each model of a group once, in a process of its own, in
alternating order: `cvxq bench` and `llama-bench`, with the same threads, prompt and number of
tokens, after measuring what plain loads from memory reach. On a machine that others share only
such rounds can be compared; one in which other processes took more than 15 % of the processors is
thrown away. Rounds are kept in the work folder, and a later run adds to them unless the kernels
have changed; the page has medians over all of them.

`--real` takes a folder of real models' files, NAME-3.2.cvxq and NAME-4.25.cvxq, and measures them
beside `--gguf` FOLDER/NAME.gguf and what llama-quantize makes of that; then widths, and the
smallest model as `--load` does. That takes one file, and measures it on one thread and on several
while other processes keep processors busy.
"""

import argparse
import datetime
import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cpu_kernel import DEPTHS, Product, measure_products, measure_widths, read_bandwidth
from cpu_load import load_page
from cpu_page import Model, Round, Sample, page, width_lines
from cpu_real import models as real_models
from cpu_real import real_page
from cpu_runs import Amount, measure_ours, measure_theirs, run, say
from cvxq_kernels.cpu import Pool, isa
from cvxq_kernels.cpu.loader import find_library
from packing import cpu_name
from peers.llamacpp import FOLDER, LlamaCpp, build
from random_model import histogram_line

BENCHMARKS = Path(__file__).resolve().parent
WORK = Path.home() / ".cache" / "cvxq-peers" / "cpu"
DEMO = BENCHMARKS.parent / "demo" / "model"
GROUPS = {
    "3": ("cvxq-3.2.cvxq", "Q2_K.gguf", "IQ3_S.gguf", "Q3_K_S.gguf"),
    "4": ("cvxq-4.25.cvxq", "Q3_K_M.gguf", "IQ4_XS.gguf", "Q4_K_M.gguf"),
    "8": ("cvxq-8.cvxq", "Q8_0.gguf"),
    "2": ("cvxq-2.2.cvxq", "cvxq-3.2.cvxq"),
    "demo": ("demo-3.cvxq", "demo-F16.gguf"),
}
MOST_OTHERS = 0.15  # of the processors' time, that other processes may take from a round


def make(path: Path, peer: LlamaCpp) -> None:
    """Make one container or GGUF file, and what it is made of."""
    work, (name, _, kind) = path.parent, path.stem.rpartition("-")
    model = DEMO if name == "demo" else work / "model"
    if not any(model.glob("*.safetensors")):
        say("making the random model")
        run([sys.executable, BENCHMARKS / "random_model.py", model])
    say(f"making {path.name}")
    if path.suffix == ".cvxq":
        # A little calibration, for depths that differ: without any, all weights get one.
        options = ["--bits", kind, "--sequences", "2", "--length", "16"]
        run([sys.executable, "-m", "cvxq.cli", "convert", model, "-o", path, *options])
    elif kind == "F16":
        module = [sys.executable, "-m", "peers.plain_gguf", model, path, peer.gguf_package]
        run(module, cwd=BENCHMARKS)
    else:
        source, part = work / "F16.gguf", path.with_suffix(".part")
        if not source.exists():
            make(source, peer)
        run([peer.tool("llama-quantize"), source, part, kind])
        part.rename(path)


def measure_round(group: str, work: Path, threads: int, turn: int, peer: LlamaCpp) -> Round:
    """Run each model of a group once, in reverse if `turn` is odd."""
    bandwidth = read_bandwidth(Pool(threads))
    samples = {}
    names = [name for name in GROUPS[group] if (work / name).exists()]
    for name in names if turn % 2 == 0 else reversed(names):
        path = work / name
        if path.suffix == ".cvxq":
            samples[name] = measure_ours(path, None if group == "demo" else threads)
        elif group == "demo":
            # Small models may do better on fewer threads, whoever runs them.
            several = [measure_theirs(path, count, peer) for count in {1, threads}]
            samples[name] = max(several, key=lambda sample: sample.decode)
        else:
            samples[name] = measure_theirs(path, threads, peer)
    return Round(group, today(), bandwidth, samples)


class Others:
    """The share of all processors' time that other processes take, from now on."""

    def __init__(self) -> None:
        self._started, self._taken = time.perf_counter(), self._seconds()

    @staticmethod
    def _seconds() -> float:
        """Seconds of work of the whole machine without that of this program and its children."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, interrupts, soft = (int(field) for field in fields[:7])
        busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(who)
            busy -= usage.ru_utime + usage.ru_stime
        return busy

    def are_quiet(self) -> bool:
        """Whether they have left us alone; says so if not."""
        elapsed = (time.perf_counter() - self._started) * (os.cpu_count() or 1)
        share = (self._seconds() - self._taken) / elapsed
        if share > MOST_OTHERS:
            say(f"thrown away: other processes took {share:.0%} of the processors")
        return share <= MOST_OTHERS


def today() -> str:
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"


class Kept:
    """Rounds and products kept in a file, those of other kernels or threads left out."""

    def __init__(self, path: Path, threads: int) -> None:
        library = find_library()
        self._key = f"{zlib.crc32(library.read_bytes()) if library else 0:08x} {threads}"
        self._path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        mine = stored if stored.get("key") == self._key else {}
        self.rounds = [
            Round(group, date, bandwidth, {name: Sample(*s) for name, s in samples.items()})
            for group, date, bandwidth, samples in mine.get("rounds", [])
        ]
        self.products = {
            depth: [Product(*product) for product in products]
            for depth, products in mine.get("products", {}).items()
        }

        self.widths: dict[str, list[float]] = mine.get("widths", {})

    def save(self) -> None:
        record = {
            "key": self._key,
            "rounds": [
                (r.group, r.date, r.bandwidth, {n: values(s) for n, s in r.samples.items()})
                for r in self.rounds
            ],
            "widths": self.widths,
            "products": {d: [values(p) for p in several] for d, several in self.products.items()},
        }
        self._path.write_text(json.dumps(record) + "\n")


def values(record: Sample | Product) -> list[float]:
    return list(asdict(record).values())


def models(work: Path, kept: Kept) -> Iterator[Model]:
    """What the page says of each model that was measured."""
    names = {name for round_ in kept.rounds for name in round_.samples}
    for name in (name for group in GROUPS.values() for name in group):
        if name in names:
            names.remove(name)
            path = work / name
            source = DEMO if name.startswith("demo") else work / "model"
            histogram = histogram_line(path) if path.suffix == ".cvxq" else ""
            config = json.loads((source / "config.json").read_text())
            size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            yield Model(name, path.stat().st_size, size // 2, histogram, config)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder of models (20 GB)")
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, "kernel"], help="only these groups")
    parser.add_argument("--rounds", type=int, default=5, help="to measure now; 0: only the page")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only make what is missing")
    parser.add_argument("--real", type=Path, help="folder of NAME-RATE.cvxq files to measure")
    parser.add_argument("--load", type=Path, help="a .cvxq file to measure while others are busy")
    parser.add_argument("--gguf", type=Path, help="of --real: folder of NAME.gguf; of --load: file")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of --real and --load")
    parser.add_argument("--tokens", type=int, default=64, help="of --real and --load")
    parser.add_argument("--output", type=Path, help="write the page here, too")
    return parser.parse_args()


def own_page(options: argparse.Namespace) -> Iterator[str]:
    """The page of files that the user has, part by part; llama.cpp is only built for comparison."""
    machine = f"{cpu_name()}, {isa()} kernels"
    peer = build(FOLDER) if options.gguf else None
    amount = Amount(options.prompt_tokens, options.tokens)
    common = (options.gguf, options.threads, options.rounds, amount, peer, machine)
    if options.load:
        yield load_page(options.load, *common)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    yield real_page(options.real, *common, options.work)
    say("products of several widths")
    widths = width_lines(measure_widths(options.threads))
    yield "\n".join(["## Widths that are no multiple of 64 or 256", "", *widths]) + "\n"
    name, files = min(
        real_models(options.real).items(), key=lambda item: item[1][-1].stat().st_size
    )
    theirs = options.gguf and options.gguf / f"{name}.gguf"
    yield load_page(files[-1], theirs, *common[1:])


def main() -> int:
    options = arguments()
    if options.real or options.load:
        text = ""
        for part in own_page(options):  # each as soon as it is there: the last takes many minutes
            print(part, flush=True)
            text += f"{part}\n"
            if options.output:
                options.output.write_text(text)
        return 0
    peer = build(FOLDER)
    chosen = options.only or [*GROUPS, "kernel"]
    options.work.mkdir(parents=True, exist_ok=True)
    for path in (options.work / name for group in chosen for name in GROUPS.get(group, ())):
        if options.prepare and not path.exists():
            make(path, peer)
        elif options.rounds and not path.exists():
            say(f"{path.name} is left out: it is missing, and made by --prepare")
    if options.prepare:
        return 0
    kept = Kept(options.work / "rounds.json", options.threads)
    if "kernel" in chosen and options.rounds:
        for depth in DEPTHS:
            say(f"products at depth {depth}")
            others = Others()
            products = list(measure_products(depth, options.threads))
            if others.are_quiet():
                kept.products[depth] = [*kept.products.get(depth, []), *products]
                kept.save()
        say("products of other widths")
        kept.widths = measure_widths(options.threads)
        kept.save()
    for turn in range(options.rounds):
        for group in (group for group in chosen if group in GROUPS):
            say(f"round {turn + 1} of {options.rounds}, group {group}")
            others = Others()
            measured = measure_round(group, options.work, options.threads, turn, peer)
            if others.are_quiet():
                kept.rounds.append(measured)
                kept.save()
    machine = f"{cpu_name()}, {options.threads} threads, {isa()} kernels"
    known = list(models(options.work, kept))
    names = {model.name for model in known}
    missing = [name for group in GROUPS.values() for name in group if name not in names]
    text = page(kept.rounds, kept.products, kept.widths, known, machine, peer.version, missing)
    print(text)
    if options.output:
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
