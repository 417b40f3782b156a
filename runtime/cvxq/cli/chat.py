"""`cvxq chat`: turns from the terminal or a pipe, answers as they come."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from cvxq.chat import ChatError, Conversation, Prompt, turn_format
from cvxq.cli.failures import FileProblem, existing_file
from cvxq.cli.options import (
    context_option,
    full_text,
    load_model,
    running_options,
    sampling_options,
    sampling_settings,
    shift_option,
)

if TYPE_CHECKING:
    from cvxq.model import Model
    from cvxq.sample import SamplingSettings

HELP = """\
/help   this list
/clear  forget the conversation so far
/exit   leave (so does Ctrl-D)
Ctrl-C  stop the answer"""


@click.command("chat", short_help="Talk with the model, turn by turn.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="Instructions in front of the conversation.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Per answer.")
@sampling_options
@context_option
@shift_option
@running_options
def command(
    file: Path,
    system: str | None,
    max_tokens: int,
    context: int | None,
    shift: bool,
    weights: str,
    device: str,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Talk with the model in FILE; a line is a turn, answers go to stdout.

    Turns are framed by the model's chat template, or as "User:" and "Assistant:" lines if it has
    none. When the context is full, the oldest turns are dropped with a notice; an answer that
    fills it ends there, unless --shift drops the oldest half of the text, the system turn kept.
    Lines may come from a pipe. /help lists the commands inside.

    \b
    Example:
      cvxq chat model.cvxq --system "You answer in one sentence."
    """
    existing_file(file, "a .cvxq file")
    settings = sampling_settings(sampling, max_tokens)
    with load_model(file, weights, device, threads, context) as model:
        Chat(model, settings, system, shift).run()


class AnswerStoppedError(Exception):
    """Ctrl-C came while an answer was being generated."""


class Chat:
    """The loop of question and answer over one model."""

    def __init__(
        self, model: Model, settings: SamplingSettings, system: str | None, shift: bool
    ) -> None:
        """Prepare an empty conversation; MissingPartError if the file has no tokenizer."""
        self.model = model
        self.settings = settings
        self.format = turn_format(model.tokenizer)
        self.session = model.session()
        self.conversation = Conversation(
            self.format.encode, model.context_length, settings.max_tokens or 1, system
        )
        self.conversation.shifts = shift
        self.is_terminal = sys.stdin.isatty()
        self.turns = 0

    def run(self) -> None:
        """Answer until the input ends or /exit."""
        notice(f"{self.format.name}; /help lists the commands")
        while (line := self.read()) is not None:
            word = line.strip()
            if word == "/exit":
                return
            if word == "/clear":
                self.conversation.clear()
                notice("the conversation is forgotten")
            elif word == "/help":
                notice(HELP)
            elif word.startswith("/"):
                notice(f"no command {word.split()[0]}; /help lists them")
            elif word:
                self.take_turn(line)

    def read(self) -> str | None:
        """Return the next line, or None at the end of the input."""
        try:
            while True:
                try:
                    if self.is_terminal and not sys.stdout.isatty():
                        click.echo("> ", nl=False, err=True)
                        return input()
                    return input("> " if self.is_terminal else "")
                except KeyboardInterrupt:
                    if not self.is_terminal:
                        raise
                    notice("\n/exit or Ctrl-D leaves")
        except EOFError:
            if self.is_terminal:
                click.echo(err=True)
            return None
        except UnicodeDecodeError as error:
            raise FileProblem(f"stdin: byte {error.start} of the line is not UTF-8") from None

    def take_turn(self, text: str) -> None:
        """Answer one question, or say why it cannot be asked."""
        try:
            prompt = self.conversation.ask(text)
        except ChatError as error:
            notice(str(error))
            return
        if prompt.dropped_turns:
            turns = "turn" if prompt.dropped_turns == 1 else f"{prompt.dropped_turns} turns"
            notice(f"the context is full: dropped the oldest {turns}")
        self.session.keep = prompt.keep
        answer, stopped = self.answer(prompt)
        click.echo()
        if prompt.keep is None and self.session.room in (0, 1):  # the last token may be unread
            notice(full_text(self.session.context_length))
        if stopped or not answer:
            notice("stopped" if stopped else "the model ended its answer at once")
        if answer:
            self.conversation.answered(answer)
        else:
            self.conversation.withdraw()

    def answer(self, prompt: Prompt) -> tuple[str, bool]:
        """Generate and print an answer; return its text and whether Ctrl-C cut it short."""
        seed = self.settings.seed
        settings = replace(
            self.settings,
            max_tokens=prompt.room,
            seed=None if seed is None else seed + self.turns,  # turns draw independently
            stop=(*self.settings.stop, *self.format.stop),
        )
        self.turns += 1
        shown = ""
        with interruptible() as interrupt:

            def show(piece: str) -> None:
                nonlocal shown
                piece = piece if shown else piece.lstrip()
                shown += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
                if interrupt.came:
                    raise AnswerStoppedError

            try:
                self.model.generate(prompt.ids, settings, on_text=show, session=self.session)
            except (AnswerStoppedError, KeyboardInterrupt):
                return shown.rstrip(), True
        return shown.rstrip(), False


class Interrupt:
    """Whether Ctrl-C came."""

    came = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note a first Ctrl-C, to stop between two tokens with the cache intact; obey a second."""
    interrupt = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.came:
            raise KeyboardInterrupt
        interrupt.came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def notice(text: str) -> None:
    """Tell the user something that is not an answer."""
    click.echo(text, err=True)
