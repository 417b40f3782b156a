"""Reproduce the papers' OPT-125M cell: WikiText-2 perplexity at 3.00 bits, context 2048.

    python benchmarks/opt125m.py --model facebook/opt-125m --text wikitext2-test.txt
    python benchmarks/opt125m.py --smoke

`--model` is a folder or a hub id, `--text` the raw test set laid out as docs/text.md says. Four
rows come out:

1. the original in 16 bits;
2. the linear layers at 3.00 bits with all their side information, embeddings left in 16 bits:
   the matrices that published tables quantize;
3. the same with 3.00 bits of *codes*, side information on top: the papers' way of counting;
4. every matrix at 3.00 bits all in, the token embeddings (a third of this model) included.

`--smoke` runs the same steps on a random OPT of two layers and a text made here, in seconds; its
perplexities mean nothing. The last line of the output is the table as JSON.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from cvxq import evaluate
from cvxq.cli.subject import load_subject
from cvxq_converter.errors import ConversionError
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions, Method

EMBEDDINGS = ("*embed_tokens*",)  # and with it the output head, which is tied to it
PUBLISHED = (
    ("fp16", "16", 27.65),
    ("Radio", "3.00 + side information", 28.14),
    ("OmniQuant, group 128", "3.25", 32.25),
    ("OmniQuant", "3.00", 35.66),
    ("GPTQ, group 128", "3.25", 39.24),
    ("GPTQ", "3.00", 53.05),
)
PUBLISHED_ORIGINAL = 27.65
LAYOUT_TOLERANCE = 0.1  # perplexity; a text joined in another way is off by more


@dataclass(frozen=True)
class Row:
    """One line of the table; rates in bits per weight of the quantized matrices."""

    name: str
    perplexity: float
    standard_error: float
    rate_all_in: float = 16.0
    rate_codes: float = 16.0
    file_bits_per_parameter: float = 16.0
    convert_seconds: float = 0.0


def show_progress(stage: str, done: int, total: int) -> None:
    print(f"\r  {stage} {done}/{total}    ", end="", file=sys.stderr, flush=True)


def announce(estimate: str) -> None:
    print(f"\r  {estimate}", file=sys.stderr)


def measure(source: str, text: str, context: int, device: str) -> evaluate.PerplexityResult:
    """Perplexity over non-overlapping windows of `context` tokens."""
    subject = load_subject(source, device=device)
    windows = evaluate.windows(evaluate.token_ids(subject.read_tokenizer(), text), context)
    return evaluate.perplexity(subject.network, windows, show_progress)


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    model: str
    text: str
    context: int
    folder: Path
    options: ConversionOptions

    def original(self) -> Row:
        result = measure(self.model, self.text, self.context, self.options.place.device)
        return Row("original", result.perplexity, result.standard_error)

    def converted(self, name: str, bits: float, keep: tuple[str, ...]) -> Row:
        """Convert at `bits` per weight, side information included, and measure the file."""
        file = self.folder / "opt125m-{}.cvxq".format(name.replace(", ", "-").replace(" ", "-"))
        started = time.perf_counter()
        options = self.options.having(bits=bits, keep=keep)
        report = convert(self.model, file, options, show_progress, announce)
        seconds = time.perf_counter() - started
        result = measure(str(file), self.text, self.context, self.options.place.device)
        return Row(
            name,
            result.perplexity,
            result.standard_error,
            report.rate_bits_per_weight,
            report.rate_bits_per_weight - report.side_bits_per_weight,
            report.file_bits_per_parameter,
            seconds,
        )


def run(bench: Bench, bits: float, show: Callable[[Row], None]) -> list[Row]:
    rows = [bench.original()]
    show(rows[0])
    rows.append(bench.converted("linear layers, all in", bits, EMBEDDINGS))
    show(rows[1])
    side = rows[1].rate_all_in - rows[1].rate_codes
    rows.append(bench.converted("linear layers, codes only", bits + side, EMBEDDINGS))
    show(rows[2])
    rows.append(bench.converted("every matrix, all in", bits, ()))
    show(rows[3])
    return rows


def print_row(row: Row) -> None:
    print("\r", end="", file=sys.stderr)
    print(
        f"{row.name:<27}{row.rate_all_in:>8.3f}{row.rate_codes:>8.3f}"
        f"{row.file_bits_per_parameter:>8.3f}{row.perplexity:>11.2f} ± {row.standard_error:<7.2f}"
        f"{row.convert_seconds:>8.0f} s",
        flush=True,
    )


def print_published() -> None:
    print("\nPublished, linear layers only:")
    for name, rate, value in PUBLISHED:
        print(f"{name:<27}{rate:>24}{value:>11.2f}")


def make_smoke_model(folder: Path) -> str:
    """Write a random OPT of two layers with a byte tokenizer to `folder`; returns a text for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    symbols = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(symbols),
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    words = ["one", "small", "house", "by", "the", "wide", "grey", "sea", "and", "no", "boat"]
    return " ".join(random.Random(0).choices(words, k=200))


