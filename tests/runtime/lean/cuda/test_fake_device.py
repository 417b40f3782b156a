"""The way of a GPU from a file to tokens, on a device that is none; see `conftest.FakeDevice`."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cvxq.cli.application import application
from cvxq.evaluate import Window, perplexity
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.sample import SamplingSettings
from cvxq_kernels import PackedWeight
from cvxq_kernels.decode import launch
from cvxq_kernels.gpu import tuning

MakeFile = Callable[..., Any]
IDS = [(7 * index + 3) % 96 for index in range(40)]
MIXTURES = ("mixtral", "qwen3-moe", "olmoe", "gpt-oss", "granite-moe")  # wait for their routes


def expected_logits(made: Any, ids: list[int] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = made.network(input_ids=torch.tensor([ids])).logits[0].float()
    return logits


def test_from_file_to_tokens(
    lean_kind: str, make_file: MakeFile, fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within bfloat16's error of float32 logits; mixtures in float32: rounding changes routes."""
    made, is_mixture = make_file(lean_kind), lean_kind in MIXTURES
    dtype = torch.float32 if is_mixture else torch.bfloat16
    monkeypatch.setattr("cvxq.lean.cuda.opening.compute_dtype", lambda config: dtype)
    expected = expected_logits(made)
    bound = 1e-3 if is_mixture else 0.1 * float(expected.abs().max())
    context = 64 if lean_kind == "llama-dynamic" else None  # beyond that it is transformers' alone
    with cvxq.load(made.path, device="cuda", context=context) as model:
        decoder = model.decoder
        assert isinstance(decoder, TorchDecoder)
        assert model.device == "cuda:0"
        assert fake_device.calls == [f"tune {dtype}"]
        assert any(
            type(weight).__name__ == "StandIn" for weight in decoder.network.weights.multiplied()
        )
        assert float((decoder.logits(IDS) - expected).abs().max()) < bound
        decoder.cache.grow(16, 0)
        decoder.feed(IDS[:15])
        fake_device.calls.clear()
        for end in (16, 17):  # the second makes the cache grow, which moves what was captured
            logits = decoder.feed(IDS[end - 1 : end])
            expected = expected_logits(made, IDS[:end])[-1]
            assert float((logits - expected).abs().max()) < bound
        captured = [] if is_mixture else ["capture thread_local", "replay"] * 2
        assert fake_device.calls == captured


