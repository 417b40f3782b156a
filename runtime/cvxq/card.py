"""The model card of a `.cvxq` file: what its own provenance and quality report say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from cvxq.summary import FileSummary

MARK = "<!-- Written by `cvxq push`, which replaces it unless this line is removed. -->"

# Options of `cvxq convert` that are named where they are not these, by their names in a provenance.
DEFAULTS: Mapping[str, Any] = {
    "bits": None,
    "size_bytes": None,
    "max_kl": None,
    "max_perplexity_increase": None,
    "keep": [],
    "calibration": "self",
    "sequences": None,
    "length": None,
    "seed": 0,
    "metric": "kl",
    "group_size": 64,
    "partitions": 8,
    "revision": None,
    "dtype": "float32",
    "iterations": 1,
    "tune": None,
    "method": "cvxq",
}
_SPELLED = {"size_bytes": "--size"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def base_of(summary: FileSummary) -> str | None:
    """Return the hub id that a file was converted from, None where it was something else."""
    source = str((summary.provenance or {}).get("source", ""))
    return source if _HUB_ID.fullmatch(source) else None


def model_card(summary: FileSummary, repo: str, base: str | None) -> str:
    """Return README.md for the repository `repo`; base: the original's hub id, if it has one."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        library_name="cvxq",
        pipeline_tag="text-generation",
        tags=["cvxq", "quantized"],
        base_model_relation="quantized" if base else None,
    )
    original = f"[{base}](https://huggingface.co/{base})" if base else "A model"
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(summary))
    return f"""---
{data.to_yaml()}
---
{MARK}

# {repo.partition("/")[2]}

{original}, compressed by cvxq into one file, `model.cvxq`.

| | |
|---|---:|
{rows}
{_measured(summary)}
```sh
pip install cvxq
cvxq generate {repo} "Once upon a time"
cvxq chat {repo}
```

In transformers, with `pip install 'cvxq[convert]'`:

```python
import cvxq.transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```
{_making(summary, base)}"""


def _rows(summary: FileSummary) -> list[tuple[str, str]]:
    report = summary.report or {}
    rows = []
    if summary.rate_bits_per_weight is not None:
        rows.append(("bits per weight, all-in", f"{summary.rate_bits_per_weight:.3f}"))
    rows.append(("file", f"{summary.file_bytes / 1e6:,.1f} MB"))
    rows.append(("parameters", f"{summary.parameters / 1e6:,.1f} M"))
    if report.get("kl") is not None:
        error = report.get("kl_standard_error")
        spread = f" ± {error:.4f}" if error else ""
        rows.append(("KL to the original, nats per token", f"{report['kl']:.4f}{spread}"))
    if report.get("perplexity_increase") is not None:
        rows.append(("perplexity, against the original's", f"{report['perplexity_increase']:+.1%}"))
    return rows


def _measured(summary: FileSummary) -> str:
    """Return what the losses were measured on, if there are any."""
    if (summary.report or {}).get("kl") is None:
        return ""
    return "\nKL and perplexity are those on held-back calibration sequences.\n"


def _making(summary: FileSummary, base: str | None) -> str:
    """Return how the file was made, as far as it says so."""
    provenance = summary.provenance or {}
    if "options" not in provenance:
        return ""
    source = base or str(provenance.get("source", "MODEL"))
    command = conversion_command(source, provenance["options"])
    version = (provenance.get("versions") or {}).get("cvxq", "")
    return f"""
Made by cvxq {version}:

```sh
{command}
```
"""


def conversion_command(source: str, options: Mapping[str, Any]) -> str:
    """Return the `cvxq convert` that the options of a provenance record."""
    words = ["cvxq", "convert", source, "-o", "model.cvxq"]
    for name, default in DEFAULTS.items():
        value = options.get(name, default)
        if value == default:
            continue
        option = _SPELLED.get(name, f"--{name.replace('_', '-')}")
        for item in value if isinstance(value, list) else [value]:
            words += [option, _word(name, item)]
    return shlex.join(words)


def _word(name: str, value: Any) -> str:
    if name == "size_bytes":
        return f"{value}B"
    if name == "max_perplexity_increase":
        return f"{100 * value:g}%"
    return f"{value:g}" if isinstance(value, float) else str(value)
