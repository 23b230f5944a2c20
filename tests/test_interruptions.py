"""Ctrl-C and other accidents at the worst moments: the next try is as if nothing had been."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from corpus.__main__ import main as corpus
from gguf_trim.cut import lay_out, source_identity, write
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.speculator import Speculator
from gguf_trim.pairs import prepare as preparing
from gguf_trim.pairs.prepare import prepare
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama import library
from llamabase.llama.library import interruptible
from llamabase.llama.model import Model
from llamabase.sampling.settings import Sampling
from runner.chat.__main__ import main as chat
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .conftest import keep_first
from .toy import write_model

GREEDY = Sampling(temp=0)


def test_ctrl_c_while_llama_cpp_calls_back_is_raised_afterwards() -> None:
    """ctypes drops an exception raised inside a callback, such as that of the log while a model loads."""
    before = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt), interruptible() as go_on:
        assert go_on()
        signal.raise_signal(signal.SIGINT)
        reached.append(go_on())
    assert reached == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_goes_to_the_handler_that_is_there() -> None:
    """A program's own, or none at all where it is ignored, as in the background."""
    heard: list[int] = []
    for handler, wanted in ((lambda number, frame: heard.append(number), [signal.SIGINT]), (signal.SIG_IGN, [])):
        before = signal.signal(signal.SIGINT, handler)
        try:
            with interruptible() as go_on:
                signal.raise_signal(signal.SIGINT)
                assert go_on() and heard == []
            assert heard == wanted
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
        heard.clear()


def test_ctrl_c_acts_after_each_of_several_calls(monkeypatch) -> None:
    """The handler is changed once around them, and only in the main thread."""
    before, change, changed, reached = signal.getsignal(signal.SIGINT), library._signal.signal, [], []
    monkeypatch.setattr(library._signal, "signal", lambda *how: changed.append(how) or change(*how))
    with pytest.raises(KeyboardInterrupt), interruptible() as go_on:
        for call in range(3):
            with interruptible() as inner:
                elsewhere = threading.Thread(target=lambda: reached.append(_in_another_thread()))
                elsewhere.start()
                elsewhere.join()
                if call == 1:
                    signal.raise_signal(signal.SIGINT)
                reached.append((call, inner(), go_on()))
    assert reached == [True, (0, True, True), True, (1, False, False)]
    assert len(changed) == 2 and signal.getsignal(signal.SIGINT) is before
    with interruptible() as go_on:
        assert go_on()


def _in_another_thread() -> bool:
    with interruptible() as go_on:
        return go_on()


def test_ctrl_c_stops_a_load(toys, monkeypatch) -> None:
    import llama_cpp

    load = llama_cpp.llama_model_load_from_file

    def interrupted(path, params):
        signal.raise_signal(signal.SIGINT)
        return load(path, params)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Model(toys["target"])
    monkeypatch.undo()
    Model(toys["target"]).close()


