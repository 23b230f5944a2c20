"""python -m runner.chat: talk to a target whose small, trimmed drafter runs ahead of it.

python -m runner.chat                                   the default pair, interactive
python -m runner.chat --prompt "Why is the sky blue?"   one answer on stdout
python -m runner.chat --target T.gguf --draft D.gguf    your own files
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from corpus.command import OneCommand
from corpus.errors import TrimError
from corpus.progress import stderr
from corpus.sampling import Sampling

from .drafter import NoDrafter
from .engine import Engine, Record
from .options import Models, model_options, sampling_options

HELP = "/reset forgets the conversation, /stats adds up the session, /draft on|off, /quit"


class Chat:
    """A conversation: messages so far, the settings, and what the session took in all."""

    def __init__(
        self, engine: Engine, sampling: Sampling, seed: int | None, draft_max: int | None, max_tokens: int
    ) -> None:
        self.engine = engine
        self.messages: list[dict[str, str]] = []
        self.drafting = True
        self.total = Record()
        self._sampling, self._seed, self._draft_max, self._max_tokens = sampling, seed, draft_max, max_tokens

    def ask(self, text: str, write: Callable[[str], object]) -> Record:
        """Answer `text`, writing pieces as they come. Ctrl-C ends the answer; what was said of it stays said."""
        self.messages.append({"role": "user", "content": text})
        record = Record()
        try:
            pieces = self.engine.answer(
                self.engine.prompt(self.messages),
                self._sampling,
                record,
                max_tokens=self._max_tokens,
                draft_max=self._draft_max if self.drafting else 0,
                seed=self._seed,
                drafter=None if self.drafting else NoDrafter(),
            )
            with contextlib.closing(pieces):
                for piece in pieces:
                    write(piece)
        except KeyboardInterrupt:
            record.finish_reason = "cancelled"
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": record.text})
        for name in ("tokens", "rounds", "drafted", "accepted", "draft_seconds", "verify_seconds", "host_seconds"):
            setattr(self.total, name, getattr(self.total, name) + getattr(record, name))
        return record

    def command(self, line: str) -> bool:
        """Carry out a /command; False ends the session."""
        match line.split():
            case ["/quit"] | ["/exit"]:
                return False
            case ["/reset"]:
                self.messages.clear()
                stderr.print("the conversation is forgotten")
            case ["/stats"]:
                stderr.print(self.total.line() if self.total.tokens else "nothing was said yet")
            case ["/draft", ("on" | "off") as state]:
                self.drafting = state == "on"
                stderr.print(f"drafting is {state}")
            case _:
                stderr.print(HELP, markup=False)
        return True


def _talk(chat: Chat) -> None:
    """Read, answer, repeat, until /quit or the end of the input."""
    with contextlib.suppress(ImportError):  # absent on Windows; gives line editing and history elsewhere
        import readline  # noqa: F401
    interactive = sys.stdin.isatty()
    if interactive:
        stderr.print(HELP, markup=False)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            stderr.print("\n/quit leaves")
            continue
        if line.startswith("/"):
            if not chat.command(line):
                return
        elif line:
            try:
                record = chat.ask(line, _write)
            except TrimError as error:  # the conversation goes on
                stderr.print(f"Error: {error}", markup=False)
                continue
            _write("\n")
            stderr.print(f"[{record.line()}]", markup=False, style="dim")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@click.command(cls=OneCommand)
@model_options
@sampling_options
@click.option("-p", "--prompt", help="Answer this once on stdout and exit.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most per answer.")
@click.option("--json", "as_json", is_flag=True, help="With --prompt: print the run's record as the last line.")
def main(
    models: Callable[[], Models],
    sampling: Sampling,
    seed: int | None,
    draft_max: int | None,
    prompt: str | None,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Talk to a target whose trimmed drafter runs ahead of it; the text is exactly the target's."""
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    with models().open() as engine:
        chat = Chat(engine, sampling, seed, draft_max, max_tokens)
        if prompt is None:
            _talk(chat)
            return
        record = chat.ask(prompt, _write)
        _write("\n")
        if as_json:
            click.echo(json.dumps(record.as_json(), ensure_ascii=False))
        else:
            stderr.print(f"[{record.line()}]", markup=False, style="dim")
        if record.finish_reason == "cancelled":
            sys.exit(130)


def run(arguments: list[str] | None = None) -> Any:
    return main(arguments, prog_name="python -m runner.chat")


if __name__ == "__main__":
    run()
