"""The chat in a terminal: typing, commands, history, colours, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("termios")

from .terminal import ROOT, Terminal
from .test_chat import SLOW

HISTORY = Path("gguf-trim", "chat_history")


@pytest.fixture
def pair(toys) -> list[str]:
    files = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"])]
    return ["-m", "runner.chat", *files, "-c", "256", "--temp", "0", "-n", "6"]


def test_a_session_of_commands(pair, tmp_path) -> None:
    with Terminal(*pair, home=tmp_path) as chat:
        chat.until("/help lists the commands, /quit leaves").until("> ")
        for line, answer in (
            ("/stats", "there is no answer yet"),
            ("hello", "tok/s"),
            ("/stats", "drafts from context"),
            ("/draft off", "drafting is off"),
            ("more", "cut off by -n 6]"),
            ("/draft on", "drafting is on"),
            ("/system", "there is no system message"),
            ("/system Be brief.", "is set"),
            (f"/save {tmp_path / 'my talk.json'}", "saved 5 messages"),
            ("/reset", "conversation is forgotten"),
            ("/system", "Be brief."),
            (f"/load {tmp_path / 'my talk.json'}", "loaded 5 messages"),
            (f"/load {tmp_path / 'absent.json'}", "Error: "),
            ("/nonsense", "/nonsense: not understood"),
            ("/save", "/save: not understood; the commands are"),
        ):
            chat.type(f"{line}\n").until(answer).until("\n> ")
        chat.type("/quit\n")
        assert chat.end() == 0


def test_one_message_too_long_does_not_end_the_conversation(pair, tmp_path) -> None:
    with Terminal(*pair, "-c", "64", "-n", "4", home=tmp_path) as chat:
        chat.until("> ").type("hello\n").until("tok/s").until("> ")
        chat.type(f"{'the sea ' * 200}\n").until("does not fit a context of 64").until("> ")
        chat.type("/reset\n").until("> ").type("hello\n").until("tok/s").until("> ").type("\x04")
        assert chat.end() == 0


def test_several_lines_are_one_turn(pair, tmp_path) -> None:
    saved = tmp_path / "c.json"
    with Terminal(*pair, "-n", "1", home=tmp_path) as chat:
        chat.until("> ").type("one \\\n").until("... ").type("two\\\n").until("... ").type("three\n").until("tok/s")
        chat.until("> ").type('"""first\n').until("... ").type("\n").until("... ").type("/quit\\\n").until("... ")
        chat.type(' last """ \n').until("tok/s").until("> ")
        chat.type('"""/reset"""\n').until("tok/s").until("> ")
        chat.type('"""\n').until("... ").type('"""\n').until("> ")  # nothing is nothing
        # As a terminal pastes: at once, and marked.
        chat.type('\x1b[200~"""a\n/quit\nb"""\x1b[201~\n').until("tok/s").until("> ")
        chat.type(f"/save {saved}\n").until("saved 8 messages")
    said = [message["content"] for message in json.loads(saved.read_text()) if message["role"] == "user"]
    assert said == ["one \ntwo\nthree", "first\n\n/quit\\\n last", "/reset", "a\n/quit\nb"]


def test_history_is_private_and_bounded(pair, tmp_path) -> None:
    kept = tmp_path / HISTORY
    kept.parent.mkdir()
    with Terminal(*pair, home=tmp_path) as chat:
        chat.until("> ").type("/system né\n").until("set").until("> ").type("/quit\n")
        assert chat.end() == 0
    assert kept.read_text("utf-8") == "/system né\n/quit\n"
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_text("".join(f"line {i}\n" for i in range(1500)))
    with Terminal(*pair, home=tmp_path) as chat:
        chat.until("> ").type("\x1b[A").until("line 1499").type("\x15/stats\n").until("there is no answer yet")
        chat.until("> ")
        chat.process.send_signal(signal.SIGHUP)  # the terminal is closed
        assert chat.end() == -signal.SIGHUP
    lines = kept.read_text().splitlines()
    assert len(lines) == 1000
    assert lines[-2:] == ["line 1499", "/stats"]
    assert kept.stat().st_mode & 0o777 == 0o600
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize("obstacle", ["a file", "a folder", "a device", "no home"])
def test_history_that_cannot_be_kept(pair, tmp_path, obstacle: str) -> None:
    place = tmp_path / HISTORY
    if obstacle == "a file":
        place.parent.touch()
    elif obstacle == "a folder":
        place.mkdir(parents=True)
    elif obstacle == "a device":
        place.parent.mkdir()
        place.symlink_to("/dev/null")
    home = Path("/dev/null") if obstacle == "no home" else tmp_path
    with Terminal(*pair, home=home) as chat:
        chat.until("> ").type("hello\n").until("tok/s").until("> ").type("/quit\n")
        assert chat.end() == 0
        assert "Error" not in chat.plain
        assert "Traceback" not in chat.plain
    assert Path("/dev/null").is_char_device()


