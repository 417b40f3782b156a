"""Train the demo model: a small Llama that writes English prose.

    python demo/train.py --text novels.txt.gz [--text more.txt] --out demo/model

The text is cleaned (hard-wrapped lines joined), a SentencePiece vocabulary is trained on it,
and a Llama of about 2.5 M parameters reads at least 12 tokens per parameter, with the learning
rate decayed to zero. Written to `--out`: a Hugging Face folder (model.safetensors, config.json,
tokenizer.model, ...) and training.json, the record of the run: loss curve, tokens per parameter,
epochs, held-out loss.

Every width is a multiple of 256, so that the quantizer sees the shapes of larger models in
miniature. Runs on a GPU when there is one, else on the CPU (about an hour on two cores).
"""

import argparse
import gzip
import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

CONTEXT = 512
PASSAGE_CHARACTERS = 6000  # a training document: whole paragraphs up to about this length
HELD_OUT_EVERY = 100  # every hundredth passage is held out


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")


def clean(text: str) -> list[str]:
    """Paragraphs of `text`: blank lines separate them, single line breaks become spaces."""
    text = text.replace("\r\n", "\n").replace("\u00a0", " ")
    paragraphs = re.split(r"\n[ \t]*\n+", text)
    return [joined for p in paragraphs if (joined := re.sub(r"\s+", " ", p).strip())]


def passages(paragraphs: list[str]) -> list[str]:
    """Consecutive paragraphs, one per line, gathered into documents of similar length."""
    out: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in paragraphs:
        current.append(paragraph)
        size += len(paragraph) + 1
        if size >= PASSAGE_CHARACTERS:
            out.append("\n".join(current))
            current, size = [], 0
    if current:
        out.append("\n".join(current))
    return out


def train_tokenizer(documents: list[str], vocabulary: int, folder: Path) -> LlamaTokenizer:
    """Train a byte-fallback BPE vocabulary and save it as a Llama tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for d in documents for line in d.split("\n")),
        model_writer=model,
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9999,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
                "legacy": False,
                "model_max_length": CONTEXT,
            },
            indent=1,
        )
        + "\n"
    )
    return LlamaTokenizer.from_pretrained(folder)


def encode(folder: Path, documents: list[str]) -> np.ndarray:
    """All documents as one stream of token ids, each as BOS ... EOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = processor.encode(documents, add_bos=True, add_eos=True)
    return np.concatenate([np.asarray(i, dtype=np.uint16) for i in ids])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def held_out_loss(model: Any, stream: np.ndarray, device: str) -> float:
    """Mean negative log-likelihood per token over non-overlapping windows of the context."""
    model.eval()
    windows = [stream[i : i + CONTEXT] for i in range(0, len(stream) - CONTEXT, CONTEXT)]
    total = 0.0
    for i in range(0, len(windows), 16):
        batch = torch.from_numpy(np.stack(windows[i : i + 16]).astype(np.int64)).to(device)
        total += float(model(batch, labels=batch).loss) * len(batch)
    model.train()
    return total / len(windows)


def train(
    model: Any,
    stream: np.ndarray,
    held_out: np.ndarray,
    tokens: int,
    args: argparse.Namespace,
    device: str,
) -> list[dict[str, float]]:
    """Train on random windows drawn without replacement per epoch; return the loss curve."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    forward = torch.compile(model) if args.compile else model
    steps = math.ceil(tokens / (args.batch * CONTEXT))
    rng = np.random.default_rng(args.seed)
    order: list[int] = []
    curve = []
    started = time.time()
    running = 0.0
    for step in range(steps):
        if len(order) < args.batch:  # a new epoch, its windows starting at a random offset
            offset = int(rng.integers(CONTEXT))
            order = (
                rng.permutation((len(stream) - offset) // CONTEXT - 1) * CONTEXT + offset
            ).tolist()
        starts = [order.pop() for _ in range(args.batch)]
        batch = np.stack([stream[s : s + CONTEXT] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(batch).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.learning_rate)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            point = {
                "step": step + 1,
                "tokens": (step + 1) * args.batch * CONTEXT,
                "train_loss": round(running / (step % 50 + 1), 4),
            }
            running = 0.0
            if (step + 1) % 500 == 0 or step + 1 == steps:
                point["held_out_loss"] = round(held_out_loss(model, held_out, device), 4)
            curve.append(point)
            remaining = (time.time() - started) / (step + 1) * (steps - step - 1)
            print(json.dumps(point), f"{remaining / 60:.1f} min left", flush=True)
            if args.stop_after and step + 1 >= args.stop_after:
                break
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens-per-parameter", type=float, default=12.2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--stop-after", type=int, default=0, help="stop after this many steps")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    documents = [d for path in args.text for d in passages(clean(read_text(path)))]
    training = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(training, args.vocabulary, args.out)
    stream = encode(args.out, training)
    held_out = encode(args.out, [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY == 0])

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = int(parameters * args.tokens_per_parameter)
    print(
        f"{parameters:,} parameters, {len(stream):,} tokens of text, {tokens:,} to read", flush=True
    )
    started = time.time()
    curve = train(model, stream, held_out, tokens, args, device)
    minutes = (time.time() - started) / 60

    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(args.out)
    record = {
        "parameters": parameters,
        "tokens_read": curve[-1]["tokens"],
        "tokens_per_parameter": round(curve[-1]["tokens"] / parameters, 2),
        "epochs": round(curve[-1]["tokens"] / len(stream), 2),
        "text_tokens": len(stream),
        "held_out_tokens": len(held_out),
        "held_out_loss": held_out_loss(model.to(torch.float32), held_out, device),
        "minutes": round(minutes, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "options": {k: v for k, v in vars(args).items() if k not in ("text", "out")},
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
