"""Estimates before the work, and the refusal of what cannot fit."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cvxq_converter.amounts as module
import pytest
import torch
from cvxq_converter.amounts import calibration_amount, tuning_steps
from cvxq_converter.costs import Speed, measure_speed
from cvxq_converter.errors import ConversionError
from cvxq_converter.options import Calibration, ConversionOptions, Place
from cvxq_converter.preflight import (
    Preflight,
    available_memory,
    preflight,
    refuse_what_cannot_fit,
)
from cvxq_converter.shapes import shape_of
from cvxq_converter.source.checkpoint import open_source
from transformers import LlamaConfig, Qwen3MoeConfig

LAPTOP = Speed(flops=1e11, elements=1e9, call_seconds=5e-6)


def llama(layers: int, hidden: int, context: int = 4096) -> Any:
    """A checkpoint of that size as far as shapes go."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        vocab_size=32000,
        num_attention_heads=hidden // 64,
        max_position_embeddings=context,
    )
    blocks = {
        f"{i}.{j}": SimpleNamespace(shape=(hidden, hidden)) for i in range(layers) for j in range(4)
    }
    blocks |= {
        f"{i}.mlp{j}": SimpleNamespace(shape=(4 * hidden, hidden))
        for i in range(layers)
        for j in range(3)
    }
    tensors = blocks | {name: SimpleNamespace(shape=(32000, hidden)) for name in ("embed", "head")}
    return SimpleNamespace(
        config=config,
        tensors=tensors,
        parameters=sum(info.shape[0] * info.shape[1] for info in tensors.values()),
        weight_files=(),
        carried=dict,
        has_names_of_network=False,
        scales={},
        mxfp4={},
    )


ONE_BILLION = llama(14, 2048)
SEVEN_BILLION = llama(26, 4096)


def plan_for(source: Any, **options: Any) -> Preflight:
    speed = options.pop("speed", LAPTOP)
    target = {} if {"size_bytes", "max_kl"} & options.keys() else {"bits": 4.0}
    return preflight(source, ConversionOptions.of(**{**target, **options}), speed=speed)


def test_line_names_time_memory_and_disk() -> None:
    line = Preflight(372.0, 3_400_000_000, 512_000_000, 32, 512).line()
    assert line == ("about 6 min, 3.4 GB of memory, 512 MB on disk (calibration 32 × 512 tokens)")
    assert Preflight(3, 5e8, 9000, 0, 0).line().endswith("9 kB on disk (no calibration)")
    assert Preflight(9000, 5e8, 9000, 0, 0).line().startswith("about 2.5 h,")


def test_disk_follows_the_rate(save_network: Any) -> None:
    source = open_source(str(save_network("llama")))
    sizes = [plan_for(source, bits=bits).disk_bytes for bits in (2.0, 4.0)]
    weights = sum(i.shape[0] * i.shape[1] for i in source.tensors.values() if len(i.shape) == 2)
    assert sizes[1] - sizes[0] == pytest.approx(weights * 2 / 8, abs=2)


