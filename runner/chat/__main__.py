"""python -m runner.chat: talk to a target whose trimmed drafter runs ahead of it.

python -m runner.chat                                   the default pair, interactive
python -m runner.chat --prompt "Why is the sky blue?"   one answer on stdout
python -m runner.chat -p "Summarise:" < report.txt      the same, followed by the piped text
python -m runner.chat --target T.gguf --draft D.gguf    your own files
"""

from __future__ import annotations

from llamabase.cli.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from llamabase.cli.command import FILE, OneCommand
from llamabase.cli.progress import stderr
from llamabase.errors import TrimError
from llamabase.files import decoded, expand
from llamabase.sampling.settings import Sampling
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.options import Models, limit_of, model_options, open_measured, sampling_options, template_kwargs_option

from .conversation import Messages, load, save
from .prompt_line import PromptLine, unquoted

COMMANDS = {  # no line of the help is longer than 40 columns
    "/help": "list the commands",
    "/system [TEXT]": "set/show system message",
    "/save FILE": "write the conversation",
    "/load FILE": "go on with a saved one",
    "/reset": "forget the conversation",
    "/draft on|off": "with or without drafter",
    "/stats": "totals of the session",
    "/quit": "leave, as Ctrl-D does",
    "line\\": "goes on in the next line",
    '"""text"""': "may have several lines",
}
HELP = "\n".join(f"{usage:15}{what}" for usage, what in COMMANDS.items())


@dataclass
class Chat:
    """A conversation: its settings, the messages so far, and the totals of the session."""

    engine: Engine
    sampling: Sampling
    seed: int | None
    draft_max: int | None
    max_tokens: int
    show_draft: bool = False
    template_kwargs: Mapping[str, Any] | None = None
    messages: Messages = field(default_factory=list)
    drafting: bool = True
    total: Record = field(default_factory=Record)

    def ask(self, text: str, write: Callable[[str], object]) -> Record:
        """Answer `text`, writing pieces as they come. Ctrl-C ends the answer; its text so far is kept."""
        asked = [*self.messages, {"role": "user", "content": text}]
        record = Record()
        try:
            pieces = self.engine.pieces(
                self.engine.prompt(asked, variables=self.template_kwargs),
                self.sampling,
                record,
                max_tokens=self.max_tokens,
                draft_max=self.draft_max if self.drafting else 0,
                seed=self.seed,
            )
            with contextlib.closing(pieces):
                for piece, drafted in pieces:
                    write(click.style(piece, fg="green") if drafted and self.show_draft else piece)
        except KeyboardInterrupt:
            record.finish_reason = "cancelled"
        self.messages = [*asked, {"role": "assistant", "content": record.text}]
        self.total += record
        return record

    @property
    def system(self) -> Messages:
        """The system message, if there is one."""
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def take(self, messages: Messages) -> None:
        """Go on from these messages. Raises FileFormatError, and changes nothing, if the template refuses them."""
        self.engine.prompt([*messages, {"role": "user", "content": "?"}], variables=self.template_kwargs)
        self.messages = messages

    def set_system(self, text: str) -> None:
        """Set or replace the system message. Raises as `take` does."""
        self.take([{"role": "system", "content": text}, *self.messages[len(self.system) :]])

    def command(self, line: str) -> bool:
        """Carry out a /command; False ends the session. Raises TrimError, and then changes nothing."""
        match line.split(maxsplit=1):
            case ["/quit" | "/exit"]:
                return False
            case ["/reset"]:
                self.messages = self.system
                _say("the conversation is forgotten")
            case ["/stats"]:
                _say(self.stats)
            case ["/draft", ("on" | "off") as state]:
                self.drafting = state == "on"
                _say(f"drafting is {state}")
            case ["/system"]:
                _say(self.system[0]["content"] if self.system else "there is no system message")
            case ["/system", text]:
                self.set_system(text)
                _say("the system message is set")
            case ["/save", name]:
                save(self.messages, expand(name))
                _say(f"saved {_count(self.messages)}")
            case ["/load", name]:
                self.take(load(expand(name)))
                _say(f"loaded {_count(self.messages)}")
            case ["/help"]:
                _say(HELP)
            case [name, *_]:
                _say(f"{name}: not understood; the commands are\n{HELP}")
        return True

    @property
    def stats(self) -> str:
        """The totals of the session, and what the drafter drafts from."""
        if not self.total.tokens:
            return "there is no answer yet"
        return self.total.line() + (f", drafts from {self.total.vocab}" if self.total.vocab else "")

    def closing(self, record: Record) -> str:
        """The closing line of an answer, which also says why nothing was drafted and what cut the answer off."""
        text = record.line()
        if self.draft_max is None and self.drafting and self.engine.drafter and record.tokens and not record.drafted:
            text += ", no draft pays"
        if record.finish_reason == "length":
            full = record.tokens < self.max_tokens
            text += ", cut off by " + (f"-c {self.engine.context.n_ctx}" if full else f"-n {self.max_tokens}")
        return f"[{text}]"


