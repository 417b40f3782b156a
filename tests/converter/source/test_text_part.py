"""Models of texts and images: their text part is converted, and computes what the whole does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from cvxq_converter.errors import ConversionError
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_converter.source.checkpoint import load_network, open_source
from cvxq_format import Reader

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3() -> Any:
    text = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 8}
    config = t.Gemma3Config(
        text_config={**text, "model_type": "gemma3_text"},
        vision_config={**IMAGES, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return t.Gemma3ForConditionalGeneration(config)


def _llava() -> Any:
    config = t.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**IMAGES, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=90,
    )
    return t.LlavaForConditionalGeneration(config)


def _mistral3() -> Any:
    config = t.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={**IMAGES, "model_type": "pixtral", "head_dim": 8},
        image_token_index=90,
    )
    return t.Mistral3ForConditionalGeneration(config)


def _qwen() -> Any:
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    config = t.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": rope, "rope_theta": 1e4},
        vision_config={**vision, "out_hidden_size": 32},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return t.Qwen2_5_VLForConditionalGeneration(config)


WHOLES: dict[str, Callable[[], Any]] = {
    "Gemma3ForCausalLM": _gemma3,
    "LlamaForCausalLM": _llava,
    "MistralForCausalLM": _mistral3,
    "Qwen2ForCausalLM": _qwen,
}


@pytest.fixture(params=WHOLES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """Class of the text part, the whole, and its folder."""
    torch.manual_seed(0)
    whole = WHOLES[request.param]().eval().requires_grad_(False)
    for parameter in whole.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    whole.save_pretrained(tmp_path / "whole")
    return request.param, whole, tmp_path / "whole"


def test_the_text_part_computes_what_the_whole_does(saved: tuple[str, Any, Path]) -> None:
    name, whole, folder = saved
    part = load_network(open_source(str(folder)), torch.float32)
    assert type(part).__name__ == name
    ids = torch.arange(40)[None] + 3
    torch.testing.assert_close(part(ids).logits, whole(input_ids=ids).logits)


def test_a_file_of_the_text_part_is_whole_in_itself(
    saved: tuple[str, Any, Path], tmp_path: Path
) -> None:
    """Its configuration is that of the text part, its names too; no path of this machine is in."""
    name, _, folder = saved
    path, lines = tmp_path / "a.cvxq", list[str]()
    options = ConversionOptions.of(bits=5.0, calibration="none", group_size=16)
    report = convert(str(folder), path, options, announce=lines.append)
    assert lines[0] == "whole: only its text part is used; images are left out"
    assert report.decoder.is_proved
    with Reader(path) as reader:
        config = json.loads(bytes(reader.file("config.json")))
        names = {*reader.names, *reader.aliases}
        carried = b"".join(bytes(reader.file(file)) for file in reader.files)
    assert config["architectures"] == [name]
    network = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(**config))
    assert names == {n for n, _ in network.named_parameters(remove_duplicate=False)}
    assert str(tmp_path).encode() not in carried


def test_a_part_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _llava().save_pretrained(tmp_path / "whole")
    original = t.LlamaForCausalLM.forward

    def halved(self: Any, *args: Any, **options: Any) -> Any:
        found = original(self, *args, **options)
        found.logits = found.logits / 2
        return found

    monkeypatch.setattr(t.LlamaForCausalLM, "forward", halved)
    with pytest.raises(ConversionError, match="its text part alone computes other logits"):
        load_network(open_source(str(tmp_path / "whole")), torch.float32)


def test_a_tokenizer_of_another_kind_is_carried_as_json_too() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(__file__).parents[3] / "demo" / "model"
    source = open_source(str(folder))
    assert not (folder / "tokenizer.json").exists()
    made = tokenizers.Tokenizer.from_str(source.made["tokenizer.json"].decode())
    text = "Once upon  a time, <s> there was\na ünïcode day."
    assert made.encode(text).ids == t.AutoTokenizer.from_pretrained(folder).encode(text)
