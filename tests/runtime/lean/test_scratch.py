"""Experts that memory does not hold: a scratch file does, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cvxq.lean import record_of, scratch
from cvxq.lean.native_decoder import NativeDecoder
from cvxq_format import Codebook, Reader, Writer
from cvxq_format.decoder_record import (
    Attention,
    DecoderRecord,
    Experts,
    FeedForward,
    Layer,
    Part,
)
from cvxq_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=cpu.why_not())

COUNT, HIDDEN, FFN = 64, 1024, 1536
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, random_companded: Callable[..., Any]) -> Path:
    """A model of one layer with 64 experts, of some 150 MB, alike but for their names."""
    path = tmp_path_factory.mktemp("experts") / "model.cvxq"
    record = DecoderRecord(
        vocabulary=64,
        hidden=HIDDEN,
        heads=4,
        kv_heads=4,
        head_dim=16,
        ffn=FFN,
        context=64,
        embedding_width=HIDDEN,
        embedding="embedding",
        head=Part("embedding"),
        layers=(
            Layer(
                Attention(*(Part(name) for name in "qkvo"), 0.1),
                FeedForward(
                    Part("experts.*.up"),
                    Part("experts.*.down"),
                    "silu",
                    Part("experts.*.gate"),
                    experts=Experts(COUNT, 2, Part("router"), "of_chosen"),
                ),
            ),
        ),
    )
    up, down = (
        random_companded(shape, 1, group_size=64, means=False, permuted=False, row_scaled=False)
        for shape in ((FFN, HIDDEN), (HIDDEN, FFN))
    )
    with Writer(path, codebooks=[Codebook.default()]) as writer:
        writer.add_file("config.json", b'{"model_type": "mixtral"}')
        writer.add_file("decoder.json", json.dumps(record.to_json()).encode())
        for name in "qkv":
            writer.add_companded(name, random_companded((64, HIDDEN), 2))
        writer.add_companded("o", random_companded((HIDDEN, 64), 3))
        writer.add_companded("embedding", random_companded((64, HIDDEN), 4))
        writer.add_companded("router", random_companded((COUNT, HIDDEN), 5))
        for expert in range(COUNT):
            writer.add_companded(f"experts.{expert}.gate", up)
            writer.add_companded(f"experts.{expert}.up", up)
            writer.add_companded(f"experts.{expert}.down", down)
    return path


LIMITED = """
import resource, sys, tempfile
import numpy as np
from cvxq.lean import record_of
from cvxq.lean.native_decoder import NativeDecoder
from cvxq_format import Reader

path, room, is_spilled = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "file"
with Reader(path) as reader, tempfile.TemporaryFile(dir=sys.argv[4]) as file:
    record = record_of(reader)
    held = 1024 * next(
        int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
    decoder = NativeDecoder(record, reader, 1, scratch=file.fileno() if is_spilled else -1)
print(np.asarray(decoder.logits(list(range(40)))).sum(dtype=float))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of data are Linux's")
def test_a_file_runs_under_a_limit_of_memory_smaller_than_it(file: Path, tmp_path: Path) -> None:
    size = file.stat().st_size
    room = 3 * size // 4  # memory is taken 64 MB at a time
    assert size > 100 * MEGABYTE

    def run(room: int, how: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", LIMITED, file, str(room), how, tmp_path]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    limited = run(room, "file")
    assert limited.returncode == 0, limited.stderr
    assert "MemoryError" in run(room, "memory").stderr
    assert limited.stdout == run(1 << 30, "memory").stdout
    assert not [*tmp_path.iterdir()]


def test_only_experts_that_memory_does_not_hold_go_to_a_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reader(file) as reader:
        record = record_of(reader)
        with scratch.scratch_for_experts(record, reader) as descriptor:
            assert descriptor == -1
        monkeypatch.setattr(scratch, "available_memory", lambda: 10 * MEGABYTE)
        with scratch.scratch_for_experts(record, reader) as descriptor:
            assert descriptor >= 0
            NativeDecoder(record, reader, 1, scratch=descriptor)
        assert [*file.parent.iterdir()] == [file]
        dense = SimpleNamespace(layers=())
        with scratch.scratch_for_experts(dense, reader) as descriptor:  # type: ignore[arg-type]
            assert descriptor == -1


def test_too_little_of_both_is_said_in_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "available_memory", lambda: 10 * MEGABYTE)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: SimpleNamespace(free=MEGABYTE))
    with (
        Reader(file) as reader,
        pytest.raises(MemoryError, match="its experts take") as caught,
        scratch.scratch_for_experts(record_of(reader), reader),
    ):
        pass
    assert len(str(caught.value).splitlines()) == 1