def test_tab_completes_commands_only(pair, tmp_path) -> None:
    with Terminal(*pair, home=tmp_path) as chat:
        chat.until("> ").type("/sta\t\n").until("there is no answer yet").until("> ")
        chat.type("/save /sta\t\x15/quit\n")
        assert chat.end() == 0
        assert "/save /stats" not in chat.plain


GREEN = re.compile(r"\x1b\[32m.*?\x1b\[0m", re.DOTALL)


def test_drafted_text_is_green_on_request(pair, tmp_path) -> None:
    texts = {}
    for name, options, settings in (
        ("green", ["--show-draft", "--draft-max", "3"], {}),
        ("plain", [], {}),
        ("NO_COLOR", ["--show-draft"], {"NO_COLOR": "1"}),
        ("dumb", ["--show-draft"], {"TERM": "dumb"}),
        ("no drafter", ["--show-draft", "--draft-max", "0"], {}),
    ):
        with Terminal(*pair, *options, "-n", "30", "-p", "the sea", home=tmp_path, **settings) as chat:
            assert chat.end() == 0
            answer = chat.screen.rpartition("\x1b[2K")[2]  # what comes after the line that said "loading"
            texts[name] = re.split(r"(?:\x1b\[2m)?\[\d+ tokens", answer)[0]
    assert len(GREEN.findall(texts["green"])) > 3
    assert "\x1b[32m" not in texts["plain"]
    assert texts["green"].replace("\x1b[32m", "").replace("\x1b[0m", "") == texts["plain"]
    assert texts["plain"] == texts["NO_COLOR"] == texts["dumb"] == texts["no drafter"]


def test_nothing_but_the_answer_is_on_stdout(pair, tmp_path) -> None:
    """Typed at a terminal, kept in a file: no prompt, no notice, no colour."""
    with open(tmp_path / "out", "wb") as out, Terminal(*pair, "--show-draft", home=tmp_path, stdout=out) as chat:
        chat.until("> ").type("the sea\n").until("tok/s").until("> ").type("/help\n").until("/quit").until("> ")
        chat.type("\x04")
        assert chat.end() == 0
    wanted = subprocess.run([sys.executable, *pair, "-p", "the sea"], cwd=ROOT, capture_output=True, input=b"")
    assert (tmp_path / "out").read_bytes() == wanted.stdout
    assert wanted.returncode == 0


@pytest.mark.parametrize("settings", [{}, {"TERM": "dumb", "LANG": "C"}, {"NO_COLOR": "1", "LC_ALL": "C"}])
def test_forty_columns(pair, tmp_path, settings) -> None:
    """No line of ours is longer than the terminal is wide, and none breaks within a word."""
    with Terminal(*pair, "-n", "1", home=tmp_path, columns=40, **settings) as chat:
        chat.until("> ").type("né 猫\n").until("tok/s").until("> ").type("/load absent.json\n").until("directory")
        chat.until("> ").type("/help\n").until("/quit").until("> ").type("/stats\n").until("tok/s").until("> ")
        chat.interrupt().until("/quit leaves").until("> ").type("\x04")
        assert chat.end() == 0
        assert max(len(line) for line in chat.plain.splitlines()) <= 40
        assert "absent.json: cannot be read:" in chat.plain
        if settings.get("TERM") == "dumb":
            assert "\x1b[" not in chat.screen


def test_json_needs_a_prompt(pair, tmp_path) -> None:
    with Terminal(*pair, "--json", home=tmp_path) as chat:
        assert chat.end() == 2
        assert "--json needs --prompt" in chat.plain


def test_ctrl_c_ends_the_answer_then_the_line_and_ctrl_d_the_session(pair, tmp_path) -> None:
    code = SLOW + f"c.main({[*pair[2:], '-n', '200']!r})"
    with Terminal("-c", code, home=tmp_path) as chat:
        chat.until("> ").type("the sea\n").until("the sea\n")
        chat.interrupt().until("tok/s").until("> ")
        chat.type("half a li").until("half a li").interrupt().until("/quit leaves").until("> ")
        chat.type("and then\n").until("and then\n").interrupt().until("tok/s").until("> ")
        chat.type(f"/save {tmp_path / 'c.json'}\n").until("saved 4 messages").until("> ").type("\x04")
        assert chat.end() == 0
        assert "Traceback" not in chat.plain


@pytest.mark.parametrize("module", ["runner.chat", "runner.bench", "runner.exact", "gguf_trim", "corpus"])
@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_imports_run(module: str, ignored: bool, tmp_path) -> None:
    """It ends the process without a traceback; where it is ignored from the start, it stays so."""
    (tmp_path / "click.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(0.5)\nraise SystemExit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == (7 if ignored else -signal.SIGINT)
