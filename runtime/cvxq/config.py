"""A model's config.json as the transformers config that it describes.

Only code of the installed transformers is ever run.  Where transformers refuses a value, sometimes
in words that name neither field nor value, the field is found by leaving out one at a time.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from cvxq_format.unfinished import disk_error, temporary_folder
from transformers import CONFIG_MAPPING, AutoConfig

from cvxq.errors import InconsistentFileError, UnsupportedModelError

Settings = Mapping[str, Any]


def read_config(settings: Settings, file: str) -> Any:
    """Return the transformers config of a parsed config.json.

    file: what to call the config.json in errors.
    Raises UnsupportedModelError when the installed transformers has no such model;
    InconsistentFileError, which names the field if there is one to blame, for values that it
    refuses.
    """
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        found = _cut(json.dumps(kind), 60)
        raise InconsistentFileError(f"{file}: model_type is {found}, allowed: a model type's name")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{file}: transformers {transformers.__version__} has no model of type {kind!r}; "
            "another version may"
        )
    try:
        return parse(settings)
    except Exception as error:  # every architecture checks its fields in its own way
        if full := disk_error(error, Path(tempfile.gettempdir())):
            raise full from error
        refused = f"{file}: {blame(settings, parse)}transformers refuses it: {reason(error)}"
        raise InconsistentFileError(refused) from error


def parse(settings: Settings) -> Any:
    """Return the transformers config of a parsed config.json; raises anything."""
    with temporary_folder("cvxq-config") as folder:
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def blame(settings: Settings, build: Callable[[Settings], object]) -> str:
    """Return "FIELD is VALUE; " for the first field without which `build` succeeds, else ""."""
    for name, value in settings.items():
        with contextlib.suppress(Exception):
            build({other: settings[other] for other in settings if other != name})
            return f"{name} is {_cut(json.dumps(value), 60)}; "
    return ""


def reason(error: BaseException) -> str:
    """Return in one line what `error` says, or what caused it: transformers wraps its checks."""
    told = error.__cause__ or error
    first = next((line.strip() for line in str(told).splitlines() if line.strip()), "no reason")
    text = re.sub(r"<class '([^']+)'>", r"\1", first.partition(". Errors:")[0])  # types allowed
    return f"{type(told).__name__}: {_cut(text, 240)}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
