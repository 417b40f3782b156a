"""Model folders and hub caches → networks, names and matrices; every refusal in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from cvxq_converter.errors import ConversionError
from cvxq_converter.source.checkpoint import (
    find_matrices,
    load_network,
    load_tokenizer,
    open_source,
    other_tensors,
    source_names,
)
from safetensors.torch import load_file, save_file


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(model: str | Path, **options: Any) -> str:
    """Open and load a model that must be refused; return the text, checked to be one line."""

    def attempt() -> None:
        find_matrices(load_network(open_source(str(model), **options), torch.float32))

    with pytest.raises(ConversionError) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_of_the_checkpoint_is_found_once(architecture: str, save_network: Any) -> None:
    source = open_source(str(save_network(architecture)))
    network = load_network(source, torch.float32)
    names = source_names(source, network)
    matrices = find_matrices(network, names)
    found = {m.name: m.parameter.data for m in matrices}
    found |= dict(other_tensors(network, matrices, names))
    stored = load_file(source.weight_files[0])
    assert set(found) | {a for m in matrices for a in m.aliases} >= set(stored)
    assert set(found) <= set(stored)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)


def test_matrices_cover_the_blocks_the_embedding_and_the_head(
    architecture: str, save_network: Any
) -> None:
    source = open_source(str(save_network(architecture)))
    network = load_network(source, torch.float32)
    matrices = find_matrices(network, source_names(source, network))
    kinds = [m.kind for m in matrices]
    assert kinds.count("embedding") == 1
    assert kinds.count("conv1d") == (8 if architecture == "gpt2" else 0)
    per_block = {"gpt2": 4, "gpt-neox": 4, "opt": 6, "phi": 6}.get(architecture, 7)
    tied = architecture in ("llama-tied", "qwen2", "gemma", "gpt2", "opt")
    assert len(matrices) == 2 * per_block + (1 if tied else 2)
    embedding = next(m for m in matrices if m.kind == "embedding")
    assert bool(embedding.aliases) == tied
    tokens = {m.name for m in matrices if m.rows_are_tokens}
    assert len(tokens) == (1 if tied else 2)
    assert {len(m.weight) for m in matrices if m.name in tokens} == {network.config.vocab_size}
    assert (embedding.input_module_name is not None) == tied
    inputs = torch.randn(3, matrices[1].weight.shape[1])
    module = network.get_submodule(matrices[1].module_name)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(inputs), inputs @ matrices[1].weight.T + bias)


def test_biases_say_whether_they_exist_and_what_a_gained_one_is_called(save_network: Any) -> None:
    source = open_source(str(save_network("qwen2")))
    network = load_network(source, torch.float32)
    matrices = {m.name: m for m in find_matrices(network, source_names(source, network))}
    query = matrices["model.layers.0.self_attn.q_proj.weight"]
    output = matrices["model.layers.0.self_attn.o_proj.weight"]
    assert (query.has_bias, query.bias_name) == (True, "model.layers.0.self_attn.q_proj.bias")
    assert (output.has_bias, output.bias_name) == (False, "model.layers.0.self_attn.o_proj.bias")
    assert matrices["model.embed_tokens.weight"].bias_name == "lm_head.bias"


def test_checkpoint_names_without_the_base_prefix(save_network: Any, tmp_path: Path) -> None:
    folder = copy(save_network("gpt2"), tmp_path / "hub-style")
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a mask that old checkpoints carry
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(folder))
    network = load_network(source, torch.float32)
    matrices = find_matrices(network, source_names(source, network))
    assert matrices[0].name == "wte.weight"
    assert matrices[0].aliases == ("lm_head.weight",)
    assert matrices[1].name == "h.0.attn.c_attn.weight"
    assert matrices[1].source_orientation == "in_out"
    assert matrices[1].weight.shape == (96, 32)
    others = dict(other_tensors(network, matrices, source_names(source, network)))
    assert "wpe.weight" in others
    assert "h.0.attn.bias" not in others


def test_renamed_heads_are_found_by_content(save_network: Any) -> None:
    source = open_source(str(save_network("gpt-neox")))
    network = load_network(source, torch.float32)
    names = {m.name for m in find_matrices(network, source_names(source, network))}
    assert {"gpt_neox.embed_in.weight", "embed_out.weight"} <= names


@pytest.mark.parametrize("kind", ["sharded", "bin", "sharded bin"])
def test_other_weight_files_give_the_same_network(
    kind: str, save_network: Any, tmp_path: Path
) -> None:
    original = save_network("llama-gqa")
    folder = copy(original, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = ("model", ".safetensors") if kind == "sharded" else ("pytorch_model", ".bin")
    parts = [weights] if kind == "bin" else [dict(list(weights.items())[i::2]) for i in (0, 1)]
    names = [f"{stem}{suffix}"] if kind == "bin" else [f"{stem}-{i}{suffix}" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        if suffix == ".bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    if kind != "bin":
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}{suffix}.index.json").write_text(text)
    expected = load_network(open_source(str(original)), torch.float32).state_dict()
    source = open_source(str(folder))
    assert [path.name for path in source.weight_files] == names
    assert source.parameters == open_source(str(original)).parameters
    for name, tensor in load_network(source, torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    torch.testing.assert_close(source.read("lm_head.weight"), expected["lm_head.weight"])


def test_the_digest_follows_the_weights(save_network: Any, tmp_path: Path) -> None:
    original = save_network("llama")
    same = open_source(str(copy(original, tmp_path / "same")))
    changed = copy(original, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert same.digest == open_source(str(original)).digest
    assert open_source(str(changed)).digest != same.digest


def test_a_hub_id_is_found_in_the_local_cache(
    save_network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--someone--tiny"
    copy(save_network("llama"), home / "snapshots" / commit)
    (home / "refs").mkdir()
    for reference in ("main", "v1"):
        (home / "refs" / reference).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "v1"):
        source = open_source("someone/tiny", revision)
        assert source.name == "someone/tiny"
        load_network(source, torch.float32)
    assert "someone/other: no such folder" in refusal("someone/other")
    assert "at revision v2" in refusal("someone/tiny", revision="v2")


def test_files_to_carry_are_listed_and_strangers_are_not(save_network: Any, tmp_path: Path) -> None:
    folder = copy(save_network("llama"), tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    wanted = ["merges.txt", "tokenizer.model", "additional_chat_templates/tools.jinja"]
    for name in [*wanted, "README.md", "modeling_own.py", "optimizer.pt"]:
        (folder / name).write_text("x")
    files = open_source(str(folder)).files
    assert set(files) == {"config.json", "generation_config.json", *wanted}
    assert all(path.is_file() for path in files.values())


def test_a_model_without_tokenizer_files_has_no_tokenizer(save_network: Any) -> None:
    assert load_tokenizer(open_source(str(save_network("llama")))) is None


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_named(
    value: str, save_network: Any, tmp_path: Path
) -> None:
    folder = copy(save_network("gpt2"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 4] = float(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = refusal(folder)
    assert "transformer.h.1.mlp.c_fc.weight" in text
    assert ("NaN" if value == "nan" else "infinite") in text


def test_overflow_in_the_chosen_dtype_is_named(save_network: Any, tmp_path: Path) -> None:
    folder = copy(save_network("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_network(open_source(str(folder)), torch.bfloat16)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight has infinite .* float16"):
        load_network(open_source(str(folder)), torch.float16)


def test_a_pickle_that_would_run_code_is_refused_unrun(save_network: Any, tmp_path: Path) -> None:
    folder = copy(save_network("llama"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    witness = tmp_path / "witness"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (witness,))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Attack()}))
    assert "pytorch_model.bin: not a file of plain weights" in refusal(folder)
    assert not witness.exists()


def test_code_in_the_folder_never_runs(save_network: Any, tmp_path: Path) -> None:
    folder = copy(save_network("llama"), tmp_path / "model")
    witness = tmp_path / "witness"
    for module in ("modeling_own", "configuration_own"):
        (folder / f"{module}.py").write_text(f"open({str(witness)!r}, 'w')")
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_config(folder, auto_map=own)
    load_network(open_source(str(folder)), torch.float32)
    edit_config(folder, model_type="own", architectures=["Own"])
    assert "'own' is unknown to transformers" in (text := refusal(folder))
    assert "never run" in text
    assert not witness.exists()


def test_refusals_of_folders(save_network: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert "not a GGUF file; expected a model folder" in refusal(file)
    assert "drop --revision" in refusal(file, revision="main")
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "drop --revision" in refusal(save_network("llama"), revision="main")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(empty).startswith("empty: no config.json")
    folder = copy(save_network("llama"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "model: no weights; expected model.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert "names b.safetensors, which is missing" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "is not a weight index" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_weight_file_is_refused(keep: int, save_network: Any, tmp_path: Path) -> None:
    folder = copy(save_network("llama"), tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: not a safetensors file" in refusal(folder)


def test_refusals_of_configurations(save_network: Any, tmp_path: Path) -> None:
    folder = copy(save_network("llama"), tmp_path / "model")
    path = folder / "config.json"
    good = path.read_text()
    for text, expected in [
        ("{", "config.json is not JSON"),
        ("[]", "no model_type"),
        ('{"hidden_size": 3}', "no model_type"),
    ]:
        path.write_text(text)
        assert expected in refusal(folder)
    for changes, expected in [
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal"),
        ({"architectures": 3}, "architectures is 3, allowed: a list"),
        ({"hidden_size": "big"}, "'hidden_size' expected int, got str (value: 'big')"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' expected int, got NoneType"),
        ({"num_attention_heads": 0}, "config.json is refused"),
        ({"text_config": 3}, "config.json is refused"),
        ({"rope_parameters": {"rope_theta": []}}, "cannot load it"),
        ({"pad_token_id": 1000}, "cannot load it"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"intermediate_size": 64}, "model"),
    ]:
        path.write_text(good)
        edit_config(folder, **changes)
        assert expected in refusal(folder)
