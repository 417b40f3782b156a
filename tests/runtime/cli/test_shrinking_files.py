"""A file that another program truncates while it is mapped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxq
import pytest
from cvxq_kernels import cpu

PROGRAM = """
import os, sys
from pathlib import Path
from cvxq.cli.failures import existing_file
from cvxq_format import Reader
path = existing_file(Path(sys.argv[1]), "a .cvxq file")
with Reader(path) as reader:
    os.truncate(path, 0)
    reader.read(reader.names[0])
print("not noticed")
"""


@pytest.mark.skipif(
    not cpu.is_available() or os.name != "posix", reason="the system does not tell of it"
)
def test_a_file_that_shrinks_while_it_is_read(model_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model_file)], capture_output=True, text=True
    )
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("cvxq: a file that is in use was made shorter")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3"])
def test_a_loaded_model_needs_its_file_no_more(
    kind: str, make_file: Callable[..., Any], plain_tokenizer: dict[str, bytes]
) -> None:
    path = make_file(kind, files=plain_tokenizer, with_record=True).path
    with cvxq.load(path) as model:
        if model.decoder is None:
            pytest.skip("it runs through transformers")
        before = model.session().resume([5, 6, 7])
        os.truncate(path, 0)
        assert (model.session().resume([5, 6, 7]) == before).all()
