"""Texts whose length changes the angles of all their places, through transformers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cvxq.angles import Angles
from cvxq.cache import NetworkSession
from cvxq.evaluate import Window, perplexity

MakeFile = Callable[..., Any]
IDS = [(token * token + 3) % 96 for token in range(90)]
LIMIT = {"phi3-longrope": 32, "llama-dynamic": 64}  # of tokens that are turned as in short texts


@pytest.fixture(params=LIMIT)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def network(kind: str, make_file: MakeFile) -> Any:
    made = make_file(kind).network
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "qkv" in name or "q_proj" in name:
                parameter *= 8  # sharp attention, so that angles matter
    return made


def fresh(network: Any, ids: Sequence[int]) -> np.ndarray:
    """Logits (V,) after `ids`, by a network that has seen no other text."""
    with torch.no_grad():
        logits = copy.deepcopy(network)(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return np.asarray(logits.float().numpy())


def assert_fresh(found: np.ndarray, untouched: Any, ids: Sequence[int]) -> None:
    np.testing.assert_allclose(found, fresh(untouched, ids), atol=2e-4, rtol=0)


def test_token_by_token_past_the_limit_is_a_fresh_pass(kind: str, network: Any) -> None:
    untouched, begin = copy.deepcopy(network), LIMIT[kind] - 3
    session = NetworkSession(network)
    session.resume(IDS[:begin])
    for end in range(begin + 1, begin + 8):
        found = session.feed([IDS[end - 1]])
        assert_fresh(found, untouched, IDS[:end])
    assert session.ids == IDS[:end]
    stale = untouched(torch.tensor([IDS[:begin]]), use_cache=True)
    rest = torch.tensor([IDS[begin:end]])
    kept = untouched(rest, past_key_values=stale.past_key_values).logits[0, -1].detach().numpy()
    assert np.abs(kept - found).max() > 1e-2  # keys turned by other angles would be another answer


def test_a_long_prompt_in_pieces_and_back_to_a_short_text(kind: str, network: Any) -> None:
    untouched, long = copy.deepcopy(network), IDS[: LIMIT[kind] + 9]
    session = NetworkSession(network, prefill_tokens=7)
    assert_fresh(session.resume(long), untouched, long)
    short = [*long[:20], 5]
    assert_fresh(session.resume(short), untouched, short)
    assert_fresh(session.resume(long[:-2]), untouched, long[:-2])  # not as for the longer one


def test_two_texts_share_a_network(kind: str, network: Any) -> None:
    untouched, limit = copy.deepcopy(network), LIMIT[kind]
    long, short = NetworkSession(network), NetworkSession(network)
    long.resume(IDS[: limit + 4])
    short.resume(IDS[3:20])
    assert_fresh(long.feed([7]), untouched, [*IDS[: limit + 4], 7])
    assert_fresh(short.feed([7]), untouched, [*IDS[3:20], 7])


def test_windows_are_measured_by_their_own_angles(kind: str, network: Any) -> None:
    untouched, limit = copy.deepcopy(network), LIMIT[kind]
    for length in (limit + 9, limit + 2, 12):
        window = Window(np.array(IDS[:length]), length - 1)
        passed = copy.deepcopy(untouched)(torch.from_numpy(window.ids)[None], use_cache=False)
        logits = passed.logits[0, -2].detach()
        expected = -logits.double().log_softmax(-1)[IDS[length - 1]]
        assert perplexity(network, [window]).nll.mean == pytest.approx(float(expected), abs=1e-4)


def test_the_network_is_left_as_it_was(network: Any) -> None:
    def kinds() -> list[Any]:
        return [module.rope_type for module in network.modules() if hasattr(module, "rope_type")]

    before, angles = kinds(), Angles(network)
    with angles.of(80) as long:
        pass
    with angles.of(10) as short:
        assert short != long
    assert kinds() == before
    with contextlib.suppress(ZeroDivisionError), angles.of(80):
        assert kinds() != before
        raise ZeroDivisionError
    assert kinds() == before


def test_most_networks_turn_every_text_alike(make_file: MakeFile) -> None:
    for other in ("llama", "llama-yarn", "gemma3", "gpt2"):
        angles = Angles(make_file(other).network)
        with angles.of(5) as short:
            pass
        with angles.of(90) as long:
            assert short == long == b""