@pytest.mark.parametrize("who", ["target", "drafter"])
def test_second_ctrl_c_while_the_first_is_settled(toys, monkeypatch, who: str) -> None:
    """Whatever the caches were left with, the next answer is the one of a fresh engine."""
    with Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=256)) as engine:
        ids = engine.model.tokenize("the king and the sea")
        wanted = [token for r in engine.rounds(ids, GREEDY, max_tokens=30, draft_max=3) for token in r.tokens]
        reader = engine.reader if who == "target" else engine.drafter.reading.reader

        def interrupted() -> None:
            raise KeyboardInterrupt

        for stop in range(4):
            rounds = engine.rounds(engine.model.tokenize("of tea"), GREEDY, max_tokens=30, draft_max=3)
            for _ in range(stop + 1):
                next(rounds)
            with monkeypatch.context() as patch:
                patch.setattr(reader, "settle", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    rounds.close()
            assert [
                token for r in engine.rounds(ids, GREEDY, max_tokens=30, draft_max=3) for token in r.tokens
            ] == wanted


def test_a_cut_is_only_there_once_it_is_proven(toys, tmp_path, monkeypatch) -> None:
    """Interrupted or failed while it is verified, it is cut and verified again."""
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    honest, calls = preparing.prove, []

    def accident(*args, **settings):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return honest(*args, **settings)

    monkeypatch.setattr(preparing, "prove", accident)
    choose = keep_first(400)
    with pytest.raises(KeyboardInterrupt):
        prepare(target=toys["target"], drafter=toys["wrong"], choose=choose)
    assert list((tmp_path / "trimmed").iterdir()) == []
    done = prepare(target=toys["target"], drafter=toys["wrong"], choose=choose)
    assert len(calls) == 2
    assert prepare(target=toys["target"], drafter=toys["wrong"], choose=choose) == done
    assert len(calls) == 2  # proven once is enough
    assert len(list((tmp_path / "trimmed").iterdir())) == 2


def test_a_speculator_that_does_not_fit_is_made_again(toys, tmp_path, monkeypatch, capsys) -> None:
    """In prepare's own folder; `test_dynamic` shows that everybody else refuses it."""
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    done = prepare(target=toys["target"], drafter=toys["wrong"], choose=keep_first(400))
    made = Speculator.of(trimmed := Trimmed.open(done.trimmed))
    attach(trimmed, Speculator(made.down, made.up[:-1], 1))
    assert prepare(target=toys["target"], drafter=toys["wrong"], choose=keep_first(400)) == done
    again = Speculator.of(Trimmed.open(done.trimmed))
    assert (again.up == made.up).all() and again.n_positions == made.n_positions
    assert "does not fit its head and is made again" in " ".join(capsys.readouterr().err.split())


def test_checkpoints_of_one_model_are_told_apart(tmp_path) -> None:
    """Same name, same embeddings, other layers: another drafter."""
    path = write_model(tmp_path / "m.gguf")
    first = source_identity(GGUFFile(path))
    tensor = GGUFFile(path).tensors["blk.0.ffn_down.weight"]
    with open(path, "r+b") as file:
        file.seek(tensor.offset + 40)
        file.write(b"\x01\x02")
    assert source_identity(GGUFFile(path)) != first


def test_a_trim_replaces_only_what_a_trim_has_made(toys, tmp_path) -> None:
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(toys["wrong"].read_bytes())
    cut = lay_out(toys["target"], keep_first(300))
    with pytest.raises(TrimError, match="was not made by this program"):
        write(cut, precious)
    assert precious.read_bytes() == toys["wrong"].read_bytes()
    write(cut, tmp_path / "mine.gguf")
    write(lay_out(toys["target"], keep_first(320)), tmp_path / "mine.gguf")
    assert GGUFFile(tmp_path / "mine.gguf").get("gguf_trim.k") > cut.keep.k


def test_counts_never_replace_their_inputs(toys, tmp_path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the king")
    model = tmp_path / "m.gguf"
    model.write_bytes(toys["target"].read_bytes())
    for output in (text, model):
        before = output.read_bytes()
        done = CliRunner().invoke(corpus, ["count", str(text), "--tokenizer", str(model), "-o", str(output)])
        assert done.exit_code == 1
        assert "is one of the inputs" in done.stderr
        assert output.read_bytes() == before
    done = CliRunner().invoke(corpus, ["count", str(text), "--tokenizer", str(model), "-o", "/dev/null"])
    assert done.exit_code == 1
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("option", ["--temp", "--top-p", "--min-p"])
def test_what_is_not_a_number_is_wrong_usage(toys, option: str) -> None:
    done = CliRunner().invoke(chat, ["--target", str(toys["target"]), option, "nan", "-p", "x"])
    assert done.exit_code == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "f.gguf")
    with pytest.raises(TrimError, match="not a regular file"):
        GGUFFile(tmp_path / "f.gguf")


def test_companions_are_called_by_their_name(toys, tmp_path) -> None:
    beside = toys["good-trimmed"].with_name("good-trimmed.vocab.gguf")
    for arguments in (["--target", str(beside)], ["--target", str(toys["target"]), "--draft", str(beside)]):
        done = CliRunner().invoke(chat, [*arguments, "-p", "x"])
        assert done.exit_code == 1
        assert "is the companion of a trimmed drafter" in done.stderr
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(toys["good-trimmed"].read_bytes())
    done = CliRunner().invoke(chat, ["--target", str(toys["target"]), "--draft", str(alone), "-p", "x"])
    assert done.exit_code == 1
    assert "belongs beside alone.gguf" in done.stderr.replace("\n", " ")
