"""The chat command as a user meets it, on toy models: answers, JSON, commands, interruptions, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from corpus.sampling import Sampling
from runner.chat import Chat, main
from runner.engine import Engine

FIELDS = {
    *("text", "tokens", "rounds", "drafted", "accepted", "seconds", "tokens_per_second", "tau", "acceptance_rate"),
    *("draft_seconds", "verify_seconds", "host_seconds", "finish_reason"),
}


def invoke(*arguments: str, text: str | None = None):
    return CliRunner().invoke(main, list(arguments), input=text)


@pytest.fixture
def pair(toys) -> list[str]:
    return ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"]), "-c", "256", "--temp", "0"]


def test_one_prompt_with_its_record(pair) -> None:
    done = invoke(*pair, "--prompt", "the sea", "-n", "20", "--json")
    assert done.exit_code == 0, done.output
    *text, last = done.stdout.rstrip("\n").split("\n")
    record = json.loads(last)
    assert record.keys() >= FIELDS
    assert record["text"].rstrip("\n") == "\n".join(text).rstrip("\n")
    assert record["tokens"] <= 20
    assert record["tau"] == pytest.approx(record["tokens"] / record["rounds"])
    parts = record["draft_seconds"] + record["verify_seconds"] + record["host_seconds"]
    assert record["seconds"] == pytest.approx(parts)
    assert record["finish_reason"] in ("stop", "length")


def test_same_answer_with_and_without_drafter(pair) -> None:
    drafted = invoke(*pair, "--prompt", "the sea", "-n", "30")
    plain = invoke(*pair, "--prompt", "the sea", "-n", "30", "--draft-max", "0")
    assert drafted.stdout == plain.stdout != "\n"
    assert "tau" in drafted.stderr
    assert "tau" not in plain.stderr


def test_seed_decides_the_text(pair) -> None:
    hot = [*pair, "--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--prompt", "the sea", "-n", "20"]
    a, b, c = (invoke(*hot, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert a == b != c


def test_a_session_of_commands(pair) -> None:
    lines = "hello\n/stats\n/draft off\nmore\n/draft on\n/reset\n/nonsense\n\n/quit\nnever read\n"
    done = invoke(*pair, "-n", "6", text=lines)
    assert done.exit_code == 0
    assert done.stdout.count("\n") >= 2
    for part in ("tok/s", "drafting is off", "drafting is on", "conversation is forgotten", "/reset forgets"):
        assert part in done.stderr
    assert "never read" not in done.output


def test_end_of_input_ends_the_session(pair) -> None:
    assert invoke(*pair, "-n", "4", text="hello\n").exit_code == 0


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(toys) -> None:
    with Engine(toys["target"], toys["good-trimmed"], n_ctx=256) as engine:
        engine.model.is_end = lambda token: False
        session = Chat(engine, Sampling(temp=0), seed=None, draft_max=3, max_tokens=60)
        shown: list[str] = []

        def write(piece: str) -> None:
            shown.append(piece)
            if len(shown) == 3:
                raise KeyboardInterrupt

        record = session.ask("the sea", write)
        assert record.finish_reason == "cancelled"
        assert session.messages[-1] == {"role": "assistant", "content": record.text}
        again = session.ask("and then", lambda piece: None)
        assert again.tokens == 60


def test_failed_answer_leaves_the_conversation_as_it_was(toys) -> None:
    with Engine(toys["target"], None, n_ctx=256) as engine:
        session = Chat(engine, Sampling(temp=0), seed=None, draft_max=0, max_tokens=5)
        with pytest.raises(Exception, match="does not fit"):
            session.ask("the sea " * 200, lambda piece: None)
        assert session.messages == []


def test_characters_split_over_tokens_come_out_whole(toys, monkeypatch) -> None:
    """Every piece is whole UTF-8 although a token may hold one byte of it."""
    with Engine(toys["target"], None, n_ctx=256) as engine:
        data = "naïve — 猫🐈 ok".encode()
        pieces = iter([bytes([byte]) for byte in data] + [b""] * 99)
        monkeypatch.setattr(engine.model, "piece", lambda token: next(pieces))
        engine.model.is_end = lambda token: False
        session = Chat(engine, Sampling(temp=0), seed=None, draft_max=0, max_tokens=len(data))
        shown: list[str] = []
        session.ask("x", shown.append)
        assert "".join(shown) == data.decode()
        assert "�" not in "".join(shown)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--draft", "x.gguf"], 2, "--draft needs --target"),
        (["--model", "a", "--target", "b"], 2, "not both"),
        (["--json"], 2, "--json needs --prompt"),
        (["--draft-max", "17"], 2, "17"),
        (["--target", "absent.gguf", "--prompt", "x"], 1, "absent.gguf: cannot be read: No such file"),
        (["--model", "nonsense", "--prompt", "x"], 1, "no model pair called 'nonsense'"),
    ],
)
def test_mistakes_get_one_sentence(arguments, code, said) -> None:
    done = invoke(*arguments)
    assert done.exit_code == code
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.output


def test_wrong_pair_and_trimmed_target(toys) -> None:
    done = invoke("--target", str(toys["target"]), "--draft", str(toys["foreign"]), "--prompt", "x")
    assert done.exit_code == 1
    assert "different vocabularies" in done.stderr
    done = invoke("--target", str(toys["good-trimmed"]), "--prompt", "x")
    assert done.exit_code == 1
    assert "trimmed drafter" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_real_sigint_in_a_one_shot_run(pair) -> None:
    """What was written stays, the closing line comes, and the exit code is 130."""
    arguments = [*pair, "-c", "512", "-n", "400", "--prompt", "the", "--draft-max", "0"]
    # A job in the background, as CI may be, inherits an ignored SIGINT.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import runner.chat as c, corpus.llama as l, time; s = l.Context.decode\n"
    code += "def slow(*a, **k): time.sleep(0.02); return s(*a, **k)\nl.Context.decode = slow\n"
    code += "l.Model.is_end = lambda *a: False\n"
    code += f"c.run({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err
    assert "tok/s" in err
    assert out


def test_help_names_the_options_as_llama_cpp_does() -> None:
    text = invoke("--help").stdout
    for option in ("model", "target", "draft", "prompt", "json", "threads", "ctx-size", "temp", "top-k", "top-p"):
        assert f"--{option}" in text
    for option in ("--min-p", "--seed", "--draft-max", "-ngl"):
        assert option in text
