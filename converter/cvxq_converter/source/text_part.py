"""The language model inside a model of texts and images: its configuration, its network.

transformers loads the whole; the text part is then put into the class that transformers has for
such a model alone, and has to compute the same logits for a text without images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cvxq_converter.errors import ConversionError

# Model type of the whole → class of the whole.
WRAPPERS: Mapping[str, str] = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
_PROBE_TOKENS = 24
_TOLERANCE = 1e-3  # of the range of the logits: other kernels, other order of sums


def text_config_of(config: Any, name: str) -> Any:
    """Return the configuration of the text part alone; ConversionError if it has no class."""
    text = config.get_text_config()
    if text.model_type == "qwen2_5_vl_text":  # three equal places in each token turn like one
        values = text.to_dict()
        for key in ("mrope_section", "type"):
            values["rope_parameters"].pop(key, None)
        del values["model_type"]
        text = transformers.Qwen2Config(**values)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConversionError(
            f"{name}: its text part, {text.model_type}, is no causal LM; "
            "only those can be converted"
        )
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    for field in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype"):
        if getattr(text, field, None) is None:
            setattr(text, field, getattr(config, field, None))
    return text


def text_config_json(text: Any) -> str:
    """The config.json of the text part, every field written out, without paths of this machine."""
    values = json.loads(text.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


@torch.no_grad()
def load_text_part(
    weights: dict[str, Tensor], config: Any, text_config: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the text part's network and what loading the whole said.

    weights, config: of the whole; options: of `from_pretrained`. Raises ConversionError if the
    part does not compute what the whole does.
    """
    whole_class = getattr(transformers, WRAPPERS[config.model_type])
    whole, info = whole_class.from_pretrained(None, config=config, state_dict=weights, **options)
    whole.eval()
    part = transformers.AutoModelForCausalLM.from_config(text_config, dtype=options["dtype"])
    part.get_decoder().load_state_dict(whole.model.language_model.state_dict(), assign=True)
    part.get_output_embeddings().weight = whole.get_output_embeddings().weight
    if text_config.tie_word_embeddings:
        part.tie_weights()
    part.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text_config.vocab_size, (1, _PROBE_TOKENS), generator=generator)
    ids[ids == getattr(config, "image_token_id", -1)] = 0
    expected, found = whole(input_ids=ids).logits.float(), part(ids).logits.float()
    error, size = float((found - expected).abs().max()), float(expected.max() - expected.min())
    share = _TOLERANCE if part.dtype is torch.float32 else 0.05
    if not error <= share * size:
        raise ConversionError(
            f"its text part alone computes other logits (by {error:.2g} of {size:.2g}); "
            "this architecture is not supported"
        )
    return part, info
