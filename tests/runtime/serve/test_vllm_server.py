"""vLLM's own server on a bare file, asked by its own clients' means."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cvxq
import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.usefixtures("one_thread"),
]
PORT = 18_217
EXACT = {"quantization_config": {"quant_method": "cvxq", "exact": True}}
STARTS = 1200  # seconds, on a busy machine
CLIENTS = 16


def ask(path: str, body: dict[str, Any] | None = None) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())


def complete(prompt: str) -> str:
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    return str(json.loads(ask("/v1/completions", options))["choices"][0]["text"])


@pytest.fixture
def file(make_file: Callable[..., Any], tokenizer_parts: dict[str, bytes]) -> Path:
    """A Llama with heads that vLLM can attend with."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    config = {"architectures": ["LlamaForCausalLM"]}
    made = make_file("llama", "tiny.cvxq", config=config, files=tokenizer_parts, sizes=sizes)
    path: Path = made.path
    return path


@pytest.fixture
def log(file: Path, tmp_path: Path) -> Iterator[Path]:
    """Run the server; give the file that its messages go to."""
    told = tmp_path / "log"
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(file), "--port", str(PORT)]
    words += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    words += ["--kv-cache-memory-bytes", str(64 << 20), "--hf-overrides", json.dumps(EXACT)]
    with told.open("w") as output:
        server = subprocess.Popen([sys.executable, *words], stdout=output, stderr=output)
    try:
        limit = time.monotonic() + STARTS
        while True:
            assert server.poll() is None, told.read_text()[-4000:]
            assert time.monotonic() < limit, told.read_text()[-4000:]
            try:
                ask("/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield told
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_sixteen_clients_get_what_each_would_alone(log: Path, file: Path) -> None:
    assert [model["id"] for model in json.loads(ask("/v1/models"))["data"]] == ["tiny"]
    prompts = [f"{chr(97 + i)}b c{chr(98 + i)} d" for i in range(CLIENTS)]
    alone = [complete(prompt) for prompt in prompts]
    assert len({*alone}) > 1
    with cvxq.load(file, weights="dense") as model:
        settings = cvxq.SamplingSettings(temperature=0, max_tokens=24)
        assert alone == [model.generate(prompt, settings).text for prompt in prompts]
    with ThreadPoolExecutor(CLIENTS) as clients:
        together = [*clients.map(complete, prompts)]
    assert together == alone
    steps = re.search(r"iteration_tokens_total_count\{[^}]*\} ([\d.]+)", ask("/metrics"))
    assert steps is not None
    assert float(steps[1]) < 1.5 * 24 * CLIENTS  # twice as many tokens: together they shared steps