def _count(messages: Messages) -> str:
    return f"{len(messages)} message{'s' * (len(messages) != 1)}"


def _say(text: str) -> None:
    """Write a notice to stderr, broken between words on a terminal."""
    style = "" if stderr.no_color else "dim"
    width = shutil.get_terminal_size(stderr.size).columns  # rich takes every dumb terminal to have 80
    stderr.print(text, markup=False, style=style, soft_wrap=not stderr.is_terminal, width=width)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _answer(chat: Chat, text: str) -> Record:
    record = chat.ask(text, _write)
    _write("\n")
    return record


def _talk(chat: Chat) -> None:
    """Read, answer, repeat, until /quit or the end of the input."""
    typed = PromptLine([usage.split()[0] for usage in COMMANDS if usage.startswith("/")])
    _say("/help lists the commands, /quit leaves")
    while True:
        try:
            text = typed.read()
            if text.startswith("/"):
                if not chat.command(text):
                    return
            elif text := unquoted(text):
                _say(chat.closing(_answer(chat, text)))
        except TrimError as error:  # the conversation goes on
            _say(f"Error: {error}")
        except EOFError:
            _say("")
            return
        except KeyboardInterrupt:
            _say("\n/quit leaves")


def _given(prompt: str | None, file: Path | None) -> str | None:
    """The prompt that options and a pipe make together; None if the user is to type."""
    if prompt is not None and file is not None:
        raise click.UsageError("give --prompt or --file, not both")
    if file is not None:
        try:
            prompt = decoded(file.read_bytes(), "replace")
        except OSError as error:
            raise TrimError(f"{file}: cannot be read: {error.strerror or error}") from error
    if prompt is None and sys.stdin.isatty():
        return None
    piped = "" if sys.stdin.isatty() else sys.stdin.read().removeprefix("\ufeff")  # a byte order mark
    text = "\n\n".join(part.rstrip() for part in (prompt or "", piped) if part.strip())
    if not text:
        raise click.UsageError("the prompt is empty: type in a terminal, pipe a text in, or give --prompt or --file")
    return text


@click.command(cls=OneCommand)
@model_options
@sampling_options
@click.option("-p", "--prompt", help="Answer this once on stdout and exit; piped text follows it.")
@click.option("-f", "--file", type=FILE, help="The same, with the prompt from a file.")
@click.option("-sys", "--system-prompt", metavar="TEXT", help="The system message.")
@template_kwargs_option
@click.option(
    "-n", "--n-predict", "--max-tokens", "max_tokens", type=limit_of, metavar="N", default="1024", show_default=True,
    help="Most per answer; -1: as many as the context holds.",
)  # fmt: skip
@click.option("--show-draft", is_flag=True, help="On a terminal: show drafted text in green.")
@click.option("--json", "as_json", is_flag=True, help="With --prompt: print the run's record last.")
def main(
    models: Callable[[], Models],
    sampling: Sampling,
    seed: int | None,
    draft_max: int | None,
    prompt: str | None,
    file: Path | None,
    system_prompt: str | None,
    template_kwargs: dict[str, Any],
    max_tokens: int,
    show_draft: bool,
    as_json: bool,
) -> None:
    """Talk to a target whose trimmed drafter runs ahead of it; the text is exactly the target's.

    Without a terminal on stdin, the piped text is one prompt, and only its answer is on stdout.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    text = _given(prompt, file)
    if as_json and text is None:
        raise click.UsageError("--json needs --prompt")
    with open_measured(models, draft_max is None) as engine:
        chat = Chat(engine, sampling, seed, draft_max, max_tokens, show_draft and _colours(), template_kwargs)
        if system_prompt:
            chat.set_system(system_prompt)
        if text is None:
            _talk(chat)
            return
        record = _answer(chat, text)
        if as_json:
            click.echo(json.dumps(record.as_json(), ensure_ascii=False))
        else:
            _say(chat.closing(record))
        if record.finish_reason == "cancelled":
            sys.exit(130)


def _colours() -> bool:
    """Whether stdout is a terminal that shows colours, and neither NO_COLOR nor TERM=dumb forbids it."""
    console = Console()
    return sys.stdout.isatty() and console.color_system is not None and not console.no_color


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.chat"))
