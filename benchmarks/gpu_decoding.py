"""How fast one GPU decodes, beside what its memory allows, in packed form and in half precision.

Converting all of a 7B several times takes longer than a measurement should, and its layers are
alike anyway: a model of DISTINCT_LAYERS layers is converted, and its record is opened as one of all
layers.  Each layer read is a copy of its own in the GPU's memory, so every byte is read from there.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cvxq.lean import record_of
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.lean.cuda.opening import open_torch_decoder
from cvxq.lean.cuda.weights import DenseWeight
from cvxq.sample import SamplingSettings
from cvxq_format import Reader

DISTINCT_LAYERS = 2


def open_repeated(path: Path, layers: int, device: str, keep_packed: bool) -> TorchDecoder:
    """Open the converted file as a model of `layers` layers.

    Raises ValueError where a GPU is to keep matrices packed and does not.
    """
    with Reader(path) as reader:
        record, config = record_of(reader), json.loads(reader.file("config.json"))
        own = record.layers
        record = replace(record, layers=tuple(own[i % len(own)] for i in range(layers)))
        decoder = open_torch_decoder(record, reader, device, config, keep_packed)
    weights = decoder.network.weights.multiplied()
    dense = sum(isinstance(weight, DenseWeight) for weight in weights)
    if dense and keep_packed and decoder.network.device.type == "cuda":
        raise ValueError(
            f"{dense} of {len(weights)} matrices were expanded; all are to stay packed"
        )
    return decoder


@dataclass(frozen=True)
class Decoding:
    """Figures of one way to decode at batch 1; bytes are of the GPU's memory.

    read_bytes: weights, and keys and values at the mean length, that one token reads; held_bytes:
    weights and the cache; load_seconds: from the file to the GPU, NaN where nothing was loaded.
    """

    name: str
    tokens_per_second: float
    deviation: float
    prefill_tokens_per_second: float
    read_bytes: float
    held_bytes: float
    peak_bytes: float
    load_seconds: float

    def share(self, copy_bandwidth: float) -> float:
        """The share of the speed that reading at `copy_bandwidth`, bytes/s, would allow."""
        return self.tokens_per_second * self.read_bytes / copy_bandwidth


@dataclass(frozen=True)
class Setting:
    """Tokens of the prompt, tokens decoded, and how often both are repeated."""

    prompt: int
    tokens: int
    repeats: int


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes per second, read plus written, of the fastest of ten copies of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / min(_timed(lambda: target.copy_(source), device) for _ in range(10))


def measure_lean(
    name: str, load: Callable[[], TorchDecoder], setting: Setting, device: str
) -> Decoding:
    """Measure the decoder that `load` makes."""
    reset_peak(device)
    begin = time.perf_counter()
    decoder = load()
    synchronize(device)
    loaded = time.perf_counter() - begin
    prompt = _prompt(decoder.vocabulary, setting.prompt)
    rounds = []
    for _ in range(setting.repeats + 1):  # the first one compiles and captures
        decoder.rewind(0)
        begin = time.perf_counter()
        decoder.feed(prompt)
        tokens = decoder.draw(SamplingSettings(temperature=0, max_tokens=setting.tokens), prompt)
        next(tokens)
        middle = time.perf_counter()
        for _ in range(setting.tokens - 1):
            next(tokens)
        rounds.append((middle - begin, time.perf_counter() - middle))
    per_token = decoder.cache.nbytes / decoder.cache.places
    weights = decoder.network.weights
    return _decoding(
        name,
        rounds[1:],
        setting,
        decoder.bytes_per_token + per_token * (setting.prompt + setting.tokens / 2),
        weights.matrix_bytes() + decoder.cache.nbytes,
        device,
        loaded,
    )


def measure_transformers(config: dict[str, Any], setting: Setting, device: str) -> Decoding:
    """Measure the network of `config` in transformers, random float16 weights, dynamic cache."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    reset_peak(device)
    dtype = torch.float16 if device != "cpu" else torch.float32
    settings = AutoConfig.for_model(**config)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    prompt = torch.tensor([_prompt(config["vocab_size"], setting.prompt)], device=device)
    rounds = []
    with torch.inference_mode():
        for _ in range(setting.repeats + 1):
            cache = DynamicCache()
            begin = time.perf_counter()
            logits = network(prompt, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
            synchronize(device)
            middle = time.perf_counter()
            for _ in range(setting.tokens - 1):
                token = network(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            synchronize(device)
            rounds.append((middle - begin, time.perf_counter() - middle))
    held = sum(parameter.nbytes for parameter in network.parameters())
    embedding = network.get_input_embeddings().weight.nbytes
    kv_heads = config["num_key_value_heads"]
    head = config["hidden_size"] // config["num_attention_heads"]
    per_token = 2 * config["num_hidden_layers"] * kv_heads * head * dtype.itemsize
    cached = per_token * (setting.prompt + setting.tokens / 2)
    name = f"{str(dtype).removeprefix('torch.')}, transformers"
    read = held - embedding + cached
    return _decoding(name, rounds[1:], setting, read, held + cached, device, float("nan"))


def _decoding(
    name: str,
    rounds: list[tuple[float, float]],
    setting: Setting,
    read_bytes: float,
    held_bytes: float,
    device: str,
    load_seconds: float,
) -> Decoding:
    speeds = [(setting.tokens - 1) / decode for _, decode in rounds]
    return Decoding(
        name=name,
        tokens_per_second=statistics.fmean(speeds),
        deviation=statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        prefill_tokens_per_second=statistics.fmean(setting.prompt / first for first, _ in rounds),
        read_bytes=read_bytes,
        held_bytes=held_bytes,
        peak_bytes=torch.cuda.max_memory_allocated() if device != "cpu" else float("nan"),
        load_seconds=load_seconds,
    )


def _prompt(vocabulary: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def reset_peak(device: str) -> None:
    """Give unused memory back and forget the peak so far."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: str) -> None:
    """Wait until the device has done all that was launched."""
    if device != "cpu":
        torch.cuda.synchronize()


def _timed(action: Callable[[], object], device: str) -> float:
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin
