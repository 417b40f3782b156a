"""A model that the torch decoder runs: texts, chats and perplexities as through transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cvxq import bench, evaluate
from cvxq.generate import generate_tokens
from cvxq.lean import record_of
from cvxq.lean.cuda.decoder import TorchDecoder
from cvxq.lean.cuda.opening import compute_dtype, open_torch_decoder, tune_alike
from cvxq.lean.cuda.weights import DenseWeight
from cvxq.lean.decoder import DrawingDecoder
from cvxq.model import Model, NetworkOptions
from cvxq.sample import SamplingSettings
from cvxq_format import Reader

MakeFile = Callable[..., Any]
PROMPT = [5, 17, 80, 33, 2, 41]
GREEDY = SamplingSettings(temperature=0, max_tokens=12)


def open_model(made: Any) -> Model:
    reader = Reader(made.path)
    decoder = open_torch_decoder(record_of(reader), reader, "cpu", {})
    return Model(reader, decoder, None, NetworkOptions())


@pytest.fixture
def model(make_file: MakeFile) -> Iterator[Model]:
    with open_model(make_file("llama")) as opened:
        yield opened


def test_greedy_equals_transformers(lean_kind: str, make_file: MakeFile) -> None:
    made = make_file(lean_kind)
    with open_model(made) as model, torch.inference_mode():
        assert isinstance(model.decoder, DrawingDecoder)
        text = list(PROMPT)
        for token in generate_tokens(model.session(), PROMPT, GREEDY):
            logits = made.network(input_ids=torch.tensor([text])).logits[0, -1]
            assert float(logits.max() - logits[token]) < 1e-3  # ties may fall either way
            text.append(token)
        assert len(text) == len(PROMPT) + 12


def test_the_session_knows_what_was_read(model: Model) -> None:
    session = model.session()
    tokens = list(generate_tokens(session, PROMPT, GREEDY))
    assert session.ids == [*PROMPT, *tokens]
    assert list(generate_tokens(session, [*PROMPT, *tokens, 7], GREEDY)) == list(
        generate_tokens(model.session(), [*PROMPT, *tokens, 7], GREEDY)
    )


def test_the_context_ends_an_answer(model: Model) -> None:
    prompt = [7] * 60
    session = model.session()
    tokens = list(generate_tokens(session, prompt, SamplingSettings(temperature=0)))
    assert len(tokens) == 64 - 60 + 1
    assert session.room == 0
    assert session.ids == [*prompt, *tokens[:-1]]


def test_two_texts_at_once(model: Model) -> None:
    """A decoder holds one text: whoever finds another's there reads its own anew."""
    first, second = [5, 17, 80], [33, 2, 41, 9]
    alone = [list(generate_tokens(model.session(), ids, GREEDY)) for ids in (first, second)]
    sessions = [model.session(), model.session()]
    running = [
        generate_tokens(session, ids, GREEDY)
        for session, ids in zip(sessions, (first, second), strict=True)
    ]
    found: list[list[int]] = [[], []]
    for _ in range(12):
        for tokens, drawn in zip(found, running, strict=True):
            tokens.append(next(drawn))
    assert found == alone


def test_perplexity_equals_that_of_the_network(make_file: MakeFile) -> None:
    made = make_file("qwen2")
    ids = [(5 * index + 1) % 96 for index in range(100)]
    windows = evaluate.windows(ids, 32)
    with open_model(made) as model:
        found = evaluate.perplexity(model.decoder, windows)
    expected = evaluate.perplexity(made.network, windows)
    assert found.tokens == expected.tokens
    assert found.nll.mean == pytest.approx(expected.nll.mean, abs=1e-4)


def test_speed_is_that_of_drawing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = TorchDecoder.draw

    def count(*arguments: Any) -> Iterator[int]:
        for token in draw(*arguments):
            drawn.append(token)
            yield token

    monkeypatch.setattr(TorchDecoder, "draw", count)
    speed = bench.measure_speed(model.session, 96, 20, 6, 2, lambda *progress: None)
    assert len(drawn) == (1 + 4) + 2 * (1 + 6)
    assert speed.prefill.mean > 0
    assert speed.decode.mean > 0


class Matrix(NamedTuple):
    rows: int
    depths: int


@pytest.mark.parametrize("known", [False, True])
def test_one_weight_of_each_kind_is_tuned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, known: bool
) -> None:
    """Measuring takes a device; how often it happens, and who shares the result, does not."""
    pytest.importorskip("triton")
    from cvxq_kernels import gpu
    from cvxq_kernels.gpu.plan import Plan

    tuned: list[object] = []

    class Stand(gpu.GpuWeight):
        def __init__(self, shape: tuple[int, int], depths: int) -> None:
            self.matrix, self.plans = Matrix(64, depths), {}  # type: ignore[assignment]
            self.size = shape

        @property
        def shape(self) -> tuple[int, int]:
            return self.size

    def measure(weight: Stand, batches: Any, dtype: torch.dtype) -> None:
        tuned.append((weight.shape, weight.matrix.depths, batches, dtype))
        weight.plans[1] = Plan("matvec", len(tuned))

    monkeypatch.setattr("cvxq_kernels.gpu.tuning.tune", measure)
    monkeypatch.setattr("cvxq_kernels.gpu.tuning.is_known", lambda *_: known)
    told: list[object] = []
    monkeypatch.setattr(
        "cvxq_kernels.gpu.tuning.launch_all", lambda weight, *_: told.append(weight.shape)
    )
    monkeypatch.setattr(
        "cvxq_kernels.gpu.compiling.compile_all", lambda sources, count: told.append(count)
    )
    weights = [Stand((8, 4), 3), Stand((8, 4), 3), Stand((8, 4), 7), Stand((4, 4), 3)]
    dense = DenseWeight(torch.zeros(2, 2))
    tune_alike([*weights, dense], torch.float16, lambda: told.append("step"))
    assert told == ([] if known else [(8, 4), (8, 4), (4, 4), "step", 1])
    assert tuned == [
        (shape, depths, (1,), torch.float16)
        for shape, depths in (((8, 4), 3), ((8, 4), 7), ((4, 4), 3))
    ]
    assert [weight.plans[1].programs for weight in weights] == [1, 1, 2, 3]
    said = [record.getMessage() for record in caplog.records]
    assert said == [] if known else "those of 3 shapes of matrices" in said[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"text_config": {"dtype": "float16"}}, torch.float16),
        ({"text_config": None}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_gpus_compute_in_the_models_half_precision(
    config: dict[str, Any], expected: torch.dtype
) -> None:
    assert compute_dtype(config) is expected