def test_a_failed_capture_is_told_as_a_warning(
    make_file: MakeFile, fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("cvxq.cuda.capture", fail)
    with cvxq.load(make_file("llama").path, device="cuda") as model:
        decoder = model.decoder
        assert isinstance(decoder, TorchDecoder)
        with pytest.warns(RuntimeWarning, match="CUDA graphs cannot be used here"):
            decoder.feed(IDS[:1])


def test_plans_are_timed_by_the_devices_events(
    fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The median of all calls but the first, in seconds."""
    monkeypatch.setattr(tuning, "SCRATCH_BYTES", 1 << 10)
    monkeypatch.setattr(tuning, "REPEATS", 5)
    milliseconds = iter([70.0, 5.0, 1.0, 2.0, 9.0, 2.0])

    def action() -> None:
        fake_device.clock += next(milliseconds)

    assert tuning._device_seconds(action) == pytest.approx(2e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_through_transformers(
    kind: str, make_file: MakeFile, fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is expanded for a token: matrices have a kernel, or were expanded while loading."""
    made = make_file(kind, with_record=False)
    with cvxq.load(made.path, device="cuda") as model:
        assert model.decoder is None
        held = [module for module in model.network.modules() if hasattr(module, "packed")]
        assert held
        assert {type(module.packed).__name__ for module in held} == {"StandIn"}

        def expand(*arguments: object) -> None:
            raise AssertionError("expanded for a token")

        for form in ("dense", "rows"):
            monkeypatch.setattr(PackedWeight, form, expand)
        with torch.inference_mode():
            found = model.network(input_ids=torch.tensor([IDS])).logits[0]
    assert float((found - expected_logits(made)).abs().max()) < 1e-3


@pytest.mark.parametrize("with_record", [True, False])
def test_without_triton_or_a_compiler(
    with_record: bool, make_file: MakeFile, fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices are expanded once, plain operations run, and one line says why."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(launch, "normalize", fail)
    made = make_file("llama", with_record=with_record)
    expected = expected_logits(made)
    with pytest.warns(RuntimeWarning, match=r"cannot run here \(Failed to find C compiler"):
        model = cvxq.load(made.path, device="cuda")
    with model:  # a second warning would be an error
        logits = model.session().feed(IDS)
        assert not any(hasattr(module, "packed") for module in model.network.modules())
    assert float((torch.as_tensor(logits) - expected[-1]).abs().max()) < 0.1 * float(
        expected.abs().max()
    )


@pytest.mark.parametrize("with_record", [True, False])
def test_kernels_are_launched_on_the_device_that_was_asked_for(
    with_record: bool, make_file: MakeFile, fake_device: Any
) -> None:
    """Triton and streams take it from the thread, whatever another one left there."""
    fake_device.count = 2
    with cvxq.load(make_file("llama", with_record=with_record).path, device="cuda:1") as model:
        if not with_record:
            assert model.network is not None
        assert fake_device.current == 1


@pytest.mark.parametrize("call", ["feed", "rows", "draw", "next"])
def test_every_thread_launches_on_the_models_device(
    call: str, make_file: MakeFile, fake_device: Any
) -> None:
    """Also one that never named it, and goes on with what another thread began."""
    fake_device.count = 2
    with cvxq.load(make_file("llama").path, device="cuda:1") as model:
        decoder = model.decoder
        assert isinstance(decoder, TorchDecoder)
        decoder.feed(IDS[:4])
        tokens = decoder.draw(SamplingSettings(temperature=0), IDS[:4])
        next(tokens)
        seen: list[int] = []

        def other() -> None:
            with fake_device:
                seen.append(fake_device.current)
                if call == "next":
                    next(tokens)
                elif call == "draw":
                    next(decoder.draw(SamplingSettings(temperature=0), IDS[:4]))
                else:
                    getattr(decoder, call)(IDS[4:6])
                seen.append(fake_device.current)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [0, 1]


def test_sampling_is_captured_once_for_its_rules(make_file: MakeFile, fake_device: Any) -> None:
    rules = {"temperature": 2.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    with cvxq.load(make_file("llama").path, device="cuda:0") as model:

        def draw(seed: int) -> list[int]:
            tokens = model.session().draw(IDS, SamplingSettings(seed=seed, **rules))
            return [next(tokens) for _ in range(8)]

        first = draw(1)
        captured = fake_device.calls.count("capture thread_local")
        assert captured == 2  # choosing and the step
        assert draw(1) == first != draw(2)
        assert fake_device.calls.count("capture thread_local") == captured


@pytest.mark.parametrize("with_record", [True, False])
def test_bench(with_record: bool, make_file: MakeFile, fake_device: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("cvxq.bench.DEVICE_COPY_BYTES", 1 << 12)
    made = make_file("llama", with_record=with_record)
    done = CliRunner().invoke(
        application,
        ["bench", str(made.path), "--device", "cuda", "--repeats", "1", "--tokens", "4"],
    )
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["device"] == "cuda:0"
    assert record["path"] == ("lean" if with_record else "transformers")
    assert record["peak_memory_bytes"] == 1 << 20
    assert "synchronize" in fake_device.calls


def test_perplexity(make_file: MakeFile, fake_device: Any) -> None:
    made = make_file("llama")
    ids = np.array(IDS)
    with cvxq.load(made.path, device="cuda") as model:
        found = perplexity(model.decoder, [Window(ids, 1)])
    with cvxq.load(made.path) as model:
        expected = perplexity(model.decoder, [Window(ids, 1)])
    assert found.perplexity == pytest.approx(expected.perplexity, rel=0.1)


def test_a_table_of_packed_weights_hides_no_expanded_ones(
    make_file: MakeFile, fake_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the file's matrices is transposed, which the kernels do not take."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[4] / "benchmarks"))
    decoding = importlib.import_module("gpu_decoding")
    path = make_file("llama").path
    with pytest.raises(ValueError, match=r"\d of \d+ matrices were expanded"):
        decoding.open_repeated(path, 3, "cuda", keep_packed=True)
    decoder = decoding.open_repeated(path, 3, "cuda", keep_packed=False)
    assert len(decoder.network.record.layers) == 3
