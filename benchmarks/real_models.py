"""What real, trained models become: size, loss, speed, and what they say, one table for each.

    python benchmarks/real_models.py --models FOLDER --text wiki.test.raw --output page.md

FOLDER holds Hugging Face folders, one a model; `--model` names a folder or hub id instead. Each is
converted (kept in `--work` for the next run) and measured by the command line that users have:
`cvxq perplexity --against` the original on the beginning of a text, `cvxq bench`, and the time
until `cvxq generate` has written its first token. Then five prompts are continued greedily, by the
original through transformers and by the file, and a copy whose config.json has fields that nobody
knows is converted to see that it takes the same path. `--gguf FOLDER` holds NAME.gguf files:
llama.cpp runs those beside the files, in turn (peers/llamacpp.py builds it).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cvxq
import numpy as np
import torch
from cvxq.generate import generate_tokens
from cvxq.lean import Decoder, open_exact, open_native, record_of
from cvxq.lean.session import LeanSession
from cvxq.sample import SamplingSettings
from cvxq_format import Reader
from huggingface_hub import snapshot_download
from packing import cpu_name
from peers.llamacpp import build
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

WORK = Path.home() / ".cache" / "cvxq-peers" / "real"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8, 13,",
)
UNKNOWN = {"_name_of_nobody": "x", "unknown_scale": 3.5, "unknown_table": {"rope_theta": [1, 2]}}
TOKENS = 64  # of each continuation
CHARACTERS = 16_000  # of the text that the loss is measured on
PROMPT, GENERATED, ROUNDS = 128, 64, 3


def say(text: str) -> None:
    print(f"real models: {text}", file=sys.stderr, flush=True)


def run(*words: object) -> str:
    """Run a command and return what it printed; it ends this program if it fails."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise SystemExit(f"real models: {' '.join(map(str, words[:4]))} … failed: {said}")
    return done.stdout


def command(*words: object) -> str:
    return run(sys.executable, "-m", "cvxq.cli", *words)


def convert(model: str, file: Path, bits: float, options: Sequence[str]) -> None:
    """Convert unless that was done before; the report stays beside the file."""
    if file.exists():
        return
    say(f"converting {model} to {bits:g} bits")
    file.parent.mkdir(parents=True, exist_ok=True)
    command("convert", model, "-o", file, "--bits", bits, *options)


def first_text_seconds(file: Path) -> float:
    """Seconds from the start of `cvxq generate` to its first byte of text, from a warm cache."""
    command = [sys.executable, "-m", "cvxq.cli", "generate", str(file), PROMPTS[0]]
    command += ["--max-tokens", "8", "--temperature", "0"]
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            child.stdout.read(1)
            found.append(time.perf_counter() - started)
    return min(found)


def original_continuations(model: str) -> list[str]:
    """What transformers continues the prompts with, greedily, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    said = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = network.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return said


def continuations(file: Path) -> list[str]:
    """What the file continues the prompts with, greedily, as users run it."""
    options = ("--max-tokens", TOKENS, "--temperature", 0)
    return [command("generate", file, prompt, *options).rstrip("\n") for prompt in PROMPTS]


@torch.inference_mode()
def greedy_rows(file: Path, threads: int) -> list[tuple[str, str]]:
    """Compare packed weights with the same weights dense, run by transformers in float32.

    The decoder that runs rounds activations to 8 bits, so where two tokens are nearly as likely it
    may take the other one, and goes on from there; the one that computes in float32 may not.
    """
    settings = SamplingSettings(temperature=0, max_tokens=TOKENS)
    with cvxq.load(file, weights="dense") as dense, Reader(file) as reader:
        record, network, ends = record_of(reader), dense.network, dense.end_ids
        texts = [dense.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        expected = [list(generate_tokens(dense.session(), t, settings, ends)) for t in texts]
        logits = [dense_logits(network, t, e) for t, e in zip(texts, expected, strict=True)]

        def drawn(decoder: Decoder) -> list[list[int]]:
            sessions = (LeanSession(decoder) for _ in texts)
            pairs = zip(sessions, texts, strict=True)
            return [list(generate_tokens(s, t, settings, ends)) for s, t in pairs]

        exact = drawn(open_exact(record, reader, threads))
        usual = drawn(open_native(record, reader, threads))
    same = sum(a == b for a, b in zip(exact, expected, strict=True))
    gaps = [gap_at_first_difference(*case) for case in zip(usual, expected, logits, strict=True)]
    tipped = [f"{gap:.3f}" for gap in gaps if gap is not None]
    text = f"{len(gaps) - len(tipped)} of {len(gaps)} prompts"
    if tipped:
        text += f"; logits of the two tokens at the first difference: {', '.join(tipped)} apart"
    return [
        (f"greedy {TOKENS} tokens, packed in float32 = dense", f"{same} of {len(exact)} prompts"),
        (f"greedy {TOKENS} tokens, packed as it runs = dense", text),
    ]


def dense_logits(
    network: PreTrainedModel, text: list[int], following: list[int]
) -> list[np.ndarray]:
    """The logits (V,) that each token of `following` was chosen by."""
    rows = network(torch.tensor([text + following])).logits[0, len(text) - 1 : -1]
    return list(rows.float().numpy())


def gap_at_first_difference(
    found: list[int], expected: list[int], logits: list[np.ndarray]
) -> float | None:
    """How far apart the dense logits of the first two tokens that differ are; None if none do."""
    for ours, theirs, row in zip(found, expected, logits, strict=False):
        if ours != theirs:
            return float(row[theirs] - row[ours])
    return None


def path_with_unknown_fields(model: str) -> str:
    """The path of the same model with fields in config.json that nobody knows."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        copy.mkdir()
        source = Path(model)
        if not source.is_dir():
            source = Path(snapshot_download(model, local_files_only=True))
        for path in source.iterdir():
            (copy / path.name).symlink_to(path.resolve())
        config = json.loads((copy / "config.json").read_text("utf-8"))
        (copy / "config.json").unlink()
        (copy / "config.json").write_text(json.dumps(config | UNKNOWN), "utf-8")
        file = Path(folder) / "model.cvxq"
        options = ("--bits", 4, "--method", "rtn", "--calibration", "none")
        once = ("--prompt-tokens", 2, "--tokens", 2, "--repeats", 1)
        command("convert", copy, "-o", file, *options)
        return str(json.loads(command("bench", file, *once).splitlines()[-1])["path"])


