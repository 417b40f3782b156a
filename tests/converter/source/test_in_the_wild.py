"""Folders as people have them: adapters, leftovers, float8, pointers; converted, or refused."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import load_network, load_tokenizer, open_source
from cvxq_converter.source.loaded import load_model
from cvxq_format import Reader
from safetensors.torch import load_file, save_file
from torch import Tensor

OPTIONS = ConversionOptions.of(bits=8, calibration="none")
WEIGHT = "model.layers.0.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 524912\n"


@pytest.fixture
def folder(save_network: Any, tmp_path: Path) -> Path:
    """A Llama of its own, to be changed."""
    return Path(shutil.copytree(save_network("llama"), tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: Tensor) -> dict[str, Tensor]:
    """Add tensors, or replace them; return those that there were."""
    path = folder / "model.safetensors"
    before = load_file(path)
    save_file(before | changes, path, metadata={"format": "pt"})
    return before


def refusal(folder: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        load_model(open_source(str(folder)), OPTIONS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- adapters -----------------------------------------------------------------------------------


def add_adapter(folder: Path) -> None:
    settings = {"base_model_name_or_path": "someone/base", "peft_type": "LORA", "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def test_merged_weights_are_converted_without_the_adapter_beside_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(folder / "model.safetensors")
    add_adapter(folder)
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    source = open_source(str(folder))
    assert "model: adapter_config.json is not applied" in source.notices[0]
    found = load_network(source, torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_alone_names_its_base_and_what_to_do(folder: Path) -> None:
    add_adapter(folder)
    (folder / "model.safetensors").unlink()
    text = refusal(folder)
    assert "adapter_config.json" in text
    assert "its base model, someone/base; merge it" in text


# --- what config.json says ----------------------------------------------------------------------


def test_a_leftover_quantization_config_over_floats_is_not_carried_on(
    folder: Path, tmp_path: Path
) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    lines: list[str] = []
    convert(str(folder), tmp_path / "a.cvxq", OPTIONS, announce=lines.append)
    assert lines[0].startswith("model: config.json has a quantization_config (bitsandbytes), but")
    with Reader(tmp_path / "a.cvxq") as reader:
        assert b"quantization_config" not in reader.file("config.json")
        assert lines[0] in json.loads(reader.file("provenance.json"))["notices"]


def test_architectures_in_another_case_are_known(folder: Path) -> None:
    edit_config(folder, architectures=["LLaMAForCausalLM"])
    load_model(open_source(str(folder)), OPTIONS)


# --- tensors without use ------------------------------------------------------------------------


def test_tensors_that_the_network_does_not_use_are_named(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, **{f"extra.{i}": torch.ones(2) for i in range(4)})
    lines: list[str] = []
    convert(str(folder), tmp_path / "a.cvxq", OPTIONS, announce=lines.append)
    left = "4 tensors that the network does not use left out: extra.0, extra.1, extra.2, …"
    assert f"model: {left}" in lines


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gpt-neox", "opt", "gemma"])
def test_nothing_is_named_where_all_is_used(architecture: str, save_network: Any) -> None:
    assert load_model(open_source(str(save_network(architecture))), OPTIONS).notices == ()


def test_trained_biases_that_config_json_forgets_are_refused(folder: Path) -> None:
    name = WEIGHT.replace("weight", "bias")
    rows = len(edit_weights(folder)[WEIGHT])
    edit_weights(folder, **{name: torch.zeros(rows)})
    assert name in str(load_model(open_source(str(folder)), OPTIONS).leftovers)
    edit_weights(folder, **{name: torch.ones(rows)})
    assert f"{name} is not zero" in (text := refusal(folder))
    assert "mlp_bias" in text


# --- weights that are quantized already ---------------------------------------------------------


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("kind", ["tensor", "rows", "row vector", "blocks"])
def test_float8_weights_are_multiplied_by_their_scales(
    kind: str, suffix: str, folder: Path
) -> None:
    weight = edit_weights(folder)[WEIGHT]
    rows, columns = weight.shape
    block = (rows // 2 + 3, columns - 5)  # neither divides the matrix
    shape = {"tensor": (), "rows": (rows, 1), "row vector": (rows,), "blocks": (2, 2)}[kind]
    scale = torch.rand(shape) + 0.5
    spread = scale if kind != "row vector" else scale[:, None]
    if kind == "blocks":
        places = [torch.arange(n) // size for n, size in zip(weight.shape, block, strict=True)]
        spread = scale[places[0]][:, places[1]]
    stored = (weight / spread).to(torch.float8_e4m3fn)
    edit_weights(folder, **{WEIGHT: stored, WEIGHT + suffix: scale})
    edit_weights(folder, **{WEIGHT.replace("weight", "input_scale"): torch.ones(1)})
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    source = open_source(str(folder))
    assert "quantized already: 1 of its matrices are float8" in source.notices[0]
    found = load_model(source, OPTIONS).network.get_parameter(WEIGHT)
    torch.testing.assert_close(found.data, stored.float() * spread, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stored", "more", "expected"),
    [
        (torch.float8_e4m3fn, {}, f"float8_e4m3fn without {WEIGHT}_scale"),
        (torch.float8_e4m3fn, {f"{WEIGHT}_scale": torch.ones(3)}, "the 3 scales of"),
        (torch.int8, {WEIGHT.replace("weight", "SCB"): torch.ones(2)}, "int8 needs the code of gp"),
        (torch.uint8, {}, "uint8 needs the code of gptq"),
        (torch.uint32, {}, "uint32 needs the code of gptq"),
    ],
)
def test_weights_that_cannot_become_floats_are_refused(
    stored: torch.dtype, more: dict[str, Tensor], expected: str, folder: Path
) -> None:
    weight = edit_weights(folder)[WEIGHT]
    edit_weights(folder, **{WEIGHT: weight.abs().to(stored), **more})
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    assert f"model: {WEIGHT} is already quantized: {expected}" in (text := refusal(folder))
    assert "convert the original 16- or 32-bit checkpoint" in text


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs_are_called_that(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    assert f"model: {name} is only a Git LFS pointer" in refusal(folder)


def test_a_shard_that_is_a_pointer_is_called_that(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").write_text(POINTER)
    index = {"weight_map": {"x": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model: a.safetensors is only a Git LFS pointer" in refusal(folder)


def test_a_tekken_tokenizer_is_carried_in_the_common_form(folder: Path) -> None:
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    config = {"pattern": r"\p{L}+|\p{N}|\s+|.", "default_vocab_size": len(tokens) + len(names)}
    config |= {"num_vocab_tokens": len(tokens), "default_num_special_tokens": len(names)}
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    specials = [{"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(names)]
    written = {"config": config | {"version": "v7"}, "vocab": vocabulary}
    (folder / "tekken.json").write_text(json.dumps(written | {"special_tokens": specials}))
    source = open_source(str(folder))
    assert {"tokenizer.json", "tokenizer_config.json"} <= source.made.keys()
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    text = tokenizer.decode(tokenizer("the 7", add_special_tokens=False)["input_ids"])
    assert text == "the 7"
    (folder / "tekken.json").write_text("{}")
    assert (
        "the result has no tokenizer; transformers cannot read it: "
        in open_source(str(folder)).notices[0]
    )