def test_costs_grow_with_the_work() -> None:
    base = plan_for(ONE_BILLION, sequences=16, length=512)
    more = plan_for(ONE_BILLION, sequences=32, length=512)
    again = plan_for(ONE_BILLION, sequences=16, length=512, iterations=3)
    none = plan_for(ONE_BILLION, calibration="none")
    half = plan_for(ONE_BILLION, sequences=16, length=512, dtype=torch.bfloat16)
    assert none.seconds < base.seconds < more.seconds
    assert base.seconds < again.seconds
    assert none.peak_memory_bytes < base.peak_memory_bytes
    assert half.peak_memory_bytes < 0.7 * base.peak_memory_bytes
    assert base.peak_memory_bytes > 4e9  # the network in float32, sampled from
    text = plan_for(ONE_BILLION, sequences=16, length=512, calibration="a.txt")
    assert text.peak_memory_bytes < 3e9  # a block at a time
    assert none.scratch_bytes < base.scratch_bytes == text.scratch_bytes
    assert base.scratch_bytes > 4 * 16 * 512 * 2048 * 15  # what lies between the blocks
    assert (none.sequences, none.length) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        ({"bits": 6.0}, "disk_bytes scratch_bytes"),
        ({"size_bytes": 9 << 30}, "disk_bytes scratch_bytes"),
        ({"max_kl": 0.1}, "seconds disk_bytes scratch_bytes"),
        ({"calibration": "none"}, "seconds peak_memory_bytes"),
        ({"calibration": "self"}, "seconds peak_memory_bytes"),
        ({"sequences": 32}, "seconds scratch_bytes"),
        ({"length": 1024}, "seconds scratch_bytes"),
        ({"iterations": 2}, "seconds"),
        ({"tune": 60}, "seconds peak_memory_bytes"),
        ({"method": "rtn"}, "seconds peak_memory_bytes"),
        ({"group_size": 32}, "seconds"),
        ({"keep": ("*mlp*",)}, "seconds disk_bytes"),
        ({"dtype": torch.float16}, "peak_memory_bytes"),
    ],
)
def test_every_option_that_costs_moves_the_estimate(changes: Any, figures: str) -> None:
    asked = {"sequences": 16, "length": 512, "calibration": "a.txt"}
    before, after = plan_for(ONE_BILLION, **asked), plan_for(ONE_BILLION, **{**asked, **changes})
    for figure in ("seconds", "peak_memory_bytes", "disk_bytes", "scratch_bytes"):
        changed = getattr(before, figure) != getattr(after, figure)
        assert changed or figure not in figures.split(), figure
    if changes.keys() & {"iterations", "tune", "max_kl", "sequences", "length", "group_size"}:
        assert after.seconds > before.seconds
    if "tune" in changes:
        assert after.peak_memory_bytes > before.peak_memory_bytes


def test_what_was_measured_before_is_not_counted_again() -> None:
    """A measurement says how much calibration there is, and spares its time."""
    record = SimpleNamespace(sequences=16, length=512)
    measurement: Any = SimpleNamespace(record=record)
    options = ConversionOptions.of(bits=4, sequences=16, length=512)
    whole = preflight(ONE_BILLION, options, speed=LAPTOP)
    found = preflight(ONE_BILLION, options.having(sequences=None), measurement, speed=LAPTOP)
    assert (found.sequences, found.length) == (16, 512)
    assert found.seconds < whole.seconds
    assert preflight(ONE_BILLION, options, trials=4, speed=LAPTOP).seconds > whole.seconds


def test_a_size_asked_for_is_the_disk_that_it_takes() -> None:
    assert plan_for(SEVEN_BILLION, size_bytes=123_456_789).disk_bytes == 123_456_789


def amount(model: Any, device: str = "cpu", **wanted: Any) -> tuple[int, int]:
    return calibration_amount(model, device, Calibration(**wanted))