def read_text(path: Path) -> str:
    """The text, or a ConversionError that says what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConversionError(
            f"{path}: {error.strerror}; docs/text.md says how to get WikiText-2"
        ) from None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 at byte {error.start}") from None
    if "<unk>" in text:
        raise ConversionError(
            f"{path}: has <unk> in it, so it is not the raw set; see docs/text.md for that one"
        )
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="folder or hub id, such as facebook/opt-125m")
    parser.add_argument("--text", type=Path, help="WikiText-2 raw test set (docs/text.md)")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--calibration", default="self", help="self, none or a text file")
    parser.add_argument("--iterations", type=int, default=Method.iterations)
    parser.add_argument("--group-size", type=int, default=Method.group_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="keep the .cvxq files in this folder")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    args = parser.parse_args()
    if not args.smoke and (args.model is None or args.text is None):
        parser.error("--model and --text are needed (or --smoke)")
    return args


def prepare(args: argparse.Namespace, scratch: Path) -> Bench:
    """Turn the arguments into what the rows share; --smoke makes its model in `scratch`."""
    model, context, length = args.model, args.context, args.context
    if args.smoke:
        text = make_smoke_model(scratch / "opt")
        model, context, length = str(scratch / "opt"), 64, 32
    else:
        text = read_text(args.text)
    folder = args.out or scratch
    folder.mkdir(parents=True, exist_ok=True)
    sequences = 4 if args.smoke else args.sequences
    options = ConversionOptions.of(
        bits=args.bits,
        calibration=args.calibration,
        sequences=sequences,
        length=length,
        iterations=args.iterations,
        group_size=args.group_size,
        seed=args.seed,
        device=args.device,
    )
    return Bench(model, text, context, folder, options)


def main() -> int:
    args = arguments()
    transformers.utils.logging.disable_progress_bar()  # ours is one line
    with tempfile.TemporaryDirectory() as scratch:
        try:
            bench = prepare(args, Path(scratch))
            print(f"{'':<27}{'all in':>8}{'codes':>8}{'file':>8}{'perplexity':>11}{'convert':>20}")
            rows = run(bench, args.bits, print_row)
        except (ConversionError, ValueError, OSError) as error:
            print(f"opt125m: {error}", file=sys.stderr)
            return 1
    if not args.smoke:
        print_published()
        off = rows[0].perplexity - PUBLISHED_ORIGINAL
        if args.context == 2048 and abs(off) > LAYOUT_TOLERANCE:
            print(
                f"\nThe original is at {rows[0].perplexity:.2f}, published {PUBLISHED_ORIGINAL}: "
                "another model, or a text joined in another way (docs/text.md)."
            )
    record: dict[str, Any] = {"smoke": args.smoke, "bits": args.bits, "context": bench.context}
    print(json.dumps(record | {"rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
