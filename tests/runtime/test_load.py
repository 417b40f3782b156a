"""A loaded file computes what the original architecture does with the dequantized weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq
import pytest
import torch
from cvxq.errors import (
    ArgumentError,
    InconsistentFileError,
    MissingPartError,
    UnsupportedModelError,
)
from cvxq.lean.tokenizer import LeanTokenizer
from cvxq.modules import LazyWeight, PackedEmbedding, PackedLinear
from cvxq_format import CorruptError
from cvxq_kernels import cpu
from torch import nn

TOLERANCE = 1e-4  # of float32 logits; sums may be ordered differently, nothing else may differ
IDS = torch.arange(40).reshape(2, 20) * 7 % 96

MakeFile = Callable[..., Any]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU's kernels, where they are, multiply in float32 throughout."""
    monkeypatch.setattr("cvxq.modules._PackedModule.exact", True)


def logits(network: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = network(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return result


def largest_difference(made: Any, **options: Any) -> float:
    expected = logits(made.network)
    assert expected.std() > 0.01  # else equality would say nothing
    with cvxq.load(made.path, **options) as model:
        return float((logits(model.network) - expected).abs().max())


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_logits_equal_the_original_architecture(
    kind: str, weights: str, make_file: MakeFile
) -> None:
    assert largest_difference(make_file(kind), weights=weights) <= TOLERANCE


@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_biases_that_the_source_lacked(kind: str, weights: str, make_file: MakeFile) -> None:
    made = make_file(kind, add_biases=True)
    assert largest_difference(made, weights=weights) <= TOLERANCE


def test_gpt2_names_of_its_hub_checkpoint(make_file: MakeFile) -> None:
    def on_the_hub(name: str) -> str:
        return name.removeprefix("transformer.")

    made = make_file("gpt2", rename=on_the_hub, leave_out=("lm_head.weight",))
    assert largest_difference(made) <= TOLERANCE


def test_names_with_a_prefix_too_many(make_file: MakeFile) -> None:
    made = make_file("opt", rename=lambda name: name.removeprefix("model."))
    assert largest_difference(made) <= TOLERANCE


def test_tied_matrices_are_held_once(make_file: MakeFile) -> None:
    made = make_file("llama-tied")
    with cvxq.load(made.path) as model:
        head, embedding = model.network.lm_head, model.network.model.embed_tokens
        assert isinstance(head, PackedLinear)
        assert isinstance(embedding, PackedEmbedding)
        assert head.packed.codes.data_ptr() == embedding.packed.codes.data_ptr()
    with cvxq.load(made.path, weights="dense") as model:
        assert model.network.lm_head.weight is model.network.model.embed_tokens.weight


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_the_file_decides_what_is_tied(weights: Any, make_file: MakeFile) -> None:
    made = make_file("llama-tied")
    own = changed(made.network.config, tie_word_embeddings=False)
    untied_by_config = make_file("llama-tied", "alias.cvxq", files=own)
    assert largest_difference(untied_by_config, weights=weights) <= TOLERANCE
    own = changed(make_file("llama").network.config, tie_word_embeddings=True)
    tied_by_config = make_file("llama", "two.cvxq", files=own)
    assert largest_difference(tied_by_config, weights=weights) <= TOLERANCE


def test_logits_without_the_native_kernels(
    kind: str, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    assert largest_difference(make_file(kind)) <= TOLERANCE


def test_gradients_pass_through_packed_modules(make_file: MakeFile) -> None:
    made = make_file("llama")
    inputs = torch.randn(1, 5, 32)
    gradients = []
    with cvxq.load(made.path) as model:
        for network in (model.network, made.network):
            x = inputs.clone().requires_grad_()
            network(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
            gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_packed_holds_no_dense_matrix(make_file: MakeFile) -> None:
    made = make_file("llama")
    with cvxq.load(made.path) as model:
        assert all(parameter.dim() == 1 for parameter in model.network.parameters())
        packed = [m.packed for m in model.network.modules() if hasattr(m, "packed")]
    assert len(packed) == 2 + 2 * 7
    everything = sum(p.numel() * 4 for p in made.network.parameters() if p.dim() == 2)
    codes = sum(weight.codes.nbytes for weight in packed)
    assert codes < everything / 6  # depths 0 to 8, 4 on average, against 32 bits


def test_a_lazy_weight_acts_like_the_matrix(make_file: MakeFile) -> None:
    made = make_file("gpt2")
    block = made.network.transformer.h[0].mlp.c_fc
    with cvxq.load(made.path) as model:
        lazy = model.network.transformer.h[0].mlp.c_fc.weight
        assert isinstance(lazy, LazyWeight)
        assert (lazy.shape, lazy.dtype) == (block.weight.shape, torch.float32)
        assert torch.equal(lazy + 0, block.weight)
        assert not isinstance(lazy * 2, LazyWeight)
        assert repr(lazy) == "LazyWeight(shape=(32, 128), dtype=torch.float32)"


def test_bfloat16_computes_in_bfloat16(make_file: MakeFile) -> None:
    made = make_file("llama")
    with cvxq.load(made.path, dtype=torch.bfloat16) as model:
        found = logits(model.network)
        assert model.network.model.rotary_emb.inv_freq.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    expected = logits(made.network)
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_moving_to_another_dtype_moves_packed_modules_too(make_file: MakeFile) -> None:
    with cvxq.load(make_file("llama").path) as model:
        network = model.network.to(torch.float64)
        assert logits(network).dtype == torch.float64


def test_a_missing_tensor_is_named(make_file: MakeFile) -> None:
    made = make_file("llama", leave_out=("model.norm.weight",), with_record=False)
    with pytest.raises(InconsistentFileError, match=r"needs tensor 'model\.norm\.weight', not in"):
        cvxq.load(made.path)


def test_an_unexpected_tensor_is_named(make_file: MakeFile) -> None:
    def misspell(name: str) -> str:
        return name.replace("model.norm", "model.morn")

    made = make_file("llama", rename=misspell, with_record=False)
    with pytest.raises(InconsistentFileError, match=r"model\.norm\.weight"):
        cvxq.load(made.path)


def changed(config: Any, **changes: Any) -> dict[str, bytes]:
    settings = {**json.loads(config.to_json_string()), **changes}
    return {"config.json": json.dumps(settings).encode()}


def test_a_wrong_shape_is_named(make_file: MakeFile) -> None:
    config = make_file("llama").network.config
    made = make_file("llama", "wide.cvxq", files=changed(config, intermediate_size=80))
    with pytest.raises(
        InconsistentFileError, match=r"gate_proj\.weight' has shape \(48, 32\).*needs \(80, 32\)"
    ):
        cvxq.load(made.path)


def test_an_unknown_architecture_is_named(make_file: MakeFile) -> None:
    config = make_file("llama").network.config
    made = make_file("llama", "new.cvxq", files=changed(config, model_type="brand_new"))
    with pytest.raises(cvxq.CvxqError, match="'brand_new'") as failure:
        cvxq.load(made.path)
    assert failure.value.exit_code == 5
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_a_value_that_stops_the_network_is_named(weights: str, make_file: MakeFile) -> None:
    config = make_file("gpt-oss").network.config
    files = changed(config, num_experts_per_tok=9)
    made = make_file("gpt-oss", "many.cvxq", files=files, with_record=False)
    with cvxq.load(made.path, weights=weights, dtype=torch.float32) as model:
        session = model.session()
    with pytest.raises(UnsupportedModelError, match=r"config\.json fails: RuntimeError: selected"):
        session.resume([1, 2, 3])
    assert session.ids == []


def test_code_of_the_checkpoint_is_never_run(make_file: MakeFile, tmp_path: Path) -> None:
    config = make_file("llama").network.config
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\n".encode()
    own = changed(config, model_type="brand_new", auto_map={"AutoConfig": "evil.Config"})
    made = make_file("llama", "evil.cvxq", files={**own, "evil.py": code})
    with pytest.raises(cvxq.CvxqError, match="brand_new"):
        cvxq.load(made.path)
    assert not mark.exists()


def test_an_encoder_is_no_causal_model(make_file: MakeFile) -> None:
    own = {"config.json": b'{"model_type": "clip_text_model"}'}
    with pytest.raises(cvxq.CvxqError, match="clip_text_model"):
        cvxq.load(make_file("llama", files=own).path)


def test_config_that_is_no_json(make_file: MakeFile) -> None:
    with pytest.raises(InconsistentFileError, match=r"config\.json of the file is not JSON"):
        cvxq.load(make_file("llama", files={"config.json": b"{"}).path)


def test_arguments_are_checked(make_file: MakeFile) -> None:
    made = make_file("llama")
    with pytest.raises(ArgumentError, match="weights is 'unpacked', allowed: 'packed', 'dense'"):
        cvxq.load(made.path, weights="unpacked")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"dtype is torch\.int8"):
        cvxq.load(made.path, dtype=torch.int8)


def test_a_flipped_bit_is_found_and_named(make_file: MakeFile) -> None:
    made = make_file("llama")
    with cvxq.load(made.path) as model:
        entry = model.reader.entry("lm_head.weight")
    data = bytearray(made.path.read_bytes())
    data[entry.offset + entry.size // 2] ^= 4
    made.path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"lm_head\.weight"):
        cvxq.load(made.path)
    cvxq.load(made.path, check=False).close()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cvxq.load(tmp_path / "nothing.cvxq")


def test_generation_config_of_the_file(make_file: MakeFile) -> None:
    own = {"generation_config.json": b'{"eos_token_id": [2, 5], "temperature": 0.5}'}
    with cvxq.load(make_file("llama", files=own).path) as model:
        assert model.end_ids == {2, 5}
        assert model.generation_config.temperature == 0.5
    with cvxq.load(make_file("llama", "without.cvxq").path) as model:
        assert model.end_ids == {2}
        assert model.context_length == 64


@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ([5, 6], 7, "</s>", {5, 6, 7, 97}),
        (None, [7, 8], None, {7, 8}),
        (5, None, None, {5}),
        (None, None, "</s>", {2, 97}),  # 2: what a Llama has by default
        (None, None, None, {2}),
    ],
)
def test_end_tokens_are_all_that_are_stated(
    make_file: MakeFile,
    character_tokenizer: Callable[[str | None], Any],
    weights: Any,
    generation: object,
    config: object,
    tokenizer: str | None,
    expected: set[int],
) -> None:
    settings = json.loads(make_file("llama", "other.cvxq").network.config.to_json_string())
    del settings["eos_token_id"]
    if config is not None:
        settings["eos_token_id"] = config
    files = {
        "config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps({"eos_token_id": generation}).encode(),
    }
    own = character_tokenizer(None)
    names = {} if tokenizer is None else {"eos_token": tokenizer}
    with cvxq.load(
        make_file("llama", files=files, with_record=True).path, weights=weights
    ) as model:
        vars(model)["tokenizer"] = LeanTokenizer(own.codec, names, None)
        assert (model.decoder is None) == (weights == "dense")
        assert model.end_ids == expected


def test_without_a_tokenizer_only_text_is_refused(make_file: MakeFile) -> None:
    others = {"report.json": b"{}", "provenance.json": b"{}", "decoder.json": b'{"version":99}'}
    with (
        cvxq.load(make_file("llama", files=others).path) as model,
        pytest.raises(MissingPartError, match="the file has no tokenizer"),
    ):
        model.encode("Hello")


ROPE = {"rope_theta": 700.0, "rope_type": "linear", "factor": 2.0}
SPELLINGS = {
    "version 4": {"rope_theta": 700.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "version 5": {"rope_parameters": ROPE},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rotary_settings_of_either_transformers_version(spelling: str, make_file: MakeFile) -> None:
    config = make_file("llama").network.config
    settings = json.loads(config.to_json_string())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        settings.pop(key, None)
    blob = json.dumps({**settings, **SPELLINGS[spelling]}).encode()
    made = make_file("llama", "rope.cvxq", files={"config.json": blob})
    with cvxq.load(made.path) as model:
        frequencies = model.network.model.rotary_emb.inv_freq
    expected = 700.0 ** (-torch.arange(0, 8, 2) / 8) / 2
    torch.testing.assert_close(frequencies, expected)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("phi", {"partial_rotary_factor": 0.5}),
        ("gpt-neox", {"rotary_pct": 0.5, "rotary_emb_base": 300}),
    ],
)
def test_partial_rotary_settings_of_either_version(
    kind: str, own: dict[str, float], make_file: MakeFile
) -> None:
    made = make_file(kind)
    expected = logits(made.network)
    settings = json.loads(made.network.config.to_json_string())
    base = own.get("rotary_emb_base", 10000.0)
    for key in ("rope_theta", "rope_scaling", "rope_parameters", *own):
        settings.pop(key, None)
    new = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": 0.5}
    for index, spelling in enumerate(({"rope_parameters": new}, {**own})):
        blob = json.dumps({**settings, **spelling}).encode()
        other = make_file(kind, f"{index}.cvxq", files={"config.json": blob})
        with cvxq.load(other.path) as model:
            assert (logits(model.network) - expected).abs().max() <= TOLERANCE


def test_importing_stays_light() -> None:
    code = "import sys, cvxq; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_running_needs_no_converter() -> None:
    code = (
        "import sys, cvxq, cvxq.loading, cvxq.evaluate, cvxq.generate\n"
        "sys.exit(any(name.startswith('cvxq_converter') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
