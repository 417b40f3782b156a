"""What a hostile file has to bear on each path, and how that is judged."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cvxq.cli.failures import UNEXPECTED, describe, exit_code
from cvxq.errors import CvxqError, MissingPartError
from cvxq_format import FormatError

from tests.fuzz.remembered import forget, remember

_PROMPT = "The old house stood at the end of the lane"
_DOCUMENTED = (0, 3, 4, 5)  # that a file can cause
_LONGEST_LINE = 2000
SHARE_OF_COMMANDS = 50


class Verdict(NamedTuple):
    """How a case ended: "loaded", "refused" in one line, or "found", a fault of ours."""

    outcome: str
    text: str = ""


def try_files(path: Path, index: int) -> Verdict:
    """Open, verify and inspect; by what the commands call, or now and then by these."""
    if index % SHARE_OF_COMMANDS:
        remember()
        return look_through(path)
    forget()
    return _commands(path)


def look_through(path: Path) -> Verdict:
    """Do what the commands verify and inspect do."""
    return _judged(lambda: _look_through(path))


def _look_through(path: Path) -> None:
    from cvxq.cli.inspect import context_text, memory_record, rates_text
    from cvxq.summary import summarize
    from cvxq_format import CorruptError, verify

    problems = verify(path)
    if any("\n" in problem.message for problem in problems):
        raise AssertionError(f"a message of several lines: {problems}")
    summary = summarize(path)
    json.dumps({**summary.record(), **memory_record(summary, 1 << 34)})
    assert all([summary.path_text, rates_text(summary), context_text(summary, 1 << 34)])
    if problems:
        raise CorruptError(problems[0].message)


def _commands(path: Path) -> Verdict:
    from cvxq.cli.application import application

    codes = []
    for arguments in (["verify"], ["inspect"], ["inspect", "--json"]):
        out, err = io.StringIO(), io.StringIO()
        code: Any = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                application.main(["--traceback", *arguments, str(path)])
            except SystemExit as error:
                code = error.code or 0
        line = err.getvalue().strip().splitlines()[-1:] or [""]
        shown = out.getvalue() + line[0]
        if any(not (c.isprintable() or c == "\n") for c in shown):
            return Verdict("found", f"{arguments}: control characters: {shown!a:.500}")
        if code not in _DOCUMENTED or bool(code) != line[0].startswith("cvxq: "):
            return Verdict("found", f"{arguments}: exit code {code}, {err.getvalue()[-1500:]}")
        if len(line[0]) > _LONGEST_LINE:
            return Verdict("found", f"{arguments}: a line of {len(line[0])} characters")
        codes.append(code)
    return Verdict("refused", line[0]) if any(codes) else Verdict("loaded")


def try_lean(path: Path, index: int) -> Verdict:
    """Load without transformers; three tokens after a text, and a chat's prompt."""
    return _judged(lambda: _generate(path, {"threads": 1}))


def try_transformers(path: Path, index: int) -> Verdict:
    """Load through transformers, packed or expanded; three tokens, and a chat's prompt."""
    import torch

    options = {"weights": "dense"} if index % 2 else {"dtype": torch.float32}
    return _judged(lambda: _generate(path, {"threads": 1, **options}))


def prepare_files() -> None:
    """Load what `try_files` needs."""
    import cvxq.cli.inspect
    import cvxq.cli.verify  # noqa: F401


def hurry_templates() -> None:
    """Give templates a second: those that never end would take most of the time."""
    from cvxq import rendering

    rendering._RENDERER.seconds = 1.0


def prepare_lean() -> None:
    """Load what `try_lean` needs, and keep everything else away."""
    hurry_templates()
    sys.modules.update({"torch": None, "transformers": None})  # type: ignore[dict-item]
    import cvxq.lean.fast_codec
    import cvxq.lean.native_decoder
    import cvxq.loading
    import cvxq.model  # noqa: F401
    import tokenizers  # noqa: F401


def prepare_transformers() -> None:
    """Load what `try_transformers` needs."""
    hurry_templates()
    import cvxq.cache
    import cvxq.loading
    import cvxq.network  # noqa: F401
    import transformers

    transformers.utils.logging.set_verbosity_error()
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM"):
        getattr(transformers, name)


PATHS: dict[str, tuple[Callable[[], None], Callable[[Path, int], Verdict]]] = {
    "files": (prepare_files, try_files),
    "lean": (prepare_lean, try_lean),
    "transformers": (prepare_transformers, try_transformers),
}


def _generate(path: Path, options: dict[str, Any]) -> None:
    from cvxq.loading import load
    from cvxq.sample import SamplingSettings

    settings = SamplingSettings(max_tokens=3, temperature=0)
    with load(path, **options) as model:
        try:
            assert model.tokenizer is not None
        except MissingPartError:
            session = model.session()
            logits = session.resume([1, 2, 3])
            assert len(logits) == model.vocabulary
            return
        model.generate(_PROMPT, settings)
        with contextlib.suppress(CvxqError):  # of a template that refuses
            model.turns.encode([{"role": "user", "content": _PROMPT}])


def _judged(run: Callable[[], None]) -> Verdict:
    try:
        run()
    except (CvxqError, FormatError) as error:
        text = describe(error)
        if exit_code(error) == UNEXPECTED or len(text) > _LONGEST_LINE:
            return Verdict("found", text[:_LONGEST_LINE])
        return Verdict("refused", text)
    except BaseException as error:
        return Verdict("found", "".join(traceback.format_exception(error))[-3000:])
    return Verdict("loaded")
