"""`cvxq chat`: turns from the terminal or a pipe, answers as they come."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from cvxq.chat import Conversation, Prompt
from cvxq.cli.failures import FileProblem, describe
from cvxq.cli.options import (
    context_option,
    full_text,
    load_model,
    model_file,
    running_options,
    sampling_options,
    sampling_settings,
    shift_option,
)
from cvxq.errors import CvxqError
from cvxq.rendering import begin
from cvxq.thinking import Reply, opened_marks

if TYPE_CHECKING:
    from cvxq.model import Model
    from cvxq.sample import SamplingSettings

COMMANDS = ("/help", "/clear", "/exit")
HELP = """\
/help   this list
/clear  forget the conversation so far
/exit   leave (so does Ctrl-D)
//      begins a message with a slash: //help sends /help; so does a slash before any other word
Ctrl-C  stop the answer"""
_TAIL = 16  # tokens at the end of a prompt, in which a mark of thinking may stand


@click.command("chat", short_help="Talk with the model, turn by turn.")
@click.argument("file")
@click.option("--system", metavar="TEXT", help="Instructions in front of the conversation.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Per answer.")
@click.option(
    "--hide-thinking", is_flag=True, help="Show answers without the thinking before them."
)
@sampling_options
@context_option
@shift_option
@running_options
def command(
    file: str,
    system: str | None,
    max_tokens: int,
    hide_thinking: bool,
    context: int | None,
    shift: bool,
    weights: str,
    device: str,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Talk with the model in FILE; a line is a turn, answers go to stdout.

    Turns are framed by the model's chat template, or as "User:" and "Assistant:" lines if it has
    none. What a model thinks before it answers is dimmed on a terminal. When the context is full,
    the oldest turns are dropped with a notice; an answer that fills it ends there, unless --shift
    drops the oldest half of the text, the system turn kept. Lines may come from a pipe. /help lists
    the commands inside; any other line is sent to the model, whatever it begins with.

    \b
    Example:
      cvxq chat model.cvxq --system "You answer in one sentence."
    """
    path = model_file(file)
    settings = sampling_settings(sampling, max_tokens)
    begin()
    with load_model(path, weights, device, threads, context) as model:
        chat = Chat(model, settings, system, hide_thinking=hide_thinking, shift=shift)
        chat.run()
    click.get_current_context().exit(chat.exit_code)


class AnswerStoppedError(Exception):
    """Ctrl-C came while an answer was being generated."""


class Chat:
    """The loop of question and answer over one model."""

    def __init__(
        self,
        model: Model,
        settings: SamplingSettings,
        system: str | None,
        *,
        hide_thinking: bool,
        shift: bool,
    ) -> None:
        """Prepare an empty conversation; MissingPartError if the file has no tokenizer."""
        self.model = model
        self.format = model.turns
        self.settings = replace(settings, stop=(*settings.stop, *self.format.stop))
        self.hide_thinking = hide_thinking
        self.session = model.session()
        self.conversation = Conversation(
            self.format.encode,
            model.context_length,
            settings.max_tokens or 1,
            system,
            shifts=shift,
        )
        self.is_terminal = sys.stdin.isatty()
        if not self.is_terminal and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8-sig")  # in any locale; a mark may come first
        self.turns = 0
        self.has_answered = False
        self.failure: CvxqError | None = None
        if system and not self.format.has_system:
            notice("the chat template has no system role: --system goes before the first message")

    @property
    def exit_code(self) -> int:
        """0, or that of the last failure if no turn got an answer."""
        return 0 if self.failure is None or self.has_answered else self.failure.exit_code

    def run(self) -> None:
        """Answer until the input ends or /exit."""
        notice(f"{self.format.name}; /help lists the commands")
        while (line := self.read()) is not None:
            command = line.rstrip()
            if command == "/exit":
                return
            if command == "/clear":
                self.conversation.clear()
                notice("the conversation is forgotten")
            elif command == "/help":
                notice(HELP)
            elif command:
                if is_like_command(command):
                    notice(f"{command} is no command, so it is sent; /help lists the commands")
                self.take_turn(line.removeprefix("/") if line.startswith("//") else line)

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
            raise FileProblem(
                f"stdin: byte {error.start} of the line is not UTF-8, expected UTF-8"
            ) from None

    def take_turn(self, text: str) -> None:
        """Answer one question, or say why it cannot be answered."""
        try:
            prompt = self.conversation.ask(text)
        except CvxqError as error:
            self.fail(error)
            return
        if prompt.dropped_turns:
            turns = "turn" if prompt.dropped_turns == 1 else f"{prompt.dropped_turns} turns"
            notice(f"the context is full: dropped the oldest {turns}")
        self.session.keep = prompt.keep
        thinking = self.format.thinking
        end = self.model.tokenizer.decode(prompt.ids[-_TAIL:], skip_special_tokens=False)
        reply = Reply(thinking, opened_marks(end, thinking))
        try:
            is_stopped = self.answer(prompt, reply)
        except CvxqError as error:
            self.conversation.withdraw()
            self.fail(error)
            return
        self.has_answered = True
        click.echo()
        if prompt.keep is None and self.session.room in (0, 1):  # the last token may be unread
            notice(full_text(self.session.context_length))
        if is_stopped:
            notice("stopped")
        elif reply.is_thinking:
            notice("the model was still thinking; --max-tokens allows it more")
        elif not reply.answer:
            notice("the model ended its answer at once")
        if reply.answer:
            self.conversation.answered(reply.answer, reply.thought)
        else:
            self.conversation.withdraw()

    def fail(self, error: CvxqError) -> None:
        """Say in one line why there is no answer, and go on."""
        self.failure = error
        notice(describe(error))

    def answer(self, prompt: Prompt, reply: Reply) -> bool:
        """Generate and print a reply; return whether Ctrl-C cut it short."""
        seed = self.settings.seed
        settings = replace(
            self.settings,
            max_tokens=prompt.room,
            seed=None if seed is None else seed + self.turns,  # turns draw independently
        )
        self.turns += 1
        with interruptible() as interrupt:

            def take(piece: str) -> None:
                self.show(reply.push(piece))
                if interrupt.came:
                    raise AnswerStoppedError

            try:
                self.model.generate(
                    prompt.ids,
                    settings,
                    on_text=take,
                    session=self.session,
                    end_ids=self.model.end_ids | self.format.end_ids,
                    kept=[mark for pair in self.format.thinking for mark in pair],
                )
            except (AnswerStoppedError, KeyboardInterrupt):
                return True
            self.show(reply.finish())
        return False

    def show(self, parts: list[tuple[str, bool]]) -> None:
        """Print parts of a reply, each with whether it is thinking."""
        for text, is_thought in parts:
            if not is_thought:
                sys.stdout.write(text)
            elif not self.hide_thinking:
                is_dimmed = sys.stdout.isatty()
                sys.stdout.write(click.style(text, dim=True) if is_dimmed else text)
        sys.stdout.flush()


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


def is_like_command(line: str) -> bool:
    """Whether a line that is no command may have been meant as one."""
    word, *rest = line.split()
    return word in COMMANDS or (not rest and word[:1] == "/" and word[1:].isalpha())


def notice(text: str) -> None:
    """Tell the user something that is not an answer."""
    click.echo(text, err=True)
