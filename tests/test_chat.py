"""The chat command as a user meets it, on toy models: answers, JSON, commands, interruptions, mistakes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGUFWriter

from llamabase.errors import TrimError
from llamabase.sampling.settings import Sampling
from runner.chat.__main__ import HELP, Chat, main
from runner.chat.conversation import load, save
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.loop.weights import LoadOptions

from . import NO_SPINNING
from .toy import write_model

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temp=0)

FIELDS = {
    *("text", "tokens", "rounds", "drafted", "accepted", "seconds", "tokens_per_second", "tau", "acceptance_rate"),
    *("draft_seconds", "verify_seconds", "host_seconds", "finish_reason", "vocab"),
}


# A target that takes its time and never ends an answer by itself.
# A job in the background, as CI may be, inherits an ignored SIGINT.
SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import runner.chat.__main__ as c, llamabase.llama.context as l
decode = l.Context.decode
def slow(*a, **k):
    time.sleep(0.02)
    return decode(*a, **k)
l.Context.decode = slow
"""


def program(*arguments: str, env: dict[str, str], **settings) -> subprocess.CompletedProcess[bytes]:
    """The chat as a process of its own, with this environment."""
    command = [sys.executable, "-m", "runner.chat", *arguments]
    settings.setdefault("input", b"")
    clean = {"PATH": os.environ["PATH"], **NO_SPINNING}
    return subprocess.run(command, env=clean | env, cwd=ROOT, capture_output=True, **settings)


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


def test_the_closing_line_says_what_cut_the_answer_off(pair) -> None:
    assert "cut off by -n 6]" in invoke(*pair, "--prompt", "the sea", "-n", "6").stderr
    assert "cut off by -c 24]" in invoke(*pair, "-c", "24", "--prompt", "the sea").stderr


def test_the_closing_line_says_that_no_draft_pays(toys) -> None:
    with Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=256)) as engine:
        nothing, something = Record(tokens=9), Record(tokens=9, drafted=3)
        assert "no draft pays" in Chat(engine, GREEDY, None, None, 60).closing(nothing)
        assert "no draft pays" not in Chat(engine, GREEDY, None, None, 60).closing(something)
        assert "no draft pays" not in Chat(engine, GREEDY, None, 0, 60).closing(nothing)


def test_same_answer_with_and_without_drafter(pair) -> None:
    drafted = invoke(*pair, "--prompt", "the sea", "-n", "30", "--draft-max", "3")
    plain = invoke(*pair, "--prompt", "the sea", "-n", "30", "--draft-max", "0")
    assert drafted.stdout == plain.stdout != "\n"
    assert "tau" in drafted.stderr
    assert "tau" not in plain.stderr


