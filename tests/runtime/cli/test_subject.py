"""Checkpoints that `cvxq perplexity` measures and compares with: read as conversion reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from click.testing import Result
from cvxq_format.limits import MAGIC
from safetensors.torch import load_file, save_file

Cvxq = Callable[..., Result]
WEIGHT = "model.layers.0.mlp.up_proj.weight"
TEXT = "Once upon a time there was a test. It had no end, but many windows! " * 2


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def measure(cvxq: Cvxq, text_file: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Return a function that measures a model: its record, and what stderr says."""

    def run(model: object, *options: object) -> tuple[dict[str, Any], str]:
        result = cvxq("perplexity", model, "--text", text_file, *options, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout), result.stderr

    return run


Measure = Callable[..., tuple[dict[str, Any], str]]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


def test_an_adapter_beside_merged_weights_is_not_applied(
    measure: Measure, original_folder: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = original_folder
    expected, _ = measure(folder)
    settings = {"base_model_name_or_path": "someone/base", "peft_type": "LORA", "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    found, said = measure(folder)
    assert found["nll"] == expected["nll"]
    assert "original: adapter_config.json is not applied" in said
    compared, said = measure(path, "--against", folder, "--weights", "dense")
    assert compared["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "original: adapter_config.json is not applied" in said


def test_scales_of_float8_weights_are_applied(
    measure: Measure, original_folder: tuple[Path, Path]
) -> None:
    path, folder = original_folder
    weight = load_file(folder / "model.safetensors")[WEIGHT]
    scale = weight.abs().max() / 400  # float8 ends at 448
    edit_weights(folder, {WEIGHT: (weight / scale).to(torch.float8_e4m3fn)})
    edit_weights(folder, {f"{WEIGHT}_scale": scale})
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    record, said = measure(path, "--against", folder, "--weights", "dense")
    assert 0 < record["kl"]["mean"] < 1e-3
    assert "quantized already: 1 of its matrices are float8" in said


def test_left_out_tensors_are_named(measure: Measure, original_folder: tuple[Path, Path]) -> None:
    folder = original_folder[1]
    edit_weights(folder, {"extra.weight": torch.ones(2)})
    _, said = measure(folder)
    assert "a tensor that the network does not use left out: extra.weight" in said


def test_the_text_part_of_a_model_of_images(
    measure: Measure, original_folder: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    path, folder = original_folder
    part = AutoModelForCausalLM.from_pretrained(folder)
    images = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    images |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    vision = {**images, "model_type": "clip_vision_model"}
    config = LlavaConfig(text_config=part.config, vision_config=vision, image_token_index=90)
    whole = LlavaForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(part.model.state_dict())
    whole.lm_head.load_state_dict(part.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "whole" / name).write_bytes((folder / name).read_bytes())
    expected, _ = measure(folder)
    found, said = measure(tmp_path / "whole", "--against", path)
    assert found["nll"]["mean"] == pytest.approx(expected["nll"]["mean"], rel=1e-5)
    assert "whole: only its text part is used; images are left out" in said


def test_a_hub_id_is_read_from_the_local_cache(
    measure: Measure,
    original_folder: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = original_folder[1]
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--someone--model"
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found, _ = measure("someone/model")
    assert found["model"] == "someone/model"
    assert found["nll"] == measure(folder)[0]["nll"]


def test_a_cvxq_file_is_known_by_how_it_begins(
    measure: Measure, original_folder: tuple[Path, Path], tmp_path: Path
) -> None:
    path = original_folder[0]
    assert path.read_bytes().startswith(MAGIC)
    expected, _ = measure(path)
    other = path.rename(tmp_path / "blob")
    assert measure(other)[0] == {**expected, "model": str(other)}


def test_a_checkpoint_without_a_tokenizer_serves_to_compare_with(
    measure: Measure,
    fails: Callable[..., str],
    original_folder: tuple[Path, Path],
    text_file: Path,
) -> None:
    path, folder = original_folder
    for file in folder.glob("*token*"):
        file.unlink()
    assert measure(path, "--against", folder)[0]["kl"]["mean"] < 0.1
    assert "original: no tokenizer" in fails(3, "perplexity", folder, "--text", text_file)


@pytest.mark.parametrize("asked_as", ["measured", "compared with"])
def test_what_conversion_refuses_is_refused_alike(
    asked_as: str,
    fails: Callable[..., str],
    original_folder: tuple[Path, Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    path, folder = original_folder

    def line(code: int, model: object) -> str:
        models = [model] if asked_as == "measured" else [path, "--against", model]
        return fails(code, "perplexity", *models, "--text", text_file)

    def refusal(model: object, code: int = 6) -> str:
        words = (model, "-o", tmp_path / "out.cvxq", "--bits", 3, "--calibration", "none")
        converted = fails(code, "convert", *words)
        assert line(code, model) == converted
        return converted

    assert "does not exist, expected a .cvxq file" in line(3, tmp_path / "none.cvxq")
    assert "no such folder" in refusal(tmp_path / "none", code=3)
    assert "no config.json" in refusal(tmp_path)
    assert "not a GGUF file" in refusal(text_file)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors is only a Git LFS pointer" in refusal(folder)
    (folder / "model.safetensors").write_bytes(weights)
    edit_config(folder, hidden_size="big")
    assert "'hidden_size' expected int, got str" in refusal(folder)


def test_weights_are_all_there(
    fails: Callable[..., str], original_folder: tuple[Path, Path], text_file: Path
) -> None:
    path, folder = original_folder
    weights = load_file(folder / "model.safetensors")
    del weights[WEIGHT]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = fails(6, "perplexity", path, "--text", text_file, "--against", folder)
    assert f"original: weight {WEIGHT} is missing from the checkpoint" in line


def test_a_device_that_is_not_there(
    fails: Callable[..., str],
    original_folder: tuple[Path, Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = original_folder[1]
    line = fails(5, "perplexity", folder, "--text", text_file, "--device", "cuda")
    assert "finds no CUDA device here" in line
