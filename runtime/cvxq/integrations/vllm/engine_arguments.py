"""`--model FILE.cvxq`: vLLM is shown a folder that stands for the file.

The folder holds what `cvxq export` writes, with a link to the file, and lies in vLLM's cache; it is
made once for each state of a file.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import EngineArgs

from cvxq.integrations.vllm.folder import folder_of

_SUFFIX = ".cvxq"
_MARK = "accepts_cvxq"


def accept_files() -> None:
    """Let the arguments of this process's engines name a file."""
    original = EngineArgs.create_engine_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **options: Any) -> Any:
        if str(self.model).endswith(_SUFFIX):
            named = str(self.model)
            self.served_model_name = self.served_model_name or [named]
            self.model = str(folder_of(Path(named), Path(envs.VLLM_CACHE_ROOT) / "cvxq"))
            if self.tokenizer == named:
                self.tokenizer = None
        return original(self, *args, **options)

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config