def test_seed_decides_the_text(pair) -> None:
    hot = [*pair, "--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--prompt", "the sea", "-n", "20"]
    a, b, c = (invoke(*hot, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert a == b != c
    assert all(invoke(*hot, "--seed", "1", "--draft-max", n).stdout == a for n in ("0", "3"))


def test_a_pipe_is_one_prompt(pair) -> None:
    """All of it, whatever its lines look like; the answer alone is on stdout."""
    done = invoke(*pair, "-n", "6", text="the\n/quit\nsea\n\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == invoke(*pair, "-n", "6", "--prompt", "the\n/quit\nsea").stdout
    assert done.stderr.startswith("[6 tokens")
    assert done.stdout != invoke(*pair, "-n", "6", "--prompt", "the").stdout


def test_prompt_and_pipe_and_file_come_together(pair, tmp_path, monkeypatch) -> None:
    asked = []
    honest = Engine.prompt

    def prompt(self, messages, **how):
        asked.append([(message["role"], message["content"]) for message in messages])
        return honest(self, messages)

    monkeypatch.setattr(Engine, "prompt", prompt)
    (tmp_path / "task.txt").write_bytes("  né\xff sea\n\n".encode("latin-1"))
    for arguments, text, wanted in (
        (["-p", "Summarise:"], "  a\n\nb \n", "Summarise:\n\n  a\n\nb"),
        (["-p", "Summarise:"], "", "Summarise:"),
        (["-p", ""], "a\n", "a"),
        (["-f", str(tmp_path / "task.txt")], "", "  n\ufffd\ufffd sea"),
        (["--file", str(tmp_path / "task.txt")], "b", "  n\ufffd\ufffd sea\n\nb"),
    ):
        assert invoke(*pair, "-n", "1", *arguments, text=text).exit_code == 0
        assert asked.pop() == [("user", wanted)]
    assert invoke(*pair, "-n", "1", "-sys", "Be brief.", "-p", "x").exit_code == 0
    assert asked.pop() == [("system", "Be brief."), ("user", "x")]


def test_names_for_the_template(tmp_path) -> None:
    """They reach the template: it refuses the conversation in their words. What is no object is wrong usage."""
    source = "{% if mood == 'sad' %}{{ raise_exception('the mood is ' ~ mood) }}{% endif %}x"
    target = ["--target", str(write_model(tmp_path / "t.gguf", seed=1, template=source))]
    assert invoke(*target, "-n", "1", "-p", "x", "--chat-template-kwargs", '{"mood": "glad"}').exit_code == 0
    done = invoke(*target, "-n", "1", "-p", "x", "--chat-template-kwargs", '{"mood": "sad"}')
    assert done.exit_code == 1 and "the mood is sad" in done.stderr
    for given, said in (("{", "is not JSON"), ("[1]", "is not a JSON object"), ('{"messages": 1}', "set by the conv")):
        done = invoke(*target, "-p", "x", "--chat-template-kwargs", given)
        assert done.exit_code == 2 and said in done.stderr


def test_bytes_that_are_no_utf8_are_read(pair) -> None:
    done = program(*pair, "-n", "2", input=b"na\xefve\n", env={"LANG": "C.UTF-8"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("env", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LANG": "C"}])
def test_characters_that_stdout_lacks(pair, env) -> None:
    """The toys' answers hold bytes of every kind."""
    done = program(*pair, "-n", "60", "--prompt", "naïve 猫", env={"TERM": "dumb", **env})
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout


def test_a_reader_that_leaves_ends_it_quietly(pair) -> None:
    """As `| head -1` does, after the first byte."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW + f"c.main({[*pair, '-n', '100', '-p', 'the']!r})"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stderr:
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read()
    assert said == b""
    assert process.returncode == 1


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(toys) -> None:
    with Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=256)) as engine:
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
    with Engine(LoadOptions(toys["target"], None, n_ctx=256)) as engine:
        session = Chat(engine, Sampling(temp=0), seed=None, draft_max=0, max_tokens=5)
        with pytest.raises(Exception, match="does not fit"):
            session.ask("the sea " * 200, lambda piece: None)
        assert session.messages == []


TEXT = "naïve — 猫🐈 ok"


@pytest.fixture
def bytewise(toys, monkeypatch):
    """A target whose tokens are the single bytes of TEXT, again and again, and a drafter it always agrees with."""
    with Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=256)) as engine:
        pieces = itertools.cycle(bytes([byte]) for byte in TEXT.encode())
        monkeypatch.setattr(engine.model, "piece", lambda token, special=False: next(pieces))
        yield engine


@pytest.mark.parametrize("draft_max", [0, 1, 2, 3])
def test_characters_split_over_tokens_come_out_whole(bytewise, draft_max: int) -> None:
    """Every piece is whole UTF-8 although a token holds one byte of it, whoever it is from."""
    for n in range(1, len(TEXT.encode()) + 1):
        whole = TEXT.encode()[:n].decode(errors="ignore")
        record, shown = Record(), []
        prompt = bytewise.model.tokenize("the king and the sea")
        for text, drafted in bytewise.pieces(prompt, GREEDY, record, max_tokens=n, draft_max=draft_max):
            shown.append(text)
            assert not (drafted and draft_max == 0)
        assert "".join(shown) == record.text == whole
        for _ in range(len(TEXT.encode()) - n):
            bytewise.model.piece(0)


def test_pieces_say_what_was_drafted(toys) -> None:
    """Of each round first what was accepted, then the target's own token."""
    with Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=256)) as engine:
        engine.model.piece = lambda token, special=False: f"{token} ".encode()
        prompt, record = engine.model.tokenize("the king and the sea"), Record()
        rounds = list(engine.rounds(prompt, GREEDY, max_tokens=40, draft_max=3))
        wanted = []
        for round_ in rounds:
            wanted += [(token, True) for token in round_.tokens[: round_.accepted]]
            wanted += [(token, False) for token in round_.tokens[round_.accepted :]]
        pieces = list(engine.pieces(prompt, GREEDY, record, max_tokens=40, draft_max=3))
        found = [(int(token), drafted) for text, drafted in pieces for token in text.split()]
        assert found == wanted
        assert sum(drafted for _, drafted in found) == record.accepted > 0


def test_ctrl_c_within_a_character_leaves_none_of_it(bytewise) -> None:
    session = Chat(bytewise, GREEDY, seed=None, draft_max=0, max_tokens=60, show_draft=True)
    shown: list[str] = []
    honest, left = bytewise.model.piece, [4]  # n, a, and of the third character one byte of two

    def piece(token: int, special: bool = False) -> bytes:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return honest(token)

    bytewise.model.piece = piece
    record = session.ask("x", shown.append)
    assert "".join(shown) == record.text == session.messages[-1]["content"] == "na"
    assert record.finish_reason == "cancelled"


def test_conversations_are_saved_and_loaded(toys, tmp_path) -> None:
    with Engine(LoadOptions(toys["target"], None, n_ctx=256)) as engine:
        session = Chat(engine, GREEDY, seed=None, draft_max=0, max_tokens=5)
        session.set_system("Sprich wie ein 猫.")
        session.ask("the sea", lambda piece: None)
        said = session.messages
        path = tmp_path / "a name with spaces.json"
        assert session.command(f"/save {path}")
        assert json.loads(path.read_text("utf-8")) == said
        session.command("/reset")
        assert session.messages == said[:1]
        session.command("/system Be brief.")
        assert session.messages == [{"role": "system", "content": "Be brief."}]
        session.command(f"/save {path}")  # a conversation may be replaced
        session.ask("more", lambda piece: None)
        session.command(f"/load {path}")
        assert session.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[1]", b"\xff\xfe", b"GGUF\x03"),
        *(b'[{"role": "user"}]', b'[{"role": "tool", "content": "x"}]', b'[{"role": [], "content": ""}]'),
        *(b'[{"role": "user", "content": null}]', b"[" * 100_000),
    ],
    ids=range(10),
)
def test_a_wrong_file_changes_nothing(toys, tmp_path, content: bytes) -> None:
    """Neither the conversation, when it is loaded, nor itself, when it is saved to."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with Engine(LoadOptions(toys["target"], None, n_ctx=256)) as engine:
        session = Chat(engine, GREEDY, seed=None, draft_max=0, max_tokens=5)
        session.ask("the sea", lambda piece: None)
        before = list(session.messages)
        with pytest.raises(TrimError, match=r"x\.json: is not a conversation"):
            session.command(f"/load {path}")
        with pytest.raises(TrimError, match=r"x\.json: is there and is not a conversation; choose another name"):
            session.command(f"/save {path}")
    assert session.messages == before
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_conversation_that_the_template_refuses(tmp_path) -> None:
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model = write_model(tmp_path / "m.gguf", template=template + "{{ m['content'] }}{% endfor %}")
    with Engine(LoadOptions(model, None, n_ctx=256)) as engine:
        session = Chat(engine, GREEDY, seed=None, draft_max=0, max_tokens=5)
        session.ask("the sea", lambda piece: None)
        before = list(session.messages)
        save([{"role": "system", "content": "x"}], tmp_path / "c.json")
        for line in ("/system Be brief.", f"/load {tmp_path / 'c.json'}"):
            with pytest.raises(TrimError, match="no system"):
                session.command(line)
            assert session.messages == before
    done = invoke("--target", str(model), "-sys", "x", "-p", "y")
    assert done.exit_code == 1
    assert "no system" in done.stderr


def test_a_template_that_is_none(tmp_path) -> None:
    model = write_model(tmp_path / "m.gguf", template="{% for m in messages %}{{ m['content'] }}")
    done = invoke("--target", str(model), "-p", "x")
    assert done.exit_code == 1
    assert "m.gguf: its chat template cannot be used: " in done.stderr


def test_a_special_token_that_the_vocabulary_does_not_have(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        GGUFWriter, "add_bos_token_id", lambda self, token: self.add_uint32("tokenizer.ggml.bos_token_id", 2**32 - 1)
    )
    done = invoke("--target", str(write_model(tmp_path / "m.gguf")), "-p", "x", "-n", "2")
    assert done.exit_code == 0


def test_a_folder_is_no_conversation(tmp_path) -> None:
    with pytest.raises(TrimError, match="cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(TrimError, match="cannot be read: No such file"):
        load(tmp_path / "absent")
    with pytest.raises(TrimError, match="is a folder"):
        save([], tmp_path)
    with pytest.raises(TrimError, match="cannot be written"):
        save([], tmp_path / ("x" * 300))


def test_help_fits_a_narrow_terminal() -> None:
    assert max(len(line) for line in HELP.splitlines()) <= 40


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--draft", "x.gguf"], 2, "--draft needs --target"),
        (["--model", "a", "--target", "b"], 2, "not both"),
        (["-m", "a.gguf", "-md", "b.gguf"], 2, "give --model, a pair of the catalog, or --target with --draft"),
        (["-m", "a.gguf", "--n-predict", "9", "-p", "x"], 1, "for other files give their paths (--target and --draft"),
        ([], 2, "the prompt is empty: type in a terminal, pipe a text in"),
        (["-p", " "], 2, "the prompt is empty"),
        (["-p", "x", "-f", "y"], 2, "give --prompt or --file, not both"),
        (["-f", "absent.txt"], 1, "absent.txt: cannot be read: No such file"),
        (["--draft-max", "16"], 2, "16"),
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
    code = SLOW + f"c.main({arguments!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
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
    text = invoke("--help-all").stdout
    for option in ("model", "target", "draft", "prompt", "json", "threads", "ctx-size", "temp", "top-k", "top-p"):
        assert f"--{option}" in text
    for option in ("--min-p", "--seed", "--draft-max", "-ngl", "-sys, --system-prompt", "-f, --file"):
        assert option in text
