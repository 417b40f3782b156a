"""The command group: which subcommands exist, how they load, and the one border for failures.

Importing torch costs seconds, so nothing here may import it: a subcommand's module is imported
when that subcommand is invoked, and the group's help shows the sentences written below, which a
test compares with the subcommands' own. Every exception ends here as one line on stderr and a
documented exit code; `--traceback` shows where it arose as well.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from cvxq.cli.failures import describe, exit_code

COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("cvxq.cli.convert", "Compress a Hugging Face model into one .cvxq file."),
    "measure": ("cvxq.cli.measure", "Measure a model once, for many conversions."),
    "plan": ("cvxq.cli.plan", "Show the sizes and losses that a model can have."),
    "generate": ("cvxq.cli.generate", "Continue a prompt, streaming the text to stdout."),
    "chat": ("cvxq.cli.chat", "Talk with the model, turn by turn."),
    "serve": ("cvxq.cli.serve", "Answer the OpenAI API, and show a page to chat with."),
    "perplexity": ("cvxq.cli.perplexity", "Measure perplexity, and KL to the original."),
    "evaluate": ("cvxq.cli.evaluate", "Score benchmarks by lm-evaluation-harness."),
    "inspect": ("cvxq.cli.inspect", "Show where every byte went, depths and provenance."),
    "verify": ("cvxq.cli.verify", "Check every checksum and invariant of a file."),
    "export": ("cvxq.cli.export", "Write the folder that transformers and vLLM load."),
    "push": ("cvxq.cli.push", "Put a file onto the Hugging Face hub, with a card."),
    "bench": ("cvxq.cli.bench", "Measure loading, prefill, decoding and memory."),
}

BROKEN_PIPE_STATUS = 141  # what a shell reports for a process that died of SIGPIPE


class CommandGroup(click.Group):
    """A group that imports a subcommand on use and turns exceptions into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a model's life, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of `cmd_name` and return its `command`, or None if unknown."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the few options in a line, then the commands: a screen has 24 lines."""
        formatter.write_paragraph()
        formatter.write_text(
            "Options: -h, --help; --version; --traceback to see where an error arose"
        )
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes right below the commands."""
        with formatter.indentation():
            formatter.write_text(str(self.epilog))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, report any failure as one line on stderr, and exit with its code.

        With `standalone_mode` off, exceptions pass through to the caller.
        """
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, False, **extra)
        try:
            status = super().main(arguments, prog_name, complete_var, False, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            _silence_stdout()
            status = BROKEN_PIPE_STATUS
        except (Exception, KeyboardInterrupt) as error:
            with contextlib.suppress(BrokenPipeError):
                if "--traceback" in itertools.takewhile(lambda word: word[:1] == "-", arguments):
                    traceback.print_exception(error)
                click.echo(f"cvxq: {describe(error)}", err=True)
            status = exit_code(error)
        sys.exit(status if isinstance(status, int) else 0)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the group's own options; its help may meet a closed pipe."""
        with _quiet_ends():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        with _quiet_ends():
            return super().invoke(ctx)


class InterruptedByUserError(click.ClickException):
    """Ctrl-C outside of a place that handles it."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted")


@contextlib.contextmanager
def _quiet_ends() -> Iterator[None]:
    """Keep an interrupt and a closed pipe away from what click prints for them."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedByUserError from None
    except BrokenPipeError:
        _silence_stdout()
        raise click.exceptions.Exit(BROKEN_PIPE_STATUS) from None


def _silence_stdout() -> None:
    """Point stdout at the null device, so that the flush at exit cannot fail again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def prepare_process() -> None:
    """Set what belongs to a whole process: idle threads, warnings, lenient output."""
    # torch's threads spin while they wait for each other. Where anything else runs on the machine,
    # that makes small products a hundred times slower; sleeping costs a few microseconds. Read
    # once, when torch loads; what the user has set stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells each try; we tell how it ended
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without UTF-8 gets ? instead of a crash
            stream.reconfigure(errors="replace")


@click.group(
    "cvxq",
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExit codes: 0 done, 1 unexpected, 2 usage, 3 file missing or unreadable,\n"
    "4 corrupt, 5 unsupported, 6 conversion failed, 130 interrupt, 141 broken pipe",
)
@click.version_option(package_name="cvxq", message="cvxq %(version)s")
@click.option("--traceback", is_flag=True, help="Show where an error arose, not just one line.")
def application(**_: bool) -> None:
    """\b
    Compress a language model to a chosen number of bits per weight, and run it:
      cvxq convert path/to/model -o model.cvxq --bits 3
      cvxq generate model.cvxq "Once upon a time"
    """
    # --traceback is read where failures end (`CommandGroup.main`), since parsing itself may fail.
