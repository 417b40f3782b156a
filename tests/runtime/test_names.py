"""Which tensor of a file fills which parameter."""

from __future__ import annotations

import pytest
from cvxq.errors import InconsistentFileError
from cvxq.names import match_names, resolve_alias, tied_groups

PARAMETERS = ["model.a.weight", "model.b.weight", "head.weight"]


def match(*tensors: str, **options: object) -> dict[str, str]:
    settings: dict[str, object] = {"prefix": "model", "network": "Net", "tied": (), **options}
    return match_names(tensors, PARAMETERS, **settings)  # type: ignore[arg-type]


def test_same_names() -> None:
    assert match(*PARAMETERS) == {name: name for name in PARAMETERS}


def test_prefix_left_out_or_put_in() -> None:
    assert match("a.weight", "b.weight", "head.weight")["model.b.weight"] == "b.weight"
    assert match("model.a.weight", "b.weight", "model.head.weight")["head.weight"] == (
        "model.head.weight"
    )


def test_the_output_head_of_gpt_neox_by_either_name() -> None:
    for ours, theirs in (("lm_head", "embed_out"), ("embed_out", "lm_head")):
        found = match_names([f"{theirs}.weight"], [f"{ours}.weight"], (), prefix="gpt_neox")
        assert found == {f"{ours}.weight": f"{theirs}.weight"}


def test_a_tied_parameter_needs_one_tensor() -> None:
    found = match("a.weight", "b.weight", tied=[["model.a.weight", "head.weight"]])
    assert found["head.weight"] == "a.weight"


def test_a_tied_parameter_may_have_two_tensors() -> None:
    found = match("a.weight", "b.weight", "head.weight", tied=[["model.a.weight", "head.weight"]])
    assert found["head.weight"] == "head.weight"


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(
        InconsistentFileError, match=r"Net needs tensor 'model\.b\.weight' and 1 more, not in"
    ):
        match("a.weight")


def test_a_stranger_is_named() -> None:
    with pytest.raises(InconsistentFileError, match=r"tensor 'c\.weight' of the file has no place"):
        match(*PARAMETERS, "c.weight")


def test_two_tensors_for_one_parameter_are_refused() -> None:
    with pytest.raises(InconsistentFileError, match=r"'a\.weight' both belong to 'model\.a\.wei"):
        match(*PARAMETERS, "a.weight")


def test_an_added_bias_has_a_place_beside_its_weight() -> None:
    found = match(*PARAMETERS, "a.bias", added_biases=["a.bias"])
    assert found["model.a.bias"] == "a.bias"
    with pytest.raises(InconsistentFileError, match=r"'a\.bias' of the file has no place"):
        match(*PARAMETERS, "a.bias")


@pytest.mark.parametrize(
    "constant",
    ["h.0.attn.bias", "model.layers.1.attention.masked_bias", "l.0.rotary_emb.inv_freq"],
)
def test_constants_of_old_checkpoints_are_left_out(constant: str) -> None:
    assert constant not in match(*PARAMETERS, constant).values()


def test_buffers_are_filled_but_not_needed() -> None:
    assert match(*PARAMETERS, optional=["model.mask"]) == match(*PARAMETERS)
    assert match(*PARAMETERS, "mask", optional=["model.mask"])["model.mask"] == "mask"


def test_tied_groups_are_of_one_object() -> None:
    one, other = object(), object()
    assert tied_groups([("a", one), ("b", other), ("c", one)]) == [["a", "c"]]


def test_aliases() -> None:
    assert resolve_alias("head", {"head": "embedding"}) == "embedding"
    assert resolve_alias("embedding", {"head": "embedding"}) == "embedding"