def test_default_calibration_is_full_on_a_gpu_and_capped_by_the_context() -> None:
    assert amount(SEVEN_BILLION, "cuda") == (128, 2048)
    assert amount(llama(26, 4096, context=1024), "cuda:1") == (128, 1024)
    assert amount(llama(4, 256, context=256))[1] == 256


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has no instructions for it, whatever this one has."""
    monkeypatch.setattr(module, "rounds_fast", lambda: False)


def nominal() -> Speed:
    threads = torch.get_num_threads()
    return Speed(module.NOMINAL_FLOPS * threads, 2e8 * threads, module.NOMINAL_CALL)


def calibrating(model: Any, **wanted: Any) -> float:
    """Seconds of it on a nominal machine."""
    whole = plan_for(model, speed=nominal(), **wanted).seconds
    return whole - plan_for(model, speed=nominal(), calibration="none").seconds


@pytest.mark.usefixtures("without_bfloat16")
def test_default_calibration_shrinks_on_a_cpu_until_its_time_holds() -> None:
    sizes = [(4, 64), (8, 256), (12, 768), (16, 2048), (26, 4096)]
    amounts = [amount(llama(*size)) for size in sizes]
    tokens = [count * length for count, length in amounts]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > 4 * tokens[-1]
    assert all(count >= 8 and length >= 64 for count, length in amounts)
    factoring = 60  # of Hessians, which is not in it
    assert calibrating(llama(8, 256)) <= module.CALIBRATION_SECONDS + factoring


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("source", ["self", "copy", "a.txt"])
def test_a_time_of_ones_own_is_used_up(source: str) -> None:
    """What there is most of needs no sampling."""
    model, seconds = llama(12, 768), (150, 900, 2400)
    amounts = [amount(model, time=float(s), source=source) for s in seconds]
    tokens = [count * length for count, length in amounts]
    assert tokens == sorted(tokens)
    for time, (count, length) in zip(seconds, amounts, strict=True):
        assert count % 8 == 0
        steps = tuning_steps(model, Calibration(source, time=time))
        choices = {"sequences": count, "length": length, "calibration": source, "tune": steps}
        found = calibrating(model, **choices)
        assert 0.9 * time < found < time + 120  # what Hessians take of factoring is not in it
    assert tuning_steps(model, Calibration(source, time=2400), trials=4) < 0.3 * steps
    assert amount(model, time=1e9, source=source) == (512, 512)  # as many tokens as the papers had
    assert amount(model, time=1e-9, source=source) == (8, 64)
    assert tuning_steps(model, Calibration(source, time=1e9)) == 240
    by_default = tuning_steps(model, Calibration(source))
    assert 1 < by_default <= module.DEFAULT_STEPS
    assert tuning_steps(model, Calibration(source), trials=4) == by_default
    of_text = amount(model, time=600.0, source="a.txt")
    assert math.prod(of_text) >= math.prod(amount(model, time=600.0))


def test_a_time_leaves_what_was_asked_for() -> None:
    model = llama(12, 768)
    assert amount(model, time=600.0, sequences=20)[0] == 20
    assert amount(model, time=600.0, length=96)[1] == 96
    with pytest.raises(ConversionError, match=r"--time 600s on cuda: .*; use --sequences"):
        amount(model, "cuda", time=600.0)
    with pytest.raises(ConversionError, match="leave one of the three out"):
        ConversionOptions.of(bits=4, time=600.0, sequences=20, length=64)
    for choice in ({"calibration": "none"}, {"method": "rtn"}):
        with pytest.raises(ConversionError, match="--time is for calibrating"):
            ConversionOptions.of(bits=4, time=600.0, **choice)


def test_an_amount_asked_for_is_kept() -> None:
    assert amount(SEVEN_BILLION, sequences=50, length=300) == (50, 300)
    assert amount(SEVEN_BILLION, sequences=50)[0] == 50
    assert amount(SEVEN_BILLION, length=300)[1] == 300


def test_what_does_not_fit_is_refused_with_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model.cvxq"
    fits = Preflight(1, 1000, 1000, 0, 0)
    refuse_what_cannot_fit(fits, output, Place())
    with pytest.raises(
        ConversionError, match=r"needs about 9000000\.0 GB of memory on cpu, .* free"
    ):
        refuse_what_cannot_fit(Preflight(1, 9 * 10**15, 1000, 0, 0), output, Place())
    with pytest.raises(ConversionError, match="its folder does not exist"):
        refuse_what_cannot_fit(fits, tmp_path / "absent" / "model.cvxq", Place())
    usage = SimpleNamespace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="needs about 3 MB for temporary files, 2 MB are"):
        refuse_what_cannot_fit(Preflight(1, 1000, 1000, 8, 64, 0, 3_000_000), output, Place())
    with pytest.raises(ConversionError, match="needs about 3 MB of disk, 2 MB are free"):
        refuse_what_cannot_fit(Preflight(1, 1000, 3_000_000, 0, 0), output, Place())


def test_less_may_be_allowed_than_is_free(tmp_path: Path) -> None:
    output = tmp_path / "model.cvxq"
    plan = Preflight(1, 2_000_000, 1000, 8, 64, 0, 3_000_000)
    refuse_what_cannot_fit(plan, output, Place(memory=2_000_000, disk=3_000_000))
    with pytest.raises(ConversionError, match=r"needs about 2 MB of memory on cpu, 1 MB are allow"):
        refuse_what_cannot_fit(plan, output, Place(memory=1_000_000))
    with pytest.raises(ConversionError, match=r"needs about 3 MB for .* files, 2 MB are allowed"):
        refuse_what_cannot_fit(plan, output, Place(disk=2_000_000, scratch=tmp_path))


def test_what_lies_between_blocks_takes_rounds_if_the_disk_is_small() -> None:
    asked = {"sequences": 32, "length": 2048, "calibration": "a.txt"}
    whole = plan_for(SEVEN_BILLION, **asked, disk=10**12)
    assert whole.rounds == 1
    state = 4 * 32 * 2048 * 4096
    assert whole.scratch_bytes > 27 * state
    less = plan_for(SEVEN_BILLION, **asked, disk=whole.scratch_bytes - 20 * state)
    assert less.rounds >= 3
    assert less.scratch_bytes <= whole.scratch_bytes - 20 * state
    least = plan_for(SEVEN_BILLION, **asked, disk=1)  # then it is refused
    assert least.rounds == 8  # shards
    assert least.scratch_bytes > 1


def test_hessians_of_many_experts_come_in_parts_that_the_disk_holds() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=48, hidden_size=2048, num_experts=128)
    roles = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
    tensors = {
        f"layers.{i}.mlp.experts.{e}.{role}.weight": SimpleNamespace(shape=shape)
        for i in range(48)
        for e in range(128)
        for role, shape in roles.items()
    }
    parameters = sum(info.shape[0] * info.shape[1] for info in tensors.values())
    mixture = SimpleNamespace(**{**vars(ONE_BILLION), "config": config, "tensors": tensors})
    mixture.parameters = parameters
    asked = {"sequences": 16, "length": 512, "calibration": "a.txt"}
    squares = 4 * (2 * 2048**2 + 768**2)  # bytes, of one expert
    whole = plan_for(mixture, **asked, disk=10**12)
    assert whole.room is None
    assert whole.scratch_bytes > 48 * 128 * squares
    parts = plan_for(mixture, **asked, disk=60 * 10**9)
    assert parts.room == 128 * squares  # a block at a time
    assert 40e9 < parts.scratch_bytes <= 60e9
    less = plan_for(mixture, **asked, disk=parts.scratch_bytes - 10**9)
    assert less.room == pytest.approx(parts.room - 5e8, rel=0.01)
    least = plan_for(mixture, **asked, disk=1)
    assert least.room == 4 * 2048**2
    assert least.seconds > whole.seconds


def test_this_machine_can_be_measured(save_network: Any, tmp_path: Path) -> None:
    speed = measure_speed(torch.float32, "cpu")
    assert 1e8 < speed.flops < 1e15
    assert 1e-8 < speed.call_seconds < 1
    memory = available_memory("cpu")
    assert memory is not None
    assert memory > 1 << 20
    plan = preflight(open_source(str(save_network("gpt2"))), ConversionOptions.of(bits=4))
    assert re.fullmatch(
        r"about .* (s|min|h), .* of memory, .* on disk and .* for a while \(.* tokens\)",
        plan.line(),
    )
    assert 0 < plan.seconds < 600
    refuse_what_cannot_fit(plan, tmp_path / "model.cvxq", Place())


def test_stacked_matrices_of_experts_count_each(
    build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    network = build_mixture("GraniteMoe")
    network.save_pretrained(tmp_path)
    found = shape_of(open_source(str(tmp_path)))
    inside = [p for p in network.parameters() if p.ndim > 1]
    assert found.matrix_weights == sum(p.numel() for p in inside)
    assert found.largest_weights == 96 * 32
    routed = network.config.num_experts_per_tok / network.config.num_local_experts
    inside = [p for p in network.parameters() if p.ndim == 3]
    spared = sum(p.numel() for p in inside) * (1 - routed)
    assert found.weights_for_a_token == pytest.approx(found.matrix_weights - spared)
    assert found.routed_matrices == sum(len(p) for p in inside)
    assert found.parameters == sum(p.numel() for p in network.parameters())


def test_a_token_takes_the_time_of_the_experts_that_it_is_routed_to(
    build_mixture: Callable[..., Any], tmp_path: Path
) -> None:
    seconds = {}
    for chosen in (1, 4):
        build_mixture("Qwen3Moe", num_experts_per_tok=chosen).save_pretrained(tmp_path)
        source = open_source(str(tmp_path))
        assert shape_of(source).routed_matrices == 3 * 6 * 2
        speed = Speed(flops=1e6, elements=1e12, call_seconds=1e-12)  # products take all the time
        seconds[chosen] = plan_for(source, sequences=8, length=16, speed=speed).seconds
    assert seconds[1] < 0.8 * seconds[4]
