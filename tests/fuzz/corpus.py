"""The sound files that the fuzzer starts from: tiny models of many kinds, and the test vectors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

NOT_LEAN = ("llama-dynamic", "qwen2")  # by their scaling, by their tokenizer
VECTORS = Path(__file__).resolve().parents[2] / "format_spec" / "vectors" / "valid"
FAMILIES = (
    *("llama", "gemma3", "phi3-longrope", "gpt2", "opt", "gpt-neox", "gpt-oss", "mixtral"),
    *NOT_LEAN,
)
TEXT = "The old house stood at the end of the lane, and nobody had lived there for years. "
_TURNS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_TOOLS = (
    "{%- set ns = namespace(system='') %}{%- if messages[0].role == 'system' %}"
    "{%- set ns.system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}"
    "{{- bos_token }}{{- ns.system }}{%- if tools %}{%- for tool in tools %}"
    "{{- tool | tojson(indent=2) }}{%- endfor %}{%- endif %}"
    "{%- macro turn(m) %}<|start|>{{ m.role }}: {{ m.content }}{%- endmacro %}"
    "{%- for m in messages %}{{- turn(m) }}{%- if m.reasoning_content is defined %}"
    "<think>{{ m.reasoning_content }}</think>{%- endif %}{%- if m.role == 'assistant' %}"
    "{% generation %}{{- m.content ~ '<|end|>' }}{% endgeneration %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant: ' }}{%- endif %}"
)
TEMPLATES = (_TURNS, _TOOLS)


def build(folder: Path) -> list[Path]:
    """Write the models to `folder`, unless they are there, and return all files."""
    folder.mkdir(parents=True, exist_ok=True)
    models = [folder / f"{family}.cvxq" for family in FAMILIES]
    for index, path in enumerate(models):
        if not path.exists():
            _make(path, index)
    return models + sorted(VECTORS.glob("*.cvxq"))


def _make(path: Path, index: int) -> None:
    # Imported here: PyTorch and transformers take seconds, and models that are there need neither.
    from tests.conftest import make_companded
    from tests.runtime.conftest import VOCABULARY, random_network, write_file

    network = random_network(path.stem)
    files = {
        **_text_files(index, VOCABULARY),
        "config.json": network.config.to_json_string().encode(),
    }
    write_file(path, network, make_companded, files=files, with_record=True)


def _text_files(index: int, vocabulary: int) -> dict[str, bytes]:
    """A tokenizer of one kind or another, its settings, a chat template, a generation config."""
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    files = {"generation_config.json": {"eos_token_id": [2], "temperature": 0.7, "top_p": 0.9}}
    blobs = {name: json.dumps(value).encode() for name, value in files.items()}
    template = TEMPLATES[index % len(TEMPLATES)]
    if index % 3:
        blobs["chat_template.jinja"] = template.encode()
    else:
        settings["chat_template"] = template
    if index == len(FAMILIES) - 1:
        blobs["tokenizer.model"] = _sentencepiece()
        settings["tokenizer_class"] = "LlamaTokenizer"
    else:
        blobs["tokenizer.json"] = _tokenizer(index % 3, vocabulary).encode()
    blobs["tokenizer_config.json"] = json.dumps(settings).encode()
    return blobs


def _tokenizer(kind: int, vocabulary: int) -> str:
    """A tokenizer.json: bytes and merges, a unigram, or merges with bytes to fall back on."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from tokenizers.processors import TemplateProcessing

    special = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]
    options: dict[str, Any] = {"vocab_size": vocabulary, "show_progress": False}
    options["special_tokens"] = [AddedToken(token, special=True) for token in special]
    trainer: Any = trainers.BpeTrainer(**options)
    if kind == 0:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif kind == 1:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    made.train_from_iterator([TEXT] * 4, trainer)
    begin = made.token_to_id("<s>")
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return str(made.to_str())


def _sentencepiece() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 8),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()
