"""What real, trained models become: size, loss, speed, and what they say, one table for each.

    python benchmarks/real_models.py --models FOLDER --text wiki.test.raw --output page.md

FOLDER holds Hugging Face folders, one a model; `--model` names a folder or hub id instead. Each is
converted (kept in `--work` for the next run) and measured by the command line that users have:
`cvxq perplexity --against` the original on the beginning of a text, `cvxq bench`, and the time
until `cvxq generate` has written its first token. Then five prompts are continued greedily, by the
original through transformers and by the file. `--gguf FOLDER` holds NAME.gguf files: llama.cpp runs
those beside the files, in turn (peers/llamacpp.py builds it).
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

import torch
from packing import cpu_name
from peers.llamacpp import build
from transformers import AutoModelForCausalLM, AutoTokenizer

WORK = Path.home() / ".cache" / "cvxq-peers" / "real"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8, 13,",
)
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


def cvxq(*words: object) -> str:
    return run(sys.executable, "-m", "cvxq.cli", *words)


def convert(model: str, file: Path, bits: float, options: Sequence[str]) -> None:
    """Convert unless that was done before; the report stays beside the file."""
    if file.exists():
        return
    say(f"converting {model} to {bits:g} bits")
    file.parent.mkdir(parents=True, exist_ok=True)
    cvxq("convert", model, "-o", file, "--bits", bits, *options)


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


def continuations(file: Path, weights: str) -> list[str]:
    options = ("--max-tokens", TOKENS, "--temperature", 0, "--weights", weights)
    return [cvxq("generate", file, prompt, *options).rstrip("\n") for prompt in PROMPTS]


def speeds(file: Path, gguf: Path | None, threads: int) -> tuple[dict[str, Any], dict[str, float]]:
    """`cvxq bench` (the median round by decoding), and llama.cpp's tokens/s, measured in turn."""
    amounts = ("--prompt-tokens", PROMPT, "--tokens", GENERATED, "--threads", threads)
    theirs_amounts = ("-t", threads, "-p", PROMPT, "-n", GENERATED, "-o", "json")
    ours: list[dict[str, Any]] = []
    theirs: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(ROUNDS):
        ours.append(json.loads(cvxq("bench", file, *amounts).splitlines()[-1]))
        if gguf is not None:
            said = run(build().tool("llama-bench"), "-m", gguf, *theirs_amounts)
            for row in json.loads(said):
                theirs["decode" if row["n_gen"] else "prefill"].append(row["avg_ts"])
    ours.sort(key=lambda r: float(r["decode_tokens_per_second"]["mean"]))
    return ours[len(ours) // 2], {k: statistics.median(v) for k, v in theirs.items() if v}


def table(model: str, file: Path, text: Path, gguf: Path | None, threads: int) -> str:
    """Measure one model and return its part of the page."""
    say(f"measuring {file.name}")
    described = json.loads(cvxq("inspect", file, "--json"))
    loss = json.loads(
        cvxq("perplexity", file, "--text", text, "--context", 512, "--against", model, "--json")
    )
    bench, peer = speeds(file, gguf, threads)
    original, packed = original_continuations(model), continuations(file, "packed")
    same = packed == continuations(file, "dense")
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
        (f"greedy {TOKENS} tokens, packed = dense", "yes" if same else "no"),
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
        "windows of 512 tokens."
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
