"""A trimmed drafter inside llama-cpp-python's own `Llama`: the same text, and drafts that are really accepted."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Llama

from gguf_trim.cut import lay_out, write
from gguf_trim.keep import choose_rows
from llamabase.errors import EngineError, FileFormatError, VocabularyMismatch
from runner import TrimmedDraft

PROMPTS = ("the king and the sea", "of tea", "the king and the sea, the second")


class Watched(TrimmedDraft):
    """Keeps what it was given and what it drafted."""

    calls: list[tuple[list[int], list[int]]]

    def __call__(self, input_ids, /, **kwargs):
        drafted = super().__call__(input_ids, **kwargs)
        assert drafted.dtype == np.intc and drafted.ndim == 1
        self.calls = [*getattr(self, "calls", []), (input_ids.tolist(), drafted.tolist())]
        return drafted

    def figures(self, text: list[int]) -> tuple[int, int]:
        """(drafted, accepted) on the way to `text`: a text grows by the accepted drafts and one token more."""
        assert all(text[: len(given)] == given for given, _ in self.calls)
        grown = [len(b) - len(a) - 1 for (a, _), (b, _) in pairwise(self.calls)]
        assert all(0 <= n <= len(drafted) for n, (_, drafted) in zip(grown, self.calls, strict=False))
        return sum(len(drafted) for _, drafted in self.calls), sum(grown)


def llama(path: Path, draft: TrimmedDraft | None = None) -> Llama:
    threads = {"n_threads": 1, "n_threads_batch": 1}
    return Llama(str(path), n_ctx=256, logits_all=True, draft_model=draft, verbose=False, **threads)


def say(llm: Llama, prompt: str, n: int = 60, **settings) -> list[int]:
    """Prompt and n tokens after it, end tokens or not."""
    ids = llm.tokenize(prompt.encode(), add_bos=False)
    tokens = llm.generate(ids, **{"temp": 0.0, **settings})
    return [*ids, *(next(tokens) for _ in range(n))]


@pytest.mark.parametrize("name", ["target", "good-trimmed", "spec-trimmed", "tiny-trimmed", "wrong-trimmed", "wrong"])
def test_greedy_text_is_the_same(toys, name: str) -> None:
    """New conversations, rewinds and the text that was just said all in one `Llama`."""
    plain = llama(toys["target"])
    with Watched(toys[name], target=toys["target"], n_threads=1) as draft:
        speculating = llama(toys["target"], draft)
        accepted = 0
        for prompt in (*PROMPTS, PROMPTS[0]):
            draft.calls = []
            text = say(speculating, prompt)
            assert text == say(plain, prompt)
            drafted, right = draft.figures(text)
            assert drafted >= 40
            accepted += right
            if name in ("target", "good-trimmed", "spec-trimmed"):
                assert right > 0.4 * drafted
        if name == "wrong":
            assert accepted < 10


def test_the_figures_see_a_drafter_that_proposes_nothing(toys) -> None:
    """The mutation of the test above."""
    draft = Watched(toys["good-trimmed"], num_pred_tokens=0)
    text = say(llama(toys["target"], draft), PROMPTS[0])
    assert draft.figures(text) == (0, 0)


def test_chat_and_completion(toys) -> None:
    """The ways people call it, with stop strings and streams left half-way."""
    plain, speculating = llama(toys["target"]), llama(toys["target"], TrimmedDraft(toys["good-trimmed"]))

    def said(llm: Llama) -> list[str]:
        whole = llm.create_completion(PROMPTS[0], max_tokens=40, temperature=0)["choices"][0]["text"]
        cut = llm.create_completion(PROMPTS[0], max_tokens=40, temperature=0, stop=[whole[8:10]])
        next(llm.create_completion(PROMPTS[1], max_tokens=40, temperature=0, stream=True))
        messages = [{"role": "user", "content": "the sea"}]
        chat = llm.create_chat_completion(messages, max_tokens=30, temperature=0)["choices"][0]["message"]["content"]
        to_the_end = llm.create_completion(PROMPTS[2], max_tokens=None, temperature=0)["choices"][0]
        return [whole, cut["choices"][0]["text"], chat, to_the_end["text"], to_the_end["finish_reason"]]

    assert said(speculating) == said(plain)


def test_it_reads_only_what_is_new(toys) -> None:
    with TrimmedDraft(toys["good-trimmed"], n_threads=1, vocab="trim") as draft:
        reader, read = draft._drafter.reading.reader, []
        honest = reader.read
        reader.read = lambda tokens, *rest, **more: (read.append(len(tokens)), honest(tokens, *rest, **more))[1]
        text = np.arange(3, 103, dtype=np.intc)
        first = draft(text)
        assert read == [100, 1, 1]
        read.clear()
        draft(np.append(text, first[:2]))  # two accepted, the third not
        assert read[0] == 1
        read.clear()
        assert draft(text).tolist() == first.tolist()  # a rewind
        assert read == [1, 1, 1]
        assert draft(np.array([], np.intc)).tolist() == []


def test_no_draft_beyond_its_context(toys) -> None:
    with TrimmedDraft(toys["good-trimmed"], n_ctx=16) as draft:
        lengths = [len(draft(np.arange(3, 3 + n, dtype=np.intc))) for n in (10, 14, 15, 16, 40, 10)]
    assert lengths == [3, 2, 1, 0, 0, 3]
    plain, draft = llama(toys["target"]), TrimmedDraft(toys["good-trimmed"], n_ctx=32)
    assert say(llama(toys["target"], draft), PROMPTS[0]) == say(plain, PROMPTS[0])


def test_an_interruption_leaves_it_usable(toys, monkeypatch) -> None:
    text = np.arange(3, 40, dtype=np.intc)
    with TrimmedDraft(toys["spec-trimmed"]) as draft:
        wanted = draft(text).tolist()
        context = draft._drafter.reading.context
        honest = context._decode
        for stop in range(3):
            calls = iter(range(9))

            def interrupted(batch, calls=calls, stop=stop) -> None:
                honest(batch)
                if next(calls) == stop:
                    raise KeyboardInterrupt

            monkeypatch.setattr(context, "_decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                draft(text[:-stop][::-1] if stop else text[::-1])
            monkeypatch.setattr(context, "_decode", honest)
            assert draft(text).tolist() == wanted


def test_wrong_pairs_and_wrong_files_are_refused(toys) -> None:
    with pytest.raises(VocabularyMismatch):
        TrimmedDraft(toys["good-trimmed"], target=toys["foreign"])
    with pytest.raises(FileFormatError):
        TrimmedDraft(toys["target"].with_name("missing.gguf"))
    draft = TrimmedDraft(toys["good-trimmed"])
    for wrong in (600, -1):
        with pytest.raises(VocabularyMismatch, match=f"given token {wrong} and knows 600"):
            draft(np.array([5, wrong, 7], np.intc))
    draft.close()
    draft.close()
    with pytest.raises(EngineError, match="used after it was closed"):
        draft(np.array([5], np.intc))


def test_with_the_targets_path_no_id_is_drafted_that_it_lacks(toys) -> None:
    """A target whose table ends before the drafter's."""
    with TrimmedDraft(toys["target"], num_pred_tokens=8, target=toys["other-padding"]) as draft:
        texts = np.random.default_rng(0).integers(3, 400, (20, 5)).astype(np.intc)
        assert max(draft(text).max() for text in texts) < 560