def speeds(file: Path, gguf: Path | None, threads: int) -> tuple[dict[str, Any], dict[str, float]]:
    """`cvxq bench` (the median round by decoding), and llama.cpp's tokens/s, measured in turn."""
    amounts = ("--prompt-tokens", PROMPT, "--tokens", GENERATED, "--threads", threads)
    theirs_amounts = ("-t", threads, "-p", PROMPT, "-n", GENERATED, "-o", "json")
    ours: list[dict[str, Any]] = []
    theirs: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(ROUNDS):
        ours.append(json.loads(command("bench", file, *amounts).splitlines()[-1]))
        if gguf is not None:
            said = run(build().tool("llama-bench"), "-m", gguf, *theirs_amounts)
            for row in json.loads(said):
                theirs["decode" if row["n_gen"] else "prefill"].append(row["avg_ts"])
    ours.sort(key=lambda r: float(r["decode_tokens_per_second"]["mean"]))
    return ours[len(ours) // 2], {k: statistics.median(v) for k, v in theirs.items() if v}


def table(model: str, file: Path, text: Path, gguf: Path | None, threads: int) -> str:
    """Measure one model and return its part of the page."""
    say(f"measuring {file.name}")
    described = json.loads(command("inspect", file, "--json"))
    loss = json.loads(
        command("perplexity", file, "--text", text, "--context", 512, "--against", model, "--json")
    )
    bench, peer = speeds(file, gguf, threads)
    original, packed = original_continuations(model), continuations(file)
    rows = [
        ("file", f"{described['file_bytes']:,} bytes, {described['parameters']:,} parameters"),
        ("rate, all matrices", f"{described['rate_bits_per_weight']:.3f} bits per weight"),
        ("perplexity", f"{loss['perplexity']['mean']:.2f} ± "
         f"{loss['perplexity']['standard_error']:.2f}, original "
         f"{loss['original_perplexity']['mean']:.2f}"),
        ("KL to the original", f"{loss['kl']['mean']:.4f} ± {loss['kl']['standard_error']:.4f}"),
        ("path", f"{bench['path']}, {bench['threads']} threads"),
        ("decoding", f"{bench['decode_tokens_per_second']['mean']:.1f} tokens/s"
         + (f", llama.cpp {peer['decode']:.1f}" if peer else "")),
        ("prefill", f"{bench['prefill_tokens_per_second']['mean']:.0f} tokens/s"
         + (f", llama.cpp {peer['prefill']:.0f}" if peer else "")),
        ("loading", f"{bench['load_seconds']:.2f} s"),
        ("memory at the peak", f"{bench['peak_memory_bytes'] / 1e6:.0f} MB"),
        ("first text", f"{first_text_seconds(file):.2f} s"),
        *greedy_rows(file, threads),
        ("path with unknown fields in config.json", path_with_unknown_fields(model)),
    ]  # fmt: skip
    lines = [f"## {Path(model).name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    for prompt, before, after in zip(PROMPTS, original, packed, strict=True):
        lines += ["", f"> {quoted(prompt)} …", "", f"- original: {quoted(before)}"]
        lines += [f"- file: {quoted(after)}"]
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A text on one line of Markdown, as code."""
    return "`" + text.replace("`", "'").replace("\n", "⏎") + "`"


def head(args: argparse.Namespace) -> str:
    """The page's first lines: how it was made, where and when."""
    words = ["python benchmarks/real_models.py --models FOLDER --text", args.text.name]
    words += ["--gguf FOLDER"] if args.gguf else []
    words += [f"--convert={option}" for option in args.convert]
    return (
        f"# Real models\n\nMade by\n\n```sh\n{' '.join(words)}\n```\n\n"
        f"on {cpu_name()}, {args.threads} threads, {datetime.date.today()}. Perplexity and KL "
        f"(nats per token) are on the first {CHARACTERS:,} characters of {args.text.name} in "
        "windows of 512 tokens, each with a start token where the model has one."
    )


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--models", type=Path, help="folder of model folders")
    parser.add_argument("--model", action="append", default=[], help="folder or hub id")
    parser.add_argument("--text", type=Path, required=True, help="docs/text.md says where from")
    parser.add_argument("--gguf", type=Path, help="folder of NAME.gguf files to run beside")
    parser.add_argument("--bits", type=float, default=4.25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=WORK, help="keep the files here")
    parser.add_argument("--convert", action="append", default=[], help="an option of cvxq convert")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    folders = sorted(args.models.iterdir()) if args.models else []
    models = [str(f) for f in folders if (f / "config.json").is_file()] + args.model
    parts = [head(args)]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / args.text.name
        text.write_text(args.text.read_text("utf-8")[:CHARACTERS], "utf-8")
        for model in models:
            name = Path(model).name
            file = args.work / f"{name}-{args.bits:g}.cvxq"
            convert(model, file, args.bits, args.convert)
            gguf = args.gguf / f"{name}.gguf" if args.gguf else None
            parts.append(table(model, file, text, gguf, args.threads))
            print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
