"""Check what the documents claim: links, commands, Python examples, help texts.

    python tools/check_documents.py [FILE.md ...]

In every Markdown file of the repository:
- a relative link leads to a file or folder that exists;
- in a fenced block of `sh` or `console`, every line that calls `cvxq` parses: the command and its
  options exist and no argument is missing (nothing is run), and every `make` target exists;
- a fenced block of `python` with `>>>` prompts prints what it says (run as a doctest);
- a fenced block that opens with `$ cvxq [COMMAND] --help` shows exactly that help.
"""

import doctest
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)[^)]*\)")
HELP_WIDTH = 80


def markdown_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def broken_links(file: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(FENCE.sub("", text)):
        is_local = "://" not in target and not target.startswith("mailto:")
        if is_local and not (file.parent / target).exists():
            yield f"link to {target}: no such file"


def command_lines(block: str) -> list[str]:
    """The shell commands of a block: `$ ` prompts, continuation lines and comments removed."""
    joined = block.replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [line for line in lines if line.startswith(("cvxq ", "make "))]


def check_call(words: list[str], command: click.Command, name: str = "cvxq") -> str | None:
    """Why `words` is no valid call of `command`, or None. Parses; runs nothing."""
    if "--help" in words[:1]:
        return None
    context = click.Context(command, info_name=name, allow_interspersed_args=False)
    if not isinstance(command, click.Group):
        context.allow_interspersed_args = True
    try:
        values, rest, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return f"{name}: {error.format_message()}"
    for parameter in command.params:
        value = values.get(parameter.name or "")
        is_given = isinstance(value, str | tuple | list) and len(value) > 0
        if parameter.required and not is_given:
            is_option = isinstance(parameter, click.Option)
            said = parameter.opts[0] if is_option else parameter.human_readable_name
            return f"{name}: {said} is missing"
    if isinstance(command, click.Group) and rest:
        found = command.get_command(context, rest[0])
        if found is None:
            return f"{name}: no command {rest[0]!r}"
        return check_call(rest[1:], found, f"{name} {rest[0]}")
    return f"{name}: unexpected argument {rest[0]!r}" if rest else None


def shell_words(line: str) -> list[str]:
    """The words of one simple command: up to a pipe, a redirection or a comment."""
    words: list[str] = []
    without_descriptors = re.sub(r"\s[0-9](?=[<>])", " ", line)  # the 2 of `2>log`
    lexer = shlex.shlex(without_descriptors, posix=True, punctuation_chars="|<>;&")
    lexer.commenters = "#"
    lexer.whitespace_split = True
    for word in lexer:
        if set(word) <= set("|<>;&"):
            break
        words.append(word)
    return words


def wrong_commands(text: str, program: click.Command, make_targets: set[str]) -> Iterator[str]:
    for language, block in FENCE.findall(text):
        if language not in ("sh", "bash", "console"):
            continue
        for line in command_lines(block):
            words = shell_words(line)
            if words[0] == "cvxq":
                problem = check_call(words[1:], program)
                if problem is not None:
                    yield f"`{line}`: {problem}"
            else:
                targets = [word for word in words[1:] if "=" not in word and word[0] != "-"]
                for target in set(targets) - make_targets:
                    yield f"`{line}`: the Makefile has no target {target!r}"


def stale_help(text: str, program: click.Command) -> Iterator[str]:
    for _, block in FENCE.findall(text):
        first, _, shown = block.partition("\n")
        if not (first.startswith("$ cvxq") and first.endswith("--help")):
            continue
        words = shlex.split(first)[2:]
        result = CliRunner().invoke(program, words, prog_name="cvxq", terminal_width=HELP_WIDTH)
        if result.output.strip() != shown.strip():
            yield f"`{first[2:]}` prints something else now:\n{result.output}"


def failing_examples(file: Path, text: str) -> Iterator[str]:
    for number, (language, block) in enumerate(FENCE.findall(text), start=1):
        if language != "python" or ">>>" not in block:
            continue
        test = doctest.DocTestParser().get_doctest(block, {}, f"block {number}", str(file), 0)
        printed: list[str] = []
        result = doctest.DocTestRunner().run(test, out=printed.append)
        if result.failed:
            yield "".join(printed)


def problems(file: Path, program: click.Command, make_targets: set[str]) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    yield from broken_links(file, text)
    yield from wrong_commands(text, program, make_targets)
    yield from stale_help(text, program)
    yield from failing_examples(file, text)


def main() -> int:
    from cvxq.cli.application import application as program

    makefile = (ROOT / "Makefile").read_text()
    make_targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    files = [Path(name) for name in sys.argv[1:]] or markdown_files()
    found = 0
    for file in files:
        for problem in problems(file, program, make_targets):
            print(f"{file.absolute().relative_to(ROOT)}: {problem}", file=sys.stderr)
            found += 1
    print(f"{len(files)} documents checked, {found} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
