"""Choices by the names of the command line, and the records that hold them."""

from __future__ import annotations

import json

import pytest
import torch
from cvxq_converter.options import Calibration, ConversionOptions, Method, Place, Target

CHOICES = {
    "bits": 3.0,
    "calibration": "some/text.txt",
    "sequences": 7,
    "method": "cvxq",
    "group_size": 32,
    "keep": ("*head*",),
    "tune": 5,
    "dtype": torch.bfloat16,
    "device": "cuda",
}


def test_choices_reach_the_records_that_hold_them() -> None:
    options = ConversionOptions.of(**CHOICES)
    assert options.target == Target(bits=3.0)
    assert options.calibration == Calibration("some/text.txt", sequences=7)
    assert options.method == Method(group_size=32, keep=("*head*",), tune=5)
    assert options.place == Place("cuda", torch.bfloat16)


def test_what_is_not_named_stays() -> None:
    options = ConversionOptions.of(**CHOICES).having(seed=3, group_size=16)
    assert options.calibration == Calibration("some/text.txt", sequences=7, seed=3)
    assert options.method == Method(group_size=16, keep=("*head*",), tune=5)
    assert options.at_rate(2.5).target == Target(bits=2.5)
    assert options.having(bits=None, size_bytes=99).target == Target(size_bytes=99)


def test_a_name_that_no_record_has_is_refused() -> None:
    with pytest.raises(TypeError, match="group_sise"):
        ConversionOptions.of(bits=3.0, group_sise=32)
    with pytest.raises(TypeError, match="curve"):
        ConversionOptions.of(bits=3.0).having(curve="model")


def test_json_names_every_choice_but_the_device_and_no_path() -> None:
    values = ConversionOptions.of(**CHOICES).to_json()
    assert values["calibration"] == "text.txt"
    assert values["method"] == "cvxq"
    assert values["dtype"] == "bfloat16"
    assert values["keep"] == ["*head*"]
    assert "device" not in values
    assert {"bits", "size_bytes", "seed", "metric", "gain", "revision"} <= values.keys()


def test_whole_numbers_are_told_as_others_are() -> None:
    whole, other = ConversionOptions.of(bits=4), ConversionOptions.of(bits=4.0)
    assert json.dumps(whole.to_json()) == json.dumps(other.to_json())


def test_tuning_is_open_where_a_time_says_how_much() -> None:
    assert ConversionOptions.of(bits=3).leaves_tuning_open
    assert ConversionOptions.of(bits=3, time=60.0, sequences=8).leaves_tuning_open
    for said in ({"sequences": 8}, {"length": 64}, {"tune": 0}, {"device": "cuda"}):
        assert not ConversionOptions.of(bits=3, **said).leaves_tuning_open
    for none in ({"calibration": "none"}, {"method": "rtn"}):
        assert not ConversionOptions.of(bits=3, **none).leaves_tuning_open