def test_llama_needs_logits_all_beyond_a_batch(toys) -> None:
    """What docs/llama-cpp-python.md warns of; once this fails, llama-cpp-python has mended it."""
    draft = TrimmedDraft(toys["good-trimmed"])
    llm = Llama(str(toys["target"]), n_ctx=256, n_batch=32, draft_model=draft, verbose=False)
    with pytest.raises(ValueError, match="broadcast"):
        say(llm, PROMPTS[0])


def test_a_real_model(smollm2, tmp_path) -> None:
    """SmolLM2 speculating with its own trim; quantised, so texts may part at near-ties, but drafts must hold."""
    trimmed = tmp_path / "trimmed.gguf"
    write(lay_out(smollm2, partial(choose_rows, k=8192)), trimmed)
    draft = Watched(trimmed, target=smollm2, n_threads=1)
    text = say(llama(smollm2, draft), "The three primary colours are", 40)
    drafted, accepted = draft.figures(text)
    assert drafted >= 24 and accepted > 0.7 * drafted
    plain = say(llama(smollm2), "The three primary colours are", 40)
    assert text[:8] == plain[:8]


def test_the_server_takes_it(toys, monkeypatch) -> None:
    """As docs/llama-cpp-python.md has it; needs llama-cpp-python[server]."""
    pytest.importorskip("fastapi")
    pytest.importorskip("sse_starlette")
    server = pytest.importorskip("llama_cpp.server.app")
    from fastapi.testclient import TestClient
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    def answer(draft: TrimmedDraft | None) -> str:
        model = ModelSettings(model=str(toys["target"]), n_ctx=256, logits_all=True, verbose=False)
        application = server.create_app(server_settings=ServerSettings(), model_settings=[model])
        server._llama_proxy().draft_model = draft
        body = {"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0}
        return TestClient(application).post("/v1/completions", json=body).json()["choices"][0]["text"]

    draft = Watched(toys["good-trimmed"], target=toys["target"])
    assert answer(draft) == answer(None)
    assert sum(len(drafted) for _, drafted in draft.calls) > 10
