"""Generation against transformers' own, and the rules of ending, caching and the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cvxq
import numpy as np
import pytest
import torch
from cvxq.cache import NetworkSession
from cvxq.errors import ArgumentError, ContextError
from cvxq.generate import generate_text, generate_tokens
from cvxq.sample import SamplingSettings

PROMPT = [5, 17, 80, 33, 2, 41]
GREEDY = SamplingSettings(temperature=0, max_tokens=12)


@pytest.fixture
def model(make_file: Callable[..., Any]) -> Iterator[cvxq.Model]:
    with cvxq.load(make_file("llama").path) as loaded:
        yield loaded


class Letters:
    """A tokenizer for tests: token n is the letter n, the vocabulary is ASCII."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 32 for letter in text]}

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        return "".join(chr(32 + token) for token in token_ids)


class Count:
    """Counts the tokens that a network is given."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.tokens: list[int] = []
        network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: object, args: object, kwargs: dict[str, Any]) -> None:
        self.tokens.append(kwargs["input_ids"].shape[1])


def greedy_of_transformers(
    network: Any, prompt: list[int], count: int, **options: Any
) -> list[int]:
    ids = torch.tensor([prompt])
    output = network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


def test_greedy_equals_transformers(kind: str, make_file: Callable[..., Any]) -> None:
    """Every token is the likeliest, or as likely but for the rounding of the packed products."""
    made = make_file(kind)
    with cvxq.load(made.path) as model:
        found = list(generate_tokens(model.session(), PROMPT, GREEDY))
    assert len(found) == 12
    with torch.no_grad():
        logits = made.network(torch.tensor([[*PROMPT, *found]])).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(found)[:, None])[:, 0]
    assert float((logits.max(1).values - chosen).max()) < 0.02 * float(logits.std())


def test_greedy_with_penalty_equals_transformers(make_file: Callable[..., Any]) -> None:
    made = make_file("llama")
    made.network.generation_config.eos_token_id = None
    expected = greedy_of_transformers(made.network, PROMPT, 12, repetition_penalty=1.5)
    settings = SamplingSettings(temperature=0, max_tokens=12, repetition_penalty=1.5)
    with cvxq.load(made.path) as model:
        assert list(generate_tokens(model.session(), PROMPT, settings)) == expected


@pytest.mark.parametrize("prefill_tokens", [1, 4, 5])
@pytest.mark.parametrize("kind", ["opt", "llama", "mistral", "gpt2", "gpt-neox"])
def test_a_prompt_read_in_pieces_gives_the_same_logits(
    kind: str, prefill_tokens: int, make_file: Callable[..., Any]
) -> None:
    prompt = [token % 96 for token in range(0, 170, 9)]  # longer than Mistral's sliding window
    with cvxq.load(make_file(kind).path) as model:
        whole = NetworkSession(model.network).resume(prompt)
        pieces = NetworkSession(model.network, prefill_tokens=prefill_tokens).resume(prompt)
    np.testing.assert_allclose(pieces, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["opt", "llama", "mistral", "gpt2"])
def test_a_second_turn_reuses_what_was_read(kind: str, make_file: Callable[..., Any]) -> None:
    with cvxq.load(make_file(kind).path) as model:
        session = NetworkSession(model.network)
        first = list(generate_tokens(session, PROMPT, GREEDY))
        count = Count(model.network)
        second = [*PROMPT, *first[:9], 60, 61, 62]
        logits = session.resume(second)
        assert count.tokens == [3]
        fresh = NetworkSession(model.network).resume(second)
    assert session.ids == second
    np.testing.assert_allclose(logits, fresh, atol=1e-4, rtol=0)


def test_the_same_prompt_again_computes_one_token(model: cvxq.Model) -> None:
    session = NetworkSession(model.network)
    expected = session.resume(PROMPT)
    count = Count(model.network)
    np.testing.assert_allclose(session.resume(PROMPT), expected, atol=1e-4, rtol=0)
    assert count.tokens == [1]


def test_another_text_starts_anew(model: cvxq.Model) -> None:
    session = model.session()
    session.resume(PROMPT)
    other = [9, 8, 7]
    np.testing.assert_array_equal(session.resume(other), model.session().resume(other))
    assert session.ids == other


def test_an_interrupted_pass_leaves_a_usable_session(model: cvxq.Model) -> None:
    session = NetworkSession(model.network)
    expected = session.resume([*PROMPT, 3])
    layer = model.network.model.layers[1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.feed([4])
    hook.remove()
    np.testing.assert_allclose(session.resume([*PROMPT, 3]), expected, atol=1e-4, rtol=0)


def test_a_network_without_keys_reads_everything_anew(
    model: cvxq.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(generate_tokens(NetworkSession(model.network), PROMPT, GREEDY))
    monkeypatch.setattr(type(model.network), "_is_stateful", True)
    session = NetworkSession(model.network)
    count = Count(model.network)
    assert list(generate_tokens(session, PROMPT, GREEDY)) == expected
    assert count.tokens[:3] == [6, 7, 8]


def test_end_tokens_end(model: cvxq.Model) -> None:
    tokens = list(generate_tokens(model.session(), PROMPT, GREEDY))
    end = tokens[4]
    cut = tokens[: tokens.index(end) + 1]
    result = generate_text(model.session(), Letters(), PROMPT, GREEDY, {end, 9999})
    assert result.finish == "end"
    assert list(result.ids) == cut
    assert result.text == "".join(chr(32 + token) for token in cut[:-1])


def test_text_streams_in_pieces(model: cvxq.Model) -> None:
    pieces: list[str] = []
    result = generate_text(model.session(), Letters(), PROMPT, GREEDY, on_text=pieces.append)
    assert result.finish == "length"
    assert len(result.ids) == 12
    assert "".join(pieces) == result.text == "".join(chr(32 + token) for token in result.ids)
    assert result.prompt_ids == tuple(PROMPT)


def test_a_stop_string_across_tokens_is_not_shown(model: cvxq.Model) -> None:
    whole = generate_text(model.session(), Letters(), PROMPT, GREEDY).text
    stop = whole[4:7]
    settings = SamplingSettings(temperature=0, max_tokens=12, stop=(stop, "never"))
    pieces: list[str] = []
    result = generate_text(model.session(), Letters(), PROMPT, settings, on_text=pieces.append)
    assert result.finish == "stop"
    assert "".join(pieces) == result.text == whole[: whole.index(stop)]


def test_the_seed_decides(model: cvxq.Model) -> None:
    def draw(seed: int) -> list[int]:
        settings = SamplingSettings(temperature=5.0, seed=seed, max_tokens=10)
        return list(generate_tokens(model.session(), PROMPT, settings))

    assert draw(1) == draw(1) != draw(2)


def test_the_context_ends_an_answer(model: cvxq.Model) -> None:
    prompt = [7] * 60
    endless = SamplingSettings(temperature=0)
    result = generate_text(model.session(), Letters(), prompt, endless)
    assert result.finish == "context"
    assert len(result.ids) == 64 - 60 + 1


def test_a_prompt_longer_than_the_context_is_refused(model: cvxq.Model) -> None:
    with pytest.raises(ContextError, match=r"the prompt has 65 tokens, .* context holds 64"):
        next(generate_tokens(model.session(), [7] * 65, GREEDY))


def test_an_empty_prompt_is_refused(model: cvxq.Model) -> None:
    with pytest.raises(ArgumentError, match="the prompt has no tokens"):
        next(generate_tokens(model.session(), [], GREEDY))
